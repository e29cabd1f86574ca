"""ONNX Runtime on NVIDIA GPUs: FP32 and FP16; INT8 blocks compute FP16 between their Q and DQ nodes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qlip_export.backends.base import Backend, Buffer, Capabilities, Engine
from qlip_export.backends.cuda import DeviceBuffer, Gpu, Recording, gpu_count
from qlip_export.compiled import Compiled, EngineEntry, EngineFacts, TensorEntry
from qlip_export.errors import QlipError
from qlip_export.spec import Container, DType

PROVIDER = "CUDAExecutionProvider"

Graphs = Literal["none", "engine", "pattern"]
"""What becomes one CUDA graph: nothing, every engine (by ONNX Runtime itself), or a whole bit pattern."""


class OnnxRuntimeCudaBackend(Backend):
    """The CUDA execution provider. An engine file is the typed ONNX graph with its weights inside.

    ONNX Runtime optimizes the graph when it loads it, so engines are compiled on any machine and run on any
    GPU. All engines run on one stream, in device buffers.
    """

    name = "onnxruntime-cuda"
    budgets = False

    def __init__(self, *, threads: int | None, graphs: Graphs = "pattern") -> None:
        """Nothing touches the GPU yet.

        Args:
            threads: Has no meaning on a GPU.
            graphs: What becomes one CUDA graph; with any, engines are started without waiting for them.
        """
        self._graphs = graphs
        self._recordings: list[Recording] = []
        self._fallbacks: list[str] = []

    @cached_property
    def capabilities(self) -> Capabilities:
        """The CUDA provider of the installed ONNX Runtime; no GPU is asked."""
        return Capabilities(
            device="NVIDIA GPUs",
            version=ort.__version__,
            half="float16",
            suffix=".onnx",
            containers=(Container.FLOAT, Container.HALF),
            options={"tf32": False},
        )

    @cached_property
    def gpu(self) -> Gpu:
        """The first GPU."""
        _load_libraries()
        return Gpu()

    def require_device(self) -> None:
        """See `Backend.require_device`."""
        if PROVIDER not in ort.get_available_providers():
            raise QlipError(
                "the installed ONNX Runtime has no CUDA provider",
                expected=PROVIDER,
                found=", ".join(ort.get_available_providers()),
                fix='pip uninstall onnxruntime; pip install "qlip-export[onnxruntime-gpu]"',
            )
        if gpu_count() == 0:
            raise QlipError(
                "no NVIDIA GPU is at hand",
                expected="a GPU and its driver",
                found="none",
                fix="choose another --backend",
            )

    @property
    def notes(self) -> list[str]:
        """See `Backend.notes`: nodes that are not on the GPU, steps without a CUDA graph."""
        return [*self._fallbacks, *dict.fromkeys(r.note for r in self._recordings if r.note is not None)]

    def compile(self, onnx: Path, engine: Path, container: Container) -> Compiled:
        """See `Backend.compile`."""
        import onnx_ir as ir

        from qlip_export.graph.fuse import float_argmax, fuse_attention, split_group_norm
        from qlip_export.graph.store import load

        model = load(onnx)
        ir.external_data.load_to_model(model)
        split_group_norm(model)
        float_argmax(model)
        # Fused kernels multiply FP32 in TF32.
        if container is not Container.FLOAT:
            fuse_attention(model)
        try:
            engine.write_bytes(ir.to_proto(model).SerializeToString())
        except ValueError as error:  # protobuf's limit of 2 GB
            raise QlipError(
                f"{onnx.name} does not fit into one ONNX file",
                expected="less than 2 GB with its weights",
                found=str(error),
                fix="cut the model finer (--blocks fine), or leave out 32 bits",
            ) from error
        return Compiled(
            inputs=tuple(_entry(port) for port in model.graph.inputs),
            outputs=tuple(_entry(port) for port in model.graph.outputs),
            facts=EngineFacts(
                source="parsed network",
                layers=len(model.graph),
                precisions=dict(Counter(_dtype(node.outputs[0]) for node in model.graph)),
                wrong={},
                elsewhere=self._tried(engine),
            ),
        )

    def _tried(self, engine: Path) -> tuple[str, ...] | None:
        """Return the nodes that the GPU would not run; without a GPU only see that the graph loads."""
        try:
            self.require_device()
        except QlipError:
            _session(engine, "CPUExecutionProvider", optimized=False)
            return None
        return nodes_elsewhere(self._on_gpu(engine))

    def _on_gpu(self, path: Path, *, graph: bool = False) -> Any:
        stream = str(int(self.gpu.stream))
        options = {"device_id": str(self.gpu.index), "user_compute_stream": stream, "use_tf32": "0"}
        options["arena_extend_strategy"] = "kSameAsRequested"  # every session has an arena; doubling adds up
        if graph:
            options["enable_cuda_graph"] = "1"
        session = _session(path, (PROVIDER, options))
        if PROVIDER not in session.get_providers():
            raise QlipError(
                "ONNX Runtime could not start its CUDA provider",
                expected="the CUDA and cuDNN libraries that it was built for",
                found=f"{', '.join(session.get_providers())} on {self.gpu.name}",
                fix='pip install "qlip-export[onnxruntime-gpu]"',
            )
        return session

    def load(self, path: Path, entry: EngineEntry) -> Engine:
        """See `Backend.load`."""
        self.require_device()
        graph = self._graphs == "engine"
        try:
            session = self._on_gpu(path, graph=graph)
        except QlipError as error:
            if not graph:
                raise
            self._fallbacks.append(f"{path.name}: not a CUDA graph: {error.found}")
            session = self._on_gpu(path)
        elsewhere = nodes_elsewhere(session)
        if elsewhere:
            self._fallbacks.append(f"{path.name}: not on the GPU: {', '.join(elsewhere)}")
        return _CudaEngine(session, waits=self._graphs == "none")

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Buffer:
        """See `Backend.allocate`: memory that ONNX Runtime knows as its own, which it never copies first."""
        self.gpu.activate()
        value = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(dtype), "cuda", self.gpu.index)
        return DeviceBuffer(value.data_ptr(), shape, dtype, owner=value)

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """See `Backend.write`."""
        self.gpu.write(buffer, array)
        self._settle()

    def read(self, buffer: Buffer) -> NDArray[Any]:
        """See `Backend.read`."""
        return self.gpu.read(buffer)

    def cast(self, source: Buffer, target: Buffer) -> None:
        """See `Backend.cast`."""
        self.gpu.cast(source, target)
        self._settle()

    def _settle(self) -> None:
        """Without graphs every call is done when it returns, whatever stream ONNX Runtime copies on."""
        if self._graphs == "none":
            self.gpu.synchronize()

    def synchronize(self) -> None:
        """See `Backend.synchronize`."""
        self.gpu.synchronize()

    def sequence(
        self, calls: Sequence[Callable[[], None]], inputs: Sequence[Buffer], outputs: Sequence[Buffer]
    ) -> Callable[[], None]:
        """See `Backend.sequence`: one CUDA graph, if that is wanted."""
        if self._graphs != "pattern":
            return super().sequence(calls, inputs, outputs)
        recording = Recording(self.gpu, calls, inputs, outputs)
        self._recordings.append(recording)
        return recording


class _CudaEngine(Engine):
    def __init__(self, session: Any, *, waits: bool) -> None:
        self._session = session
        self._inputs = {port.name for port in session.get_inputs()}
        self._binding = session.io_binding()
        self._options = ort.RunOptions()
        if not waits:  # the next engine follows on the same stream; whoever reads a result waits
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(self, name: str, buffer: Buffer) -> None:
        if name in self._inputs:
            self._binding.bind_ortvalue_input(name, buffer.owner)
        else:
            self._binding.bind_ortvalue_output(name, buffer.owner)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding, self._options)


@cache
def _load_libraries() -> None:
    with redirect_stdout(sys.stderr):  # ONNX Runtime prints which library it lacks
        ort.preload_dlls()


def _session(path: Path, provider: Any, *, optimized: bool = True) -> Any:
    options = ort.SessionOptions()
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # There are no INT8 kernels: Q and DQ stay as they are, and weights are multiplied out at the load.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        return ort.InferenceSession(path, options, providers=[provider])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise QlipError(
            f"ONNX Runtime {ort.__version__} does not load {path}",
            found=str(error),
            fix="compile the bundle again",
        ) from error


def _entry(port: Any) -> TensorEntry:
    return TensorEntry(name=port.name, shape=tuple(port.shape), dtype=_dtype(port))


def _dtype(value: Any) -> Any:
    return value.dtype.numpy().name if value.dtype is not None else "unknown"


def nodes_elsewhere(session: Any, provider: str = PROVIDER) -> tuple[str, ...]:
    """Return the nodes of a session that ``provider`` does not run, as 'type name (provider)'."""
    return tuple(
        f"{node.op_type} {node.name} ({part.ep_name})"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
    )
