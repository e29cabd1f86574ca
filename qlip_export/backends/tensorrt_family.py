"""TensorRT and TensorRT-RTX: one compiler over two libraries."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NoReturn

from qlip_export.backends import tensorrt_builder as shared
from qlip_export.backends.options import CompileOptions, refused
from qlip_export.backends.tensorrt_runtime import TensorRtRuntime
from qlip_export.compiled import Compiled, EngineFacts, TargetEntry
from qlip_export.errors import QlipError
from qlip_export.extents import EngineShapes
from qlip_export.files import written_aside
from qlip_export.progress import Progress, Silent
from qlip_export.spec import Asked, Container

if TYPE_CHECKING:
    import onnx_ir as ir
    import tensorrt


class TensorRtFamily(TensorRtRuntime):
    """Strongly typed networks: the graph's types are the engine's, TF32 is off unless asked for."""

    lacks: ClassVar[Mapping[str, str]]
    """Why the library does not take an option, by the option's name."""

    def __init__(self, *, threads: int | None) -> None:
        """Nothing to prepare; ``threads`` has no meaning on a GPU."""
        self._options = CompileOptions()
        self._progress: Progress = Silent()

    @property
    def options(self) -> CompileOptions:
        """What `prepare` was given."""
        return self._options

    @property
    def sources(self) -> tuple[Path, ...]:
        """See `Backend.sources`."""
        return (Path(inspect.getfile(type(self))), Path(__file__), Path(shared.__file__))

    def prepare(self, options: CompileOptions, progress: Progress) -> None:
        """See `Backend.prepare`."""
        for option in options.given:
            if option in self.lacks:
                raise refused(self.name, option, self.lacks[option])
        self._options, self._progress = options, progress

    def compile(self, onnx: Path, engine: Path, container: Container) -> Compiled:
        """See `Backend.compile`."""
        return self._compile(onnx, engine, container, None)

    def compile_ranging(
        self, onnx: Path, engine: Path, container: Container, shapes: EngineShapes
    ) -> Compiled:
        """See `Backend.compile_ranging`."""
        return self._compile(onnx, engine, container, shapes)

    def _compile(
        self, onnx: Path, engine: Path, container: Container, shapes: EngineShapes | None
    ) -> Compiled:

        from qlip_export.graph.dynamic import make_dynamic
        from qlip_export.graph.expand import expand_int4
        from qlip_export.graph.precisions import asked_precisions
        from qlip_export.graph.store import load

        def made() -> ir.Model:
            model = load(onnx)
            if shapes is not None:
                make_dynamic(model, shapes.ports, shapes.own, name=onnx.name)
            return model

        asked = asked_precisions(load(onnx))
        refusal: QlipError | None = None
        # INT8 kernels multiply INT8; others may read packed INT4, which depends on library and version.
        if container is not Container.INT8:
            try:
                if shapes is None:
                    return self._build(onnx, onnx, engine, asked)
                with _saved(made(), engine.parent) as ranging:
                    return self._build(onnx, ranging, engine, asked, shapes)
            except QlipError as error:
                refusal = error
        model = made()
        widened = expand_int4(model)
        if refusal is not None and not widened:
            raise refusal
        with _saved(model, engine.parent) as expanded:
            compiled = self._build(onnx, expanded, engine, asked, shapes)
        if refusal is not None:
            self._progress.note(
                f"{onnx.stem}: {self.title} refuses packed INT4 weights here; they are INT8 now "
                f"({refusal.found})"
            )
        assert compiled.facts is not None
        facts = compiled.facts.model_copy(update={"int4_weights_widened": widened})
        return compiled.model_copy(update={"facts": facts})

    def _build(
        self,
        onnx: Path,
        source: Path,
        engine: Path,
        asked: Mapping[str, Asked],
        shapes: EngineShapes | None = None,
    ) -> Compiled:
        """Build ``engine`` from ``source``, which is ``onnx`` or what was made of it."""
        trt, messages = self.library, shared.Messages()
        log = shared.logger(trt, messages)
        try:
            builder = trt.Builder(log)
        except TypeError as error:  # what pybind11 raises where a factory returns nothing
            raise QlipError(
                f"{self._version} does not start here",
                expected="an NVIDIA GPU and its driver",
                found=messages.text,
                fix="compile on the device; --backend tensorrt-rtx compiles without a GPU",
            ) from error
        network = builder.create_network(self._network_flags())
        parser = trt.OnnxParser(network, log)
        # Weights are read from beside the file, some only while the engine is built.
        read: bool = parser.parse_from_file(str(source))
        if not read:
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            told = "; ".join(f"{e.node_name()!r} ({e.node_operator()}): {e.desc().strip()}" for e in errors)
            self._fail(onnx, "cannot read", told or messages.text)
        config = builder.create_builder_config()
        watch = shared.Watch(self._progress, onnx.stem)
        self._configure(trt, config, messages)
        if shapes is not None:
            shared.add_profile(trt, builder, network, config, shapes)
        config.progress_monitor = shared.monitor(trt, watch)
        with shared.raising(watch):
            plan = shared.maybe(builder.build_serialized_network(network, config))
        if plan is None:
            self._fail(onnx, "cannot compile", messages.text)
        engine.write_bytes(bytes(plan))
        if self._options.timing_cache is not None:
            with written_aside(self._options.timing_cache) as aside:
                aside.write_bytes(bytes(config.get_timing_cache().serialize()))
        return Compiled(
            inputs=tuple(shared.port(network.get_input(i), shapes) for i in range(network.num_inputs)),
            outputs=tuple(shared.port(network.get_output(i), shapes) for i in range(network.num_outputs)),
            facts=self._facts(log, bytes(plan), asked, shared.parsed_facts(trt, network, asked)),
        )

    def _network_flags(self) -> int:
        """Return the flag that TensorRT 10 needs; 11 and RTX know no other networks than typed ones."""
        flag = self.library.NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")
        return 0 if flag is None else 1 << int(flag)

    def _configure(
        self, trt: shared.Library, config: tensorrt.IBuilderConfig, messages: shared.Messages
    ) -> None:
        """Tell the builder what was asked for."""
        options = self._options
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if not options.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        if options.version_compat:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
        if options.hardware_compat == "ampere-plus":
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        elif options.hardware_compat is not None:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
        if options.timing_cache is not None:
            self._attach_timing_cache(config, options.timing_cache, messages)

    def _attach_timing_cache(
        self, config: tensorrt.IBuilderConfig, path: Path, messages: shared.Messages
    ) -> None:
        data = path.read_bytes() if path.is_file() else b""
        said = len(messages.warnings)
        cache = shared.maybe(config.create_timing_cache(data))
        fits = config.set_timing_cache(cache, False) if cache is not None else False
        complaints = any("timing cache" in text for text in messages.warnings[said:])
        if data and (complaints or not fits):
            self._progress.note(
                f"timing cache {path} is of another version or device than {self._version}: ignored, "
                "a new one takes its place"
            )
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def _facts(
        self, log: tensorrt.ILogger, plan: bytes, asked: Mapping[str, Asked], parsed: EngineFacts
    ) -> EngineFacts:
        """Return what the engine inspector tells; what was parsed where the engine cannot be loaded here."""
        trt = self.library
        runtime = trt.Runtime(log)
        if self._options.version_compat:
            runtime.engine_host_code_allowed = True
        engine = shared.maybe(runtime.deserialize_cuda_engine(plan))
        if engine is None:
            return parsed
        inspector = engine.create_engine_inspector()
        return shared.engine_facts(
            inspector.get_engine_information(trt.LayerInformationFormat.JSON), asked, parsed
        )

    @property
    def _version(self) -> str:
        return f"{self.title} {self.capabilities.version}"

    def _fail(self, onnx: Path, what: str, told: str) -> NoReturn:
        from qlip_export.graph.precisions import locate

        if "workspace" in told and self._options.workspace is not None:
            fix = f"allow more than --workspace {self._options.workspace}"
        elif "out of memory" in told.lower() or "OutOfMemory" in told:
            fix = "free memory and run the same command again; what is finished is kept"
        else:
            fix = "compile this bundle with another backend"
        raise QlipError(f"{self._version} {what} {locate(onnx, told)}", found=told, fix=fix)


