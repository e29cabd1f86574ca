"""Engines of TensorRT and TensorRT-RTX at run time: device buffers, one stream, one scratch memory for all.

Written after the documented API and held to its types. Nobody has executed an engine with it yet: the tests
run it with a stand-in for the library.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from numpy.typing import NDArray

from qlip_export.backends import tensorrt_builder as shared
from qlip_export.backends.base import Backend, Buffer, Engine
from qlip_export.compiled import EngineEntry, TargetEntry
from qlip_export.errors import QlipError
from qlip_export.spec import DType

if TYPE_CHECKING:
    from qlip_export.backends.cuda import DeviceBuffer, Gpu, Recording


class Scratch:
    """Memory that an engine needs while it runs.

    Engines run one after the other on one stream, so the need of the largest serves all. Whoever starts an
    engine holds ``lock``: the memory must not move between its being told and its use.
    """

    def __init__(self, gpu: Gpu, on_move: Callable[[], None]) -> None:
        """Allocate nothing yet; ``on_move`` is called when engines that were recorded hold an old address."""
        self.lock = threading.Lock()
        self.buffer: DeviceBuffer | None = None
        self._gpu = gpu
        self._on_move = on_move

    def require(self, size: int) -> None:
        """Make it at least ``size`` bytes.

        Raises:
            QlipError: The memory of the GPU is used up.
        """
        with self.lock:
            if size <= (self.buffer.size if self.buffer is not None else 0):
                return
            self._gpu.synchronize()
            self._on_move()
            self.buffer = None  # first, so that both are never there at once
            self.buffer = self._gpu.allocate((size,), "int8")


class TensorRtEngine(Engine):
    """An engine with its execution context, which gets addresses and a stream and returns at once."""

    def __init__(
        self, library: shared.Library, plan: bytes, gpu: Gpu, scratch: Scratch, *, host_code: bool
    ) -> None:
        """Load an engine.

        Args:
            library: The vendor's module.
            plan: The engine file's bytes.
            gpu: Whose stream it runs on.
            scratch: What it shares with the other engines.
            host_code: Whether the engine brings the code that loads it (`--version-compat`).

        Raises:
            QlipError: The library refuses it.
        """
        self._gpu, self._scratch = gpu, scratch
        self._messages = shared.Messages()
        self._log = shared.logger(library, self._messages)
        runtime = library.Runtime(self._log)
        if host_code:
            runtime.engine_host_code_allowed = True
        engine = shared.maybe(runtime.deserialize_cuda_engine(plan))
        if engine is None:
            raise QlipError("the engine cannot be loaded", found=self._messages.text)
        user_managed = library.ExecutionContextAllocationStrategy.USER_MANAGED
        context = shared.maybe(engine.create_execution_context(user_managed))
        if context is None:
            raise QlipError("the engine cannot be prepared to run", found=self._messages.text)
        self._engine, self._context = engine, context
        self._inputs = {
            name
            for name in map(engine.get_tensor_name, range(engine.num_io_tensors))
            if engine.get_tensor_mode(name) == library.TensorIOMode.INPUT
        }
        self._buffers: dict[str, DeviceBuffer] = {}
        self._told: DeviceBuffer | None = None
        scratch.require(engine.device_memory_size_v2)

    def bind(self, name: str, buffer: Buffer) -> None:
        """See `Engine.bind`."""
        if name in self._inputs:
            self._check(self._context.set_input_shape(name, buffer.shape), f"refuses {name}: {buffer.shape}")
        self._check(self._context.set_tensor_address(name, buffer.pointer), f"has no {name}")
        self._buffers[name] = buffer  # the context holds the address alone

    def run(self) -> None:
        """See `Engine.run`."""
        self._gpu.activate()
        with self._scratch.lock:
            memory = self._scratch.buffer
            if memory is not None and memory is not self._told:
                self._context.set_device_memory(memory.pointer, memory.size)
                self._told = memory
            self._check(self._context.execute_async_v3(int(self._gpu.stream)), "does not start")

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise QlipError(f"the engine {what}", found=self._messages.text)


class TensorRtRuntime(Backend):
    """The half of a backend that runs engines; what compiles them extends it."""

    title: ClassVar[str]
    budgets = False
    graphs = True
    """Whether a bit pattern becomes one CUDA graph, once a replay gave what its engines give."""

    @property
    def library(self) -> shared.Library:
        """The vendor's module."""
        raise NotImplementedError

    @cached_property
    def gpu(self) -> Gpu:
        """The first GPU."""
        from qlip_export.backends.cuda import Gpu

        return Gpu()

    @cached_property
    def _scratch(self) -> Scratch:
        return Scratch(self.gpu, self._forget_recordings)

    @cached_property
    def _recordings(self) -> weakref.WeakSet[Recording]:
        return weakref.WeakSet()

    @cached_property
    def _loading(self) -> threading.Lock:
        return threading.Lock()

    _made = "an engine that this library and this GPU load"
    _rebuild: str | None = None
    _host_code = False

    def require_device(self) -> None:
        """See `Backend.require_device`."""
        try:
            from qlip_export.backends.cuda import gpu_count
        except ImportError as error:
            raise QlipError(
                f"running engines of {self.title} takes cuda-bindings",
                found=str(error),
                fix=f'pip install "qlip-export[{self.name}]"',
            ) from error
        if gpu_count() == 0:
            raise QlipError(
                f"engines of {self.title} run on NVIDIA GPUs; none is at hand",
                expected="a GPU and its driver",
                found="none",
                fix="choose another --backend",
            )

    def check_target(self, target: TargetEntry, rebuild: str) -> None:
        """See `Backend.check_target`; remembers both sides for what a single engine may run into."""
        self._made = f"{self.title} {target.version} for {target.device}"
        self._rebuild = rebuild
        self._host_code = bool(target.options.get("version_compat"))

    def check_plan(self, path: Path, plan: bytes) -> None:
        """Make sure that the library loads an engine here, if it can tell.

        Raises:
            QlipError: It does not; names both sides.
        """
        return None

    def load(self, path: Path, entry: EngineEntry) -> Engine:
        """See `Backend.load`."""
        with self._loading:  # `cached_property` makes two of them for two threads
            self.require_device()
            gpu, scratch = self.gpu, self._scratch
        gpu.activate()
        plan = path.read_bytes()
        self.check_plan(path, plan)
        try:
            return TensorRtEngine(self.library, plan, gpu, scratch, host_code=self._host_code)
        except QlipError as error:
            raise QlipError(
                f"{path.name}: {error.problem}",
                expected=self._made,
                found=f"{self.title} on {gpu.name}: {error.found}",
                fix=error.fix or self._rebuild,
            ) from error

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Buffer:
        """See `Backend.allocate`."""
        return self.gpu.allocate(shape, dtype)

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """See `Backend.write`."""
        self.gpu.write(buffer, array)

    def read(self, buffer: Buffer) -> NDArray[Any]:
        """See `Backend.read`."""
        return self.gpu.read(buffer)

    def cast(self, source: Buffer, target: Buffer) -> None:
        """See `Backend.cast`."""
        self.gpu.cast(source, target)

    def synchronize(self) -> None:
        """See `Backend.synchronize`."""
        self.gpu.synchronize()

    def sequence(
        self, calls: Sequence[Callable[[], None]], inputs: Sequence[Buffer], outputs: Sequence[Buffer]
    ) -> Callable[[], None]:
        """See `Backend.sequence`: one CUDA graph."""
        if not self.graphs:
            return super().sequence(calls, inputs, outputs)
        from qlip_export.backends.cuda import Recording

        recording = Recording(self.gpu, calls, inputs, outputs)
        self._recordings.add(recording)
        return recording

    def _forget_recordings(self) -> None:
        for recording in self._recordings:
            recording.forget()

    @property
    def notes(self) -> list[str]:
        """See `Backend.notes`: steps without a CUDA graph."""
        return list(dict.fromkeys(r.note for r in self._recordings if r.note is not None))
