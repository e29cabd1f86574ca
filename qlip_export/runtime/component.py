"""Text encoder, VAE decoder or policy: one engine with buffers of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlip_export.backends.base import Buffer, Engine
from qlip_export.bundle import ComponentEntry, EngineEntry
from qlip_export.runtime.engines import Engines
from qlip_export.runtime.targets import Target


class Component:
    """A part of a bundle that has no bit options; its engine is loaded at the first call.

    Attributes:
        key: Of its engine among the `Engines`.
        before: Called before each run; afterwards the engine is loaded or may be.
    """

    def __init__(self, entry: ComponentEntry, target: Target, engines: Engines) -> None:
        """Allocate nothing yet."""
        self.key = entry.onnx
        self.before: Callable[[], None] = lambda: None
        self._backend = target.backend
        self._engines = engines
        self._buffers: dict[str, Buffer] = {}

    @property
    def buffer_bytes(self) -> int:
        """Bytes of its buffers, once it has run."""
        entry = self._engines.entry(self.key)
        return sum(port.nbytes for port in (*entry.inputs, *entry.outputs))

    def prepare(self) -> str:
        """Make its buffers, so that its engine can be loaded; return the engine's key."""
        if not self._buffers:
            entry = self._engines.entry(self.key)
            for port in (*entry.inputs, *entry.outputs):
                self._buffers[port.name] = self._backend.allocate(port.shape, port.dtype)
            self._engines.expect(self.key, self._bind)
        return self.key

    def load(self) -> None:
        """Load the engine, unless it is loaded."""
        if self.key not in self._engines:
            self._engines.ensure([self.prepare()])

    def __call__(self, **inputs: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """Run the engine on ``inputs``, of its static shapes, and return its outputs by name."""
        self.before()
        self.load()
        for name, array in inputs.items():
            self._backend.write(self._buffers[name], array)
        self._engines[self.key].run()
        entry = self._engines.entry(self.key)
        return {port.name: self._backend.read(self._buffers[port.name]) for port in entry.outputs}

    def _bind(self, engine: Engine, entry: EngineEntry) -> None:
        for port in (*entry.inputs, *entry.outputs):
            engine.bind(port.name, self._buffers[port.name])
