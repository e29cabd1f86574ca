"""TensorRT-RTX: compiles for NVIDIA GPUs on any machine. Engines are compiled here, but never executed."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import tensorrt_rtx as trt
from numpy.typing import NDArray

from qlip_export.backends.base import Backend, Buffer, Capabilities, Compiled, Engine
from qlip_export.bundle import EngineEntry, TensorEntry
from qlip_export.errors import QlipError
from qlip_export.spec import Container, DType

_NAMES: dict[Any, DType] = {
    trt.float32: "float32",
    trt.float16: "float16",
    trt.bfloat16: "bfloat16",
    trt.int64: "int64",
    trt.int32: "int32",
    trt.int8: "int8",
}


class TensorRtRtxBackend(Backend):
    """Strongly typed networks, for all GPUs that the library builds for unless it is told otherwise."""

    name = "tensorrt-rtx"

    def __init__(self, *, threads: int | None) -> None:
        """Nothing to prepare; ``threads`` has no meaning on a GPU."""

    @cached_property
    def capabilities(self) -> Capabilities:
        """The library's default targets; no GPU is asked."""
        return Capabilities(
            device="NVIDIA GPUs of compute capability 8.0, 8.6, 8.9 and 12.x",
            version=trt.__version__,
            half="float16",
            suffix=".plan",
            containers=(Container.FLOAT, Container.HALF, Container.INT8),
            options={"strongly_typed": True, "tf32": False},
            overhead=5_000_000,  # kernels for every GPU
            packs_int4=True,
        )

    def require_device(self) -> None:
        """See `Backend.require_device`."""
        self._cannot_run()

    def compile(self, onnx: Path, engine: Path, container: Container) -> Compiled:
        """See `Backend.compile`."""
        log = _Log()
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        with _readable(onnx, engine.parent, container) as (file, widened):
            # Weights are read from beside the file, some only while the engine is built.
            if not parser.parse_from_file(str(file)):
                errors = [_told(parser.get_error(i)) for i in range(parser.num_errors)]
                raise QlipError(
                    f"TensorRT-RTX {trt.__version__} cannot read {onnx.name}",
                    found="; ".join(errors) or log.text,
                    fix="compile this bundle with another backend",
                )
            config = builder.create_builder_config()
            config.clear_flag(trt.BuilderFlag.TF32)
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
            plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise QlipError(f"TensorRT-RTX {trt.__version__} cannot compile {onnx.name}", found=log.text)
        engine.write_bytes(bytes(plan))
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        types = Counter(layer.get_output(0).dtype.name.lower() for layer in layers)
        return Compiled(
            inputs=tuple(_entry(network.get_input(i)) for i in range(network.num_inputs)),
            outputs=tuple(_entry(network.get_output(i)) for i in range(network.num_outputs)),
            # The engine inspector would tell of layers after fusion; it needs a GPU.
            facts={"parsed_layers": dict(sorted(types.items())), "int4_weights_widened": widened},
        )

    def load(self, path: Path, entry: EngineEntry) -> Engine:
        """See `Backend.load`."""
        self._cannot_run()

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Buffer:
        """See `Backend.allocate`."""
        self._cannot_run()

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """See `Backend.write`."""
        self._cannot_run()

    def read(self, buffer: Buffer) -> NDArray[Any]:
        """See `Backend.read`."""
        self._cannot_run()

    def cast(self, source: Buffer, target: Buffer) -> None:
        """See `Backend.cast`."""
        self._cannot_run()

    def _cannot_run(self) -> NoReturn:
        raise QlipError(
            "qlip-export compiles engines of tensorrt-rtx, but cannot run them yet",
            expected=f"the engines run in TensorRT-RTX {trt.__version__} on {self.capabilities.device}",
            fix="load the *.plan files with TensorRT-RTX itself, or choose another --backend",
        )


class _Log(trt.ILogger):
    """Keeps what the library calls an error; its warnings about ordinary graphs are not shown."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
            self.errors.append(message)

    @property
    def text(self) -> str:
        return "; ".join(self.errors) or "no reason given"


@contextmanager
def _readable(onnx: Path, folder: Path, container: Container) -> Iterator[tuple[Path, int]]:
    """Yield the file to parse, and how many of its INT4 weights were widened to INT8.

    INT8 convolutions refuse packed INT4 weights; FP16 and FP32 layers read them as they are.
    """
    if container is not Container.INT8:
        yield onnx, 0
        return
    import onnx_ir as ir

    from qlip_export.graph.expand import expand_int4

    model = ir.load(onnx)
    widened = expand_int4(model)
    with tempfile.TemporaryDirectory(prefix=".expanded-", dir=folder) as temporary:
        expanded = Path(temporary) / "model.onnx"
        ir.save(model, expanded, external_data="model.data")
        yield expanded, widened


def _told(error: Any) -> str:
    return f"node {error.node_name()!r} ({error.node_operator()}): {error.desc().strip()}"


def _entry(port: Any) -> TensorEntry:
    return TensorEntry(name=port.name, shape=tuple(port.shape), dtype=_NAMES[port.dtype])
