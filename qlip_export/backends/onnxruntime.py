"""ONNX Runtime on CPUs: the reference for numbers; INT8 and FP16 run here, but hardly faster than FP32."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qlip_export.backends.base import Backend, Buffer, Capabilities, Engine
from qlip_export.backends.memory import measure_engine
from qlip_export.compiled import Compiled, EngineEntry, EngineFacts, EngineMemory, TensorEntry
from qlip_export.errors import QlipError
from qlip_export.spec import Container, DType

_FROM_ORT: dict[str, DType] = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
}


_BREAKS_QDQ = ["MatMulAddFusion"]
"""Puts a Reshape between DequantizeLinear and MatMul, after which ONNX Runtime 1.32 mixes INT8 with UINT8."""


class OnnxRuntimeBackend(Backend):
    """The CPU execution provider. An engine file is the ONNX graph after ONNX Runtime's own optimization."""

    name = "onnxruntime"
    reserve = 12_000_000

    def __init__(self, *, threads: int | None) -> None:
        """Remember ``threads``, the intra-op threads of each engine."""
        self._threads = threads

    @cached_property
    def capabilities(self) -> Capabilities:
        """The CPU provider of the installed ONNX Runtime."""
        return Capabilities(
            device="CPU",
            version=ort.__version__,
            half="float16",
            suffix=".ort.onnx",
            containers=(Container.FLOAT,),
        )

    def _session(self, graph: Path | bytes, options: Any, container: Container) -> Any:
        disabled = _BREAKS_QDQ if container is Container.INT8 else None
        return ort.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )

    def _options(self) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Otherwise Linear layers with INT4 weights quantize their activations as they run, unasked.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        return options

    def compile(self, onnx: Path, engine: Path, container: Container) -> Compiled:
        """See `Backend.compile`."""
        import onnx_ir as ir

        from qlip_export.graph.precisions import locate

        # ONNX Runtime would copy references to the shared weight file into the engine; it must stand alone.
        model = ir.load(onnx)
        ir.external_data.load_to_model(model)
        options = self._options()
        # The extended level is portable between CPUs; the level above bakes in this CPU's memory layout.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(engine)
        try:
            session = self._session(ir.to_proto(model).SerializeToString(), options, container)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            where = locate(onnx, str(error))
            raise QlipError(f"ONNX Runtime cannot compile {where}", found=str(error)) from error
        return Compiled(
            inputs=tuple(_entry(p) for p in session.get_inputs()),
            outputs=tuple(_entry(p) for p in session.get_outputs()),
            facts=self._facts(engine, container),
        )

    def _facts(self, engine: Path, container: Container) -> EngineFacts:
        """Return what the profiler tells of one run: each kernel, and the type of its first input."""
        with tempfile.TemporaryDirectory(prefix=".profile-", dir=engine.parent) as folder:
            options = self._options()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "run")
            session = self._session(engine, options, container)
            ports = [_entry(port) for port in session.get_inputs()]
            session.run(None, {port.name: np.zeros(port.shape, np.dtype(port.dtype)) for port in ports})
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        kernels = [event["args"] for event in events if event["name"].endswith("_kernel_time")]
        types = Counter(_type_of(kernel.get("input_type_shape") or []) for kernel in kernels)
        return EngineFacts(
            source="engine",
            layers=len(kernels),
            precisions=dict(sorted(types.items())),
            wrong={},  # where a CPU has no kernels for a type, computing in FP32 is what was meant
        )

    def measure(self, path: Path, entry: EngineEntry) -> EngineMemory | None:
        """See `Backend.measure`."""
        return measure_engine(self, path, entry)

    def load(self, path: Path, entry: EngineEntry) -> Engine:
        """See `Backend.load`."""
        try:
            session = self._session(path, self._options(), entry.container)
        except Exception as error:  # as above
            raise QlipError(
                f"ONNX Runtime {ort.__version__} does not load {path}",
                found=str(error),
                fix="build the bundle again",
            ) from error
        return _OnnxRuntimeEngine(session)

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Buffer:
        """See `Backend.allocate`."""
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=np.dtype(dtype)))

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """See `Backend.write`."""
        current = buffer.numpy()
        buffer.update_inplace(np.ascontiguousarray(array, dtype=current.dtype))

    def read(self, buffer: Buffer) -> NDArray[Any]:
        """See `Backend.read`."""
        array = np.array(buffer.numpy())
        return array.astype(np.float32) if array.dtype == np.float16 else array

    def cast(self, source: Buffer, target: Buffer) -> None:
        """See `Backend.cast`."""
        self.write(target, source.numpy())


class _OnnxRuntimeEngine(Engine):
    def __init__(self, session: Any) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._inputs = {i.name for i in session.get_inputs()}
        self._shrinking = ort.RunOptions()
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def bind(self, name: str, buffer: Buffer) -> None:
        if name in self._inputs:
            self._binding.bind_ortvalue_input(name, buffer)
        else:
            self._binding.bind_ortvalue_output(name, buffer)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding, self._shrinking if self.frugal else None)

    def release(self) -> bool:
        return False  # an arena shrinks at the end of a run or not at all


def _type_of(inputs: list[dict[str, Any]]) -> str:
    if not inputs:
        return "none"
    (name,) = inputs[0]
    return "int4" if name == "Int4x2" else str(_FROM_ORT.get(f"tensor({name})", name))


def _entry(port: Any) -> TensorEntry:
    return TensorEntry(name=port.name, shape=tuple(port.shape), dtype=_FROM_ORT[port.type])