@contextmanager
def _saved(model: ir.Model, folder: Path) -> Iterator[Path]:
    """Yield a file with ``model`` and its weights, in a folder of its own that goes afterwards."""
    import onnx_ir as ir

    with tempfile.TemporaryDirectory(prefix=".expanded-", dir=folder) as temporary:
        file = Path(temporary) / "model.onnx"
        ir.save(model, file, external_data="model.data")
        yield file


def check_fit(target: TargetEntry, version: str, gpu: str, rebuild: str) -> None:
    """Make sure that TensorRT ``version`` on ``gpu`` loads the engines of ``target``.

    An engine belongs to one version and one GPU model, unless it was compiled to be compatible.

    Raises:
        QlipError: Another version or another GPU; names both sides.
    """
    made, here = _numbers(target.version), _numbers(version)
    newer = made[0] == here[0] and made <= here
    if made[:3] != here[:3] and not (target.options.get("version_compat") and newer):
        raise QlipError(
            "the engines belong to another version of TensorRT",
            expected=f"TensorRT {target.version}, which compiled them",
            found=f"TensorRT {version}",
            fix=rebuild,
        )
    level = target.options.get("hardware_compat")
    fits = {
        "ampere-plus": _capability(gpu) >= (8, 0),
        "same-compute-capability": _capability(gpu) == _capability(target.device),
    }.get(str(level), gpu == target.device)
    if not fits:
        raise QlipError(
            "the engines belong to another GPU",
            expected=target.device + (f", or compatible ({level})" if level else ""),
            found=gpu,
            fix=rebuild,
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _capability(gpu: str) -> tuple[int, int]:
    major, minor = gpu.rsplit(" ", 1)[-1].split(".")
    return int(major), int(minor)
