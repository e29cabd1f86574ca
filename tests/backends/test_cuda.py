"""The device layer against a stand-in for the CUDA runtime: order, recording, fallbacks, memory, errors."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from qlip_export.backends import cuda
from qlip_export.backends.cuda import Gpu, Recording, compile_kernels, gpu_count
from qlip_export.errors import QlipError
from tests.backends.stand_in_cuda import Kind, StandInRuntime


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> StandInRuntime:
    stand_in = StandInRuntime()
    monkeypatch.setattr(cuda, "runtime", stand_in)
    return stand_in


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
def test_what_is_written_is_read_back(runtime: StandInRuntime, dtype: str) -> None:
    gpu = Gpu()
    array = np.array([[1, -2, 0], [5, 96, -7]])
    buffer = gpu.allocate((2, 3), dtype)  # type: ignore[arg-type]
    gpu.write(buffer, array)
    np.testing.assert_array_equal(gpu.read(buffer), array)
    assert gpu.read(buffer).dtype == ("float32" if dtype == "float16" else dtype)


def test_shape_that_does_not_fit_is_no_overrun(runtime: StandInRuntime) -> None:
    gpu = Gpu()
    with pytest.raises(ValueError, match="broadcast"):
        gpu.write(gpu.allocate((2, 3), "float32"), np.zeros(7))


def test_memory_is_freed_with_the_buffer(runtime: StandInRuntime) -> None:
    gpu = Gpu()
    buffer = gpu.allocate((100,), "float32")
    assert len(runtime.blocks) == 1
    del buffer
    gc.collect()
    assert runtime.blocks == {}


def test_memory_that_is_used_up_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "runtime", StandInRuntime(memory=1000))
    with pytest.raises(QlipError, match=r"allocating 4,000 bytes on stand-in failed(.|\n)*free memory"):
        Gpu().allocate((1000,), "float32")


def test_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "runtime", StandInRuntime(gpus=0))
    assert gpu_count() == 0
    with pytest.raises(QlipError, match="cudaErrorInvalidDevice"):
        Gpu()


def test_recording_is_made_once_and_launched_from_then_on(runtime: StandInRuntime) -> None:
    gpu = Gpu()
    source, target = gpu.allocate((3,), "float32"), gpu.allocate((3,), "float32")
    started: list[str] = []

    def double() -> None:
        started.append("double")
        runtime.do(lambda: gpu_view(runtime, target, gpu_view(runtime, source) * 2))

    def add() -> None:
        started.append("add")
        runtime.do(lambda: gpu_view(runtime, target, gpu_view(runtime, target) + 1))

    recording = Recording(gpu, [double, add], [source], [target])
    for value in range(5):
        gpu.write(source, np.full(3, value))
        recording()
        assert gpu.read(target).tolist() == [2 * value + 1] * 3
    assert started == ["double", "add"] * 4  # twice by themselves, once to be recorded, once to compare
    assert runtime.launches == 4
    assert recording.note is None
    assert recording.nodes == {"kernel": 2}
    recording.forget()
    for value in range(3):
        gpu.write(source, np.full(3, value))
        recording()
        assert gpu.read(target).tolist() == [2 * value + 1] * 3
    assert (runtime.launches, len(started)) == (6, 16)


@pytest.mark.parametrize("escapes", ["input", "output"])
def test_graph_that_misses_a_copy_is_found_out_and_not_used(runtime: StandInRuntime, escapes: str) -> None:
    """A library that copies on a stream of its own: that is done at once and is in no graph."""
    gpu = Gpu()
    source, target, own = (gpu.allocate((3,), "float32") for _ in range(3))

    def work() -> None:
        first, second = (own, target) if escapes == "input" else (source, own)
        if escapes == "input":
            gpu_view(runtime, own, gpu_view(runtime, source))
        runtime.do(lambda: gpu_view(runtime, second, gpu_view(runtime, first) * 2))
        if escapes == "output":
            gpu_view(runtime, target, gpu_view(runtime, own))

    recording = Recording(gpu, [work], [source], [target])
    for value in (1, 2, 3, 4, 5, 5):
        gpu.write(source, np.full(3, value))
        recording()
        assert gpu.read(target).tolist() == [2 * value] * 3
    assert recording.note is not None and "does not compute" in recording.note
    assert runtime.launches == 1


def gpu_view(
    runtime: StandInRuntime, buffer: cuda.DeviceBuffer, value: np.ndarray | None = None
) -> np.ndarray:
    array = np.frombuffer(runtime.blocks[buffer.pointer], np.float32, count=buffer.count)
    if value is not None:
        array[:] = value
    return array


@pytest.mark.parametrize("position", ["first", "middle", "last", "twice"])
def test_calls_to_the_host_are_taken_out_and_the_order_stays(runtime: StandInRuntime, position: str) -> None:
    """The stand-in runs what nothing orders backwards, so an order that was lost would show."""
    done: list[int] = []
    freed: list[int] = []

    def kernel(number: int) -> None:
        runtime.do(lambda: done.append(number))

    def free() -> None:
        runtime.do(lambda: freed.append(1), Kind.cudaGraphNodeTypeHost)

    calls = [lambda: kernel(0), lambda: kernel(1), lambda: kernel(2)]
    for index in {"first": [0], "middle": [1], "last": [3], "twice": [1, 1]}[position]:
        calls.insert(index, free)
    recording = Recording(Gpu(), calls, [], [], eager_runs=0)
    recording()
    freed.clear()  # by the calls that a replay is compared with
    done.clear()
    recording()
    assert done == [0, 1, 2]
    assert freed == []
    assert recording.nodes == {"kernel": 3}


def test_recording_that_breaks_is_told_and_everything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = StandInRuntime(captures=False)
    monkeypatch.setattr(cuda, "runtime", runtime)
    done: list[int] = []
    recording = Recording(Gpu(), [lambda: runtime.do(lambda: done.append(1))], [], [], eager_runs=1)
    for _ in range(3):
        recording()
    assert done == [1] * 3
    assert runtime.launches == 0
    assert recording.note is not None
    assert "cudaErrorStreamCaptureInvalidated" in recording.note


def test_call_that_fails_while_it_is_recorded_is_told(runtime: StandInRuntime) -> None:
    gpu = Gpu()
    recording = Recording(gpu, [gpu.synchronize], [], [], eager_runs=1)
    recording()
    recording()
    assert recording.note is not None
    assert "cudaErrorStreamCaptureUnsupported" in recording.note
    assert runtime.recorded is None


def test_casts_compile_without_a_gpu() -> None:
    pytest.importorskip("nvidia.cu13", reason="no NVRTC here; it comes with qlip-export[onnxruntime-gpu]")
    assert compile_kernels("sm_90")[:4] == b"\x7fELF"
    with pytest.raises(QlipError, match="sm_1"):
        compile_kernels("sm_1")


def test_compiler_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object) -> None:
        raise RuntimeError('Failure finding "libnvrtc.so.13"')

    monkeypatch.setattr(cuda.nvrtc, "nvrtcCreateProgram", missing)
    with pytest.raises(QlipError, match=r"libnvrtc\.so\.13(.|\n)*pip install nvidia-cuda-nvrtc"):
        compile_kernels("sm_90")
