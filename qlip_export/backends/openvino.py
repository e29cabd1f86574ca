"""OpenVINO on CPUs: FP32, BF16 (FP16 where the processor computes it) and INT8 engines of different speed."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from qlip_export.backends.base import Backend, Buffer, Capabilities, Engine, wrong_precisions
from qlip_export.backends.mapping import mapped
from qlip_export.backends.memory import measure_engine
from qlip_export.compiled import Compiled, EngineEntry, EngineFacts, EngineMemory, TensorEntry
from qlip_export.errors import QlipError
from qlip_export.spec import Asked, Container, DType

if TYPE_CHECKING:
    import onnx_ir as ir

_TYPES: dict[DType, ov.Type] = {
    "float32": ov.Type.f32,
    "float16": ov.Type.f16,
    "bfloat16": ov.Type.bf16,
    "int64": ov.Type.i64,
    "int32": ov.Type.i32,
    "int8": ov.Type.i8,
}
_COMPUTED = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i8": "int8", "u8": "int8"}
_NAMES: dict[str, DType] = {t.get_type_name(): name for name, t in _TYPES.items()}


_FRAGMENTS = 3_000_000
"""Bytes of heap pages that an engine brings and shares with others, so that dropping it does not give them
back and its measurement does not see them. Small engines have fewer."""
_KERNEL_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


class OpenVINOBackend(Backend):
    """Compiles for and runs on the CPU device."""

    name = "openvino"
    reserve = 2_500_000

    def __init__(self, *, threads: int | None) -> None:
        """Create the OpenVINO core; ``threads`` limits the threads of each engine."""
        self._core = ov.Core()
        self._threads = threads

    @cached_property
    def capabilities(self) -> Capabilities:
        """Device, version and native precisions as the CPU plugin reports them."""
        native = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        half: DType = "float16" if "FP16" in native else "bfloat16" if "BF16" in native else "float32"
        containers = [Container.FLOAT]
        if half != "float32":
            containers.append(Container.HALF)
        if "INT8" in native:
            containers.append(Container.INT8)
        return Capabilities(
            device=str(self._core.get_property("CPU", "FULL_DEVICE_NAME")).strip(),
            version=ov.get_version().split("-")[0],
            half=half,
            suffix=".blob",
            containers=tuple(containers),
            overhead=300_000,
            # Linear layers keep weights at 8 bits; those of convolutions are widened unless they run in INT8.
            weight_bytes={
                "conv": {Container.INT8: 1, Container.HALF: 4, Container.FLOAT: 4},
                "linear": dict.fromkeys(Container, 1),
            },
        )

    def _properties(self, container: Container, widened: bool) -> dict[str, str | int]:
        precision = "float32" if container is Container.FLOAT or widened else self.capabilities.half
        properties: dict[str, str | int] = {
            "INFERENCE_PRECISION_HINT": _TYPES[precision].get_type_name(),
            # Otherwise Linear layers with integer weights quantize their activations as they run, unasked.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        if self._threads == 1:
            # Without streams an engine runs in the thread that calls it; with one it has two of its own.
            return properties | {"NUM_STREAMS": 0, "INFERENCE_NUM_THREADS": 1}
        if self._threads is not None:
            properties["INFERENCE_NUM_THREADS"] = self._threads
        return properties | {"PERFORMANCE_HINT": "LATENCY"}

    def compile(self, onnx: Path, engine: Path, container: Container) -> Compiled:
        """See `Backend.compile`."""
        import onnx_ir as ir

        from qlip_export.graph.expand import expand_int4
        from qlip_export.graph.precisions import asked_precisions, locate
        from qlip_export.graph.store import load

        model = load(onnx)
        asked = asked_precisions(model)
        expand_int4(model)
        # A plugin that computes in 16 bits lowers FP32 layers too, so in their company FP16 is widened.
        widened = container is not Container.FLOAT and _has_float_layers(model)
        with tempfile.TemporaryDirectory(prefix=".expanded-", dir=engine.parent) as folder:
            expanded = Path(folder) / "model.onnx"
            ir.save(model, expanded, external_data="model.data")
            try:
                typed = self._with_typed_ports(self._core.read_model(expanded))
                with _without_kernel_cache:
                    compiled = self._core.compile_model(typed, "CPU", self._properties(container, widened))
            except RuntimeError as error:
                where = locate(onnx, str(error))
                raise QlipError(f"OpenVINO cannot compile {where}", found=str(error)) from error
        engine.write_bytes(compiled.export_model().getvalue())
        return Compiled(
            inputs=tuple(_entry(p, {str(v.name) for v in model.graph.inputs}) for p in compiled.inputs),
            outputs=tuple(_entry(p, {str(v.name) for v in model.graph.outputs}) for p in compiled.outputs),
            widened=widened,
            facts=self._facts(compiled, asked, container, widened),
        )

    def _facts(
        self, compiled: Any, asked: Mapping[str, Asked], container: Container, widened: bool
    ) -> EngineFacts:
        """Return what the plugin made of the graph: layers after fusion, with the types they compute in."""
        found: dict[str, str] = {}
        types: Counter[str] = Counter()
        for layer in compiled.get_runtime_model().get_ordered_ops():
            info = layer.get_rt_info()
            kind, told = info["layerType"].astype(str), info["runtimePrecision"].astype(str)
            if kind in ("Const", "Input", "Output"):
                continue
            name = layer.get_friendly_name()
            product = kind in ("Convolution", "FullyConnected", "MatMul")
            # Of a product the plugin tells the type of the weights; its kernel is named after its own.
            kernel = info["primitiveType"].astype(str).rsplit("_", 1)[-1].lower()
            told = kernel if product and kernel in _COMPUTED else told
            precision = _COMPUTED.get(told, told)
            types[precision] += 1
            if product:
                # A fused layer has the name of the node it began as, and lists the others. Names of nodes
                # have one slash; what follows another is the plugin's.
                names = {name, *info["originalLayersNames"].astype(str).split(",")}
                found.update({"/".join(part.split("/")[:2]): precision for part in names})
        half = "float32" if widened else self.capabilities.half
        # Layers with a bias may go by its name after fusion; those with Q/DQ never did.
        here = {
            node: wanted._replace(precision=half) if wanted.precision == "float16" else wanted
            for node, wanted in asked.items()
            if node in found or wanted.precision == "int8"
        }
        judged = container in self.capabilities.containers
        return EngineFacts(
            source="engine",
            layers=types.total(),
            precisions=dict(sorted(types.items())),
            wrong=wrong_precisions(here, found) if judged else {},
        )

    def _with_typed_ports(self, model: Any) -> Any:
        """Give FP16 ports the dtype the device computes in, so that nothing is converted between blocks."""
        ports = ov.preprocess.PrePostProcessor(model)
        half = _TYPES[self.capabilities.half]
        for index, port in enumerate(model.inputs):
            if port.get_element_type() == ov.Type.f16:
                ports.input(index).tensor().set_element_type(half)
        for index, port in enumerate(model.outputs):
            if port.get_element_type() == ov.Type.f16:
                ports.output(index).tensor().set_element_type(half)
        return ports.build()

    def measure(self, path: Path, entry: EngineEntry) -> EngineMemory | None:
        """See `Backend.measure`."""
        found = measure_engine(self, path, entry)
        if found is None:
            return None
        unseen = min(_FRAGMENTS, 8 * path.stat().st_size)
        return found.model_copy(update={"resident": found.resident + unseen})

    def load(self, path: Path, entry: EngineEntry) -> Engine:
        """See `Backend.load`."""
        properties = self._properties(entry.container, entry.widened)
        try:
            with mapped(path) as (mapping, contents), _without_kernel_cache:
                compiled = self._core.import_model(ov.Tensor(contents, shared_memory=True), "CPU", properties)
            return _OpenVINOEngine(compiled, mapping, contents)
        except RuntimeError as error:
            raise QlipError(
                f"OpenVINO {self.capabilities.version} on {self.capabilities.device} does not load {path}",
                found=str(error).strip().splitlines()[-1],
                fix="build the bundle again on this machine",
            ) from error

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Buffer:
        """See `Backend.allocate`."""
        return ov.Tensor(_TYPES[dtype], ov.Shape(list(shape)))

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """See `Backend.write`."""
        if buffer.element_type == ov.Type.bf16:
            buffer.data.view(np.uint16)[...] = _to_bfloat16(array)
        else:
            buffer.data[...] = array

    def read(self, buffer: Buffer) -> NDArray[Any]:
        """See `Backend.read`."""
        if buffer.element_type == ov.Type.bf16:
            return _from_bfloat16(buffer.data.view(np.uint16))
        if buffer.element_type == ov.Type.f16:
            return np.asarray(buffer.data, dtype=np.float32)
        return np.array(buffer.data)

    def cast(self, source: Buffer, target: Buffer) -> None:
        """See `Backend.cast`."""
        self.write(target, self.read(source))


class _OpenVINOEngine(Engine):
    # The weights stay in the file: what is mapped must outlive the model, so it comes after it.
    def __init__(self, compiled: Any, *mapped: Any) -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._mapped = mapped

    def bind(self, name: str, buffer: Buffer) -> None:
        self._request.set_tensor(name, buffer)

    def run(self) -> None:
        self._request.infer()
        if self.frugal:
            self._compiled.release_memory()

    def release(self) -> bool:
        self._compiled.release_memory()
        return True


class _WithoutKernelCache:
    """Let oneDNN, inside OpenVINO, keep no kernels of engines that are gone.

    By itself it keeps the last 1,024: 30 MB that no budget sees, for a twentieth of the time of a load. It
    reads this variable once, when it makes its first kernel. Torch has a oneDNN of its own, which does need
    its kernels again; so the variable is there only while OpenVINO loads.

    Engines load two at a time, and a C library may crash that reads the environment while it changes. So the
    first of loads that overlap sets the variable, and the last one removes it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loads = 0
        self._ours = False

    def __enter__(self) -> None:
        with self._lock:
            if self._loads == 0 and _KERNEL_CACHE not in os.environ:
                os.environ[_KERNEL_CACHE] = "0"
                self._ours = True
            self._loads += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._loads -= 1
            if self._loads == 0 and self._ours:
                del os.environ[_KERNEL_CACHE]
                self._ours = False


_without_kernel_cache = _WithoutKernelCache()


def _has_float_layers(model: ir.Model) -> bool:
    layers = [node for node in model.graph if node.op_type in ("Conv", "MatMul", "Gemm")]
    return any(str(node.outputs[0].dtype) == "FLOAT" for node in layers)


def _entry(port: Any, names: set[str]) -> TensorEntry:
    # Where arithmetic cancels out, a port also bears the name of its result: the graph's own name counts.
    name = min(names & port.get_names())
    shape = tuple(int(d) for d in port.get_shape())
    return TensorEntry(name=name, shape=shape, dtype=_NAMES[port.get_element_type().get_type_name()])


def _to_bfloat16(array: NDArray[Any]) -> NDArray[np.uint16]:
    """Round float32 to BF16, ties to even."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _from_bfloat16(codes: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (codes.astype(np.uint32) << 16).view(np.float32)
