"""Memory, one stream, casts and graphs on an NVIDIA GPU, through NVIDIA's own bindings.

Backends whose library takes plain device pointers and a stream share this layer: their engines run one after
the other on one stream, nothing waits until a result is read, and values between blocks stay on the device.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from cuda.bindings import driver, nvrtc, runtime
from numpy.typing import NDArray

from qlip_export.errors import QlipError
from qlip_export.spec import DType

EAGER_RUNS = 2
"""Runs before a graph is recorded: libraries choose kernels in the first and have their memory after two."""

REPLAY_TOLERANCE = 1e-2
"""How far a replay may be off, of the largest value: kernels that add atomically differ from run to run."""

_THREADS = 256
_CASTS: dict[tuple[DType, DType], str] = {
    ("float32", "float16"): "narrow",
    ("float16", "float32"): "widen",
}
# Inline PTX, because the compiler's header for half floats is not installed everywhere.
_SOURCE = """
extern "C" __global__ void narrow(const float* in, unsigned short* out, unsigned long long n) {
    unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
    if (i < n) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out[i]) : "f"(in[i]));
}
extern "C" __global__ void widen(const unsigned short* in, float* out, unsigned long long n) {
    unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
    if (i < n) asm("cvt.f32.f16 %0, %1;" : "=f"(out[i]) : "h"(in[i]));
}
"""


@dataclass(frozen=True, eq=False)
class DeviceBuffer:
    """A tensor in the memory of the GPU.

    Attributes:
        pointer: Device address; fixed as long as the buffer lives.
        shape: Shape.
        dtype: Dtype.
        owner: What frees the memory when the buffer is gone, if that is not the GPU's own layer.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: DType
    owner: Any = None

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * np.dtype(self.dtype).itemsize


def gpu_count() -> int:
    """Return how many NVIDIA GPUs the driver shows; 0 without a driver."""
    try:
        error, count = runtime.cudaGetDeviceCount()
    except RuntimeError:  # the bindings found no driver library
        return 0
    return int(count) if error == runtime.cudaError_t.cudaSuccess else 0


