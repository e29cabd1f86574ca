"""Text encoder, VAE decoder or policy: an engine, or several in a row, with buffers of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlip_export.backends.base import Buffer, Engine
from qlip_export.compiled import EngineEntry, TensorEntry
from qlip_export.manifest import ComponentEntry
from qlip_export.runtime.engines import Engines
from qlip_export.runtime.targets import Target


class Component:
    """A part of a bundle that has no bit options; its engines are loaded at the first call.

    Attributes:
        keys: Of its engines among the `Engines`, in the order in which they run.
        before: Called before each engine; afterwards that engine is loaded or may be.
    """

    def __init__(self, entry: ComponentEntry, target: Target, engines: Engines) -> None:
        """Allocate nothing yet."""
        self.keys = entry.graphs
        self.before: Callable[[], None] | None = None
        self._backend = target.backend
        self._engines = engines
        self._buffers: dict[str, Buffer] = {}

    @property
    def buffer_bytes(self) -> int:
        """Bytes of its buffers, once it has run."""
        return sum({port.name: port.nbytes for port in self._ports()}.values())

    def prepare(self) -> tuple[str, ...]:
        """Make its buffers, so that its engines can be loaded; return their keys."""
        if not self._buffers:
            for port in self._ports():
                if port.name not in self._buffers:
                    self._buffers[port.name] = self._backend.allocate(port.shape, port.dtype)
            for key in self.keys:
                self._engines.expect(key, self._bind)
        return self.keys

    def load(self) -> None:
        """Load the engines, unless they are loaded."""
        if missing := [key for key in self.keys if key not in self._engines]:
            self.prepare()
            self._engines.ensure(missing)

    def __call__(self, **inputs: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """Run the engines on ``inputs``, of their static shapes, and return all they write, by name."""
        if self.before is None:
            self.load()
        self.prepare()
        for name, array in inputs.items():
            self._backend.write(self._buffers[name], array)
        for key in self.keys:
            if self.before is not None:
                self.before()
            self._engines[key].run()
        last = dict.fromkeys(port.name for key in self.keys for port in self._engines.entry(key).outputs)
        return {name: self._backend.read(self._buffers[name]) for name in last}

    def _ports(self) -> Iterator[TensorEntry]:
        for key in self.keys:
            entry = self._engines.entry(key)
            yield from (*entry.inputs, *entry.outputs)

    def _bind(self, engine: Engine, entry: EngineEntry) -> None:
        for port in (*entry.inputs, *entry.outputs):
            engine.bind(port.name, self._buffers[port.name])