class Gpu:
    """One GPU and one stream on it."""

    def __init__(self, index: int = 0) -> None:
        """Create the stream.

        Raises:
            QlipError: There is no such GPU, or its driver is too old.
        """
        self.index = index
        self.activate()
        # Not the default stream: that one waits for all others, and cannot be recorded.
        self.stream: Any = _ok(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
        properties = _ok(runtime.cudaGetDeviceProperties(index))
        self.name: str = properties.name.split(b"\0")[0].decode()
        self.capability: tuple[int, int] = (properties.major, properties.minor)
        self.memory: int = properties.totalGlobalMem
        self._kernels: dict[str, Any] = {}

    def activate(self) -> None:
        """Make this GPU the current one of the calling thread."""
        _ok(runtime.cudaSetDevice(self.index))

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> DeviceBuffer:
        """Return an uninitialised buffer; its memory is freed with it.

        Raises:
            QlipError: The memory of the GPU is used up.
        """
        self.activate()
        size = max(1, prod(shape) * np.dtype(dtype).itemsize)
        pointer = int(_ok(runtime.cudaMalloc(size), f"allocating {size:,} bytes on {self.name}"))
        buffer = DeviceBuffer(pointer, shape, dtype)
        weakref.finalize(buffer, runtime.cudaFree, pointer)
        return buffer

    def write(self, buffer: DeviceBuffer, array: NDArray[Any]) -> None:
        """Copy ``array`` to the GPU, converting to the buffer's dtype; in the order of the stream."""
        host = np.ascontiguousarray(array, dtype=np.dtype(buffer.dtype))
        if host.shape != buffer.shape:
            host = np.ascontiguousarray(np.broadcast_to(host, buffer.shape))
        # From ordinary memory: the call returns when the array has been read.
        to_device = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.activate()
        _ok(runtime.cudaMemcpyAsync(buffer.pointer, host.ctypes.data, buffer.size, to_device, self.stream))

    def read(self, buffer: DeviceBuffer) -> NDArray[Any]:
        """Wait for all work on the stream and return a copy of ``buffer``; FP16 comes back as float32."""
        host = np.empty(buffer.shape, dtype=np.dtype(buffer.dtype))
        to_host = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.activate()
        _ok(runtime.cudaMemcpyAsync(host.ctypes.data, buffer.pointer, buffer.size, to_host, self.stream))
        self.synchronize()
        return host.astype(np.float32) if host.dtype == np.float16 else host

    def synchronize(self) -> None:
        """Wait for all work on the stream.

        Raises:
            QlipError: Some of it failed.
        """
        _ok(runtime.cudaStreamSynchronize(self.stream), f"running on {self.name}")

    def cast(self, source: DeviceBuffer, target: DeviceBuffer) -> None:
        """Convert between FP32 and FP16 on the GPU."""
        kernel = self._kernel(_CASTS[source.dtype, target.dtype])
        values = (source.pointer, target.pointer, source.count)
        types = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulonglong)
        blocks = -(-source.count // _THREADS)
        self.activate()
        _ok(
            driver.cuLaunchKernel(
                kernel, blocks, 1, 1, _THREADS, 1, 1, 0, int(self.stream), (values, types), 0
            )
        )

    def _kernel(self, name: str) -> Any:
        if not self._kernels:
            major, minor = self.capability
            code = compile_kernels(f"sm_{major}{minor}")
            library = _ok(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
            for each in _CASTS.values():
                kernel = _ok(driver.cuLibraryGetKernel(library, each.encode()))
                self._kernels[each] = _ok(driver.cuKernelGetFunction(kernel))
        return self._kernels[name]


def compile_kernels(architecture: str) -> bytes:
    """Return the machine code of the casts for an architecture, e.g. ``sm_90``; needs no GPU.

    Raises:
        QlipError: NVRTC, which compiles them, is not installed.
    """
    try:
        program = _ok(nvrtc.nvrtcCreateProgram(_SOURCE.encode(), b"casts.cu", 0, [], []))
    except RuntimeError as missing:  # the bindings found no library
        raise QlipError(
            "blocks of different precision are cast on the GPU by kernels that NVRTC compiles",
            expected="libnvrtc, of the CUDA toolkit or of a package",
            found=str(missing).strip(),
            fix="pip install nvidia-cuda-nvrtc",
        ) from missing
    option = f"--gpu-architecture={architecture}".encode()
    (error,) = nvrtc.nvrtcCompileProgram(program, 1, [option])
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _ok(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise QlipError(f"the casts do not compile for {architecture}", found=log.decode().strip("\0 \n"))
    code: bytes = b" " * _ok(nvrtc.nvrtcGetCUBINSize(program))
    _ok(nvrtc.nvrtcGetCUBIN(program, code))
    return code


class Recording:
    """Calls that start work on a stream, recorded as one CUDA graph and then started by one launch.

    The first runs make the calls themselves. A graph is used once a replay on inputs that it was not recorded
    with gave what the calls give: a library may copy on streams of its own, which no graph holds. Where
    recording or this proof fails, the calls are made every time, and ``note`` says why.

    Attributes:
        note: Why there is no graph; none as long as there may be one.
        nodes: Number of nodes of the graph by kind, once it was recorded.
    """

    def __init__(
        self,
        gpu: Gpu,
        calls: Sequence[Callable[[], None]],
        inputs: Sequence[DeviceBuffer],
        outputs: Sequence[DeviceBuffer],
        *,
        eager_runs: int = EAGER_RUNS,
    ) -> None:
        """Nothing runs before the first call.

        Args:
            gpu: Has the stream.
            calls: Start the work.
            inputs: What the work reads and does not write; floating-point.
            outputs: What it is done for; floating-point.
            eager_runs: How often the calls are made before they are recorded.
        """
        self.note: str | None = None
        self.nodes: dict[str, int] = {}
        self._gpu = gpu
        self._calls = tuple(calls)
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._eager_runs = self._left = eager_runs
        self._graph: Any = None

    def __call__(self) -> None:
        """Start all of it; returns before it is done."""
        self._gpu.activate()
        if self._graph is None and self.note is None:
            if self._left > 0:
                self._left -= 1
            else:
                self._record()
        if self._graph is None:
            self._run()
        else:
            _ok(runtime.cudaGraphLaunch(self._graph, self._gpu.stream))

    def forget(self) -> None:
        """Drop the graph: what it was recorded with has moved. It is recorded anew after a few runs."""
        self._graph, self._left = None, self._eager_runs

    def _run(self) -> None:
        for call in self._calls:
            call()

    def _record(self) -> None:
        # Relaxed: a library may still allocate memory while it is recorded.
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        _ok(runtime.cudaStreamBeginCapture(self._gpu.stream, mode))
        failure: Exception | None = None
        try:
            for call in self._calls:
                call()
        except Exception as error:  # a library's own; recording must end whatever it was
            failure = error
        status, graph = runtime.cudaStreamEndCapture(self._gpu.stream)
        try:
            if failure is not None:
                raise failure
            _ok((status,), "recording")
            _remove_host_nodes(graph)
            self.nodes = _count_nodes(graph)
            launchable = _ok(runtime.cudaGraphInstantiate(graph, 0))
            weakref.finalize(self, runtime.cudaGraphExecDestroy, launchable)
            if self._is_faithful(launchable):
                self._graph = launchable
            else:
                self.note = (
                    "a CUDA graph of all engines does not compute what they compute one by one, "
                    "so each engine is started by itself"
                )
        except Exception as error:  # as above: whatever stands in the way of a graph, the calls work without
            runtime.cudaGetLastError()  # an error that is told here must not surface in the next call
            self.note = f"not recorded as a CUDA graph, each engine is started by itself: {error}"
        finally:
            if graph is not None and int(graph):
                runtime.cudaGraphDestroy(graph)

    def _is_faithful(self, graph: Any) -> bool:
        """Return whether a replay gives what the calls give, on inputs that it was not recorded with."""
        given = [self._gpu.read(buffer) for buffer in self._inputs]
        try:
            for buffer, values in zip(self._inputs, given, strict=True):
                self._gpu.write(buffer, values / 2)
            for buffer in self._outputs:
                self._gpu.write(buffer, np.full(buffer.shape, np.nan))
            # Before the calls: what they leave behind must not help the graph.
            _ok(runtime.cudaGraphLaunch(graph, self._gpu.stream))
            found = [self._gpu.read(buffer) for buffer in self._outputs]
            self._run()
            expected = [self._gpu.read(buffer) for buffer in self._outputs]
        finally:
            for buffer, values in zip(self._inputs, given, strict=True):
                self._gpu.write(buffer, values)
        return all(
            np.allclose(one, other, rtol=0, atol=REPLAY_TOLERANCE * float(np.abs(other).max()))
            for one, other in zip(found, expected, strict=True)
        )


def _remove_host_nodes(graph: Any) -> None:
    """Take calls back to the host out of a graph, and tie what came before them to what comes after.

    ONNX Runtime frees the staging buffers of a run that way. A graph that is replayed still copies from those
    buffers, so they must stay, and must not be freed once for each replay.
    """
    for node in _nodes(graph):
        if _ok(runtime.cudaGraphNodeGetType(node)) != runtime.cudaGraphNodeType.cudaGraphNodeTypeHost:
            continue
        before = _related(runtime.cudaGraphNodeGetDependencies, node)
        after = _related(runtime.cudaGraphNodeGetDependentNodes, node)
        for first in before:
            known = {int(each) for each in _related(runtime.cudaGraphNodeGetDependentNodes, first)}
            for second in after:
                if int(second) not in known:
                    _ok(runtime.cudaGraphAddDependencies(graph, [first], [second], None, 1))
        _ok(runtime.cudaGraphDestroyNode(node))


def _nodes(graph: Any) -> list[Any]:
    count = _ok(runtime.cudaGraphGetNodes(graph, 0))[-1]
    return list(_ok(runtime.cudaGraphGetNodes(graph, count))[0])


def _related(query: Callable[..., Any], node: Any) -> list[Any]:
    count = _ok(query(node, 0))[-1]
    return list(_ok(query(node, count))[0]) if count else []


def _count_nodes(graph: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in _nodes(graph):
        kind = _ok(runtime.cudaGraphNodeGetType(node)).name.removeprefix("cudaGraphNodeType").lower()
        if kind == "memcpy":
            copied = _ok(runtime.cudaGraphMemcpyNodeGetParams(node)).kind.name
            kind = copied.removeprefix("cudaMemcpy")
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def _ok(result: tuple[Any, ...], doing: str = "a CUDA call") -> Any:
    """Return what a call of the bindings returned beside its status: a value, or several as a tuple.

    Raises:
        QlipError: The status is an error.
    """
    status, *values = result
    if int(status) != 0:
        raise QlipError(f"{doing} failed", found=_named(status), fix=_fix(status))
    return values[0] if len(values) == 1 else tuple(values) if values else None


def _named(status: Any) -> str:
    if isinstance(status, runtime.cudaError_t):
        _, text = runtime.cudaGetErrorString(status)
        return f"{status.name}: {text.decode()}"
    return str(status.name)


def _fix(status: Any) -> str | None:
    if not isinstance(status, runtime.cudaError_t):
        return None
    codes = runtime.cudaError_t
    if status == codes.cudaErrorMemoryAllocation:
        return "free memory of the GPU, or choose fewer bit options"
    if status == codes.cudaErrorInsufficientDriver:
        return "install a driver for this version of CUDA, or the build of the library for an older one"
    return None
