"""Block engines run one after the other, sharing buffers: the denoiser at any choice of bits per block.

Every value between blocks has one buffer for each dtype that some variant reads or writes. Engines are bound
to them when they are loaded; a step then only starts engines. Where neighbours disagree about the dtype
(an FP32 block after a BF16 one), the plan of that bit pattern contains a cast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from qlip_export.backends.base import Backend, Buffer, Engine
from qlip_export.bundle import Bundle
from qlip_export.compiled import EngineEntry, TensorEntry
from qlip_export.errors import QlipError
from qlip_export.manifest import BlockEntry
from qlip_export.runtime.engines import Engines
from qlip_export.runtime.targets import Target
from qlip_export.spec import DType, variant_name

Pattern = tuple[str, ...]
"""Name of the variant that every block runs, in the order of the chain."""


class Chain:
    """The denoiser of a bundle."""

    def __init__(self, bundle: Bundle, target: Target, engines: Engines | None = None) -> None:
        """Prepare buffers lazily; no engine is loaded yet. Others may share its ``engines``."""
        self.blocks = bundle.manifest.blocks
        self._bundle = bundle
        self._backend = target.backend
        self._engines = Engines(bundle, target) if engines is None else engines
        self._buffers: dict[tuple[str, DType], Buffer] = {}
        self._plans: dict[Pattern, list[_Call]] = {}
        self._sizes: dict[tuple[str, DType], int] = {}
        self._sequences: dict[Pattern, Callable[[], None]] = {}
        self._drops = 0
        self._external = {t.name for t in bundle.manifest.inputs}
        self._held: dict[str, NDArray[np.float32]] = {}

    def uniform(self, bits: int) -> Pattern:
        """Return the pattern that runs every block at ``bits``."""
        return (variant_name(bits),) * len(self.blocks)

    def load(self, patterns: Iterable[Pattern]) -> None:
        """Load the engines that ``patterns`` need and are not loaded yet.

        Raises:
            QlipError: The bundle has no such variant, or an engine file is damaged.
        """
        patterns = list(patterns)
        self._engines.ensure(self.prepare(patterns))
        if self._drops != self._engines.drops:  # what a backend recorded may start an engine that is gone
            self._drops = self._engines.drops
            self._sequences.clear()
        for pattern in patterns:
            if pattern not in self._sequences:
                calls = [call.run for call in self._plan(pattern)]
                given = [b for (name, _), b in self._buffers.items() if name in self._external]
                self._sequences[pattern] = self._backend.sequence(calls, given, [self._output(pattern)])

    def engines_of(self, patterns: Iterable[Pattern]) -> list[str]:
        """Return the engines that ``patterns`` run, in that order.

        Raises:
            QlipError: The bundle has no such variant.
        """
        return [
            self._variant(block, variant)
            for pattern in patterns
            for block, variant in zip(self.blocks, pattern, strict=True)
        ]

    def prepare(self, patterns: Iterable[Pattern]) -> list[str]:
        """Make the buffers of ``patterns``, so that their engines can be loaded; return those."""
        keys = list(dict.fromkeys(self.engines_of(dict.fromkeys(patterns))))
        for place, port in self._ports(keys):
            if place not in self._buffers:
                buffer = self._buffers[place] = self._backend.allocate(port.shape, port.dtype)
                self._sizes[place] = port.nbytes
                if port.name in self._held:
                    self._backend.write(buffer, self._held[port.name])
        for key in keys:
            self._engines.expect(key, self._bind)
        return keys

    def buffer_bytes(self, keys: Iterable[str], *, alone: bool = False) -> int:
        """Return the bytes of the buffers after engines ``keys`` got theirs; ``alone``, of theirs only."""
        sizes = {} if alone else self._sizes
        return sum((sizes | {place: port.nbytes for place, port in self._ports(keys)}).values())

    def least_buffer_bytes(self) -> int:
        """Return what the buffers of any patterns take at least: each value in its smallest type."""
        least: dict[str, int] = {}
        for _, port in self._ports(self.every_engine()):
            least[port.name] = min(port.nbytes, least.get(port.name, port.nbytes))
        return sum(least.values())

    def keep_buffers(self, keys: Iterable[str]) -> None:
        """Drop all buffers but those of the engines ``keys``; no other engine of the chain may be loaded."""
        kept = {place for place, _ in self._ports(keys)}
        self._buffers = {place: buffer for place, buffer in self._buffers.items() if place in kept}
        self._sizes = {place: size for place, size in self._sizes.items() if place in kept}
        self._plans.clear()
        self._sequences.clear()

    def hold(self, name: str, array: NDArray[np.float32]) -> None:
        """Set an input that stays the same over all steps of a run, e.g. the text states."""
        self._held[name] = array
        for (value, _), buffer in self._buffers.items():
            if value == name:
                self._backend.write(buffer, array)

    @property
    def held(self) -> dict[str, NDArray[np.float32]]:
        """What `hold` was last given, by name."""
        return dict(self._held)

    def step(
        self,
        latents: NDArray[np.float32],
        timestep: float,
        pattern: Pattern,
        before: Callable[[], None] | None = None,
    ) -> NDArray[np.float32]:
        """Run the denoiser once.

        Args:
            latents: (rows, C, H, W) float32; two rows an image where guidance is classifier-free, the
                unconditional half first.
            timestep: As the sampler table gives it.
            pattern: Variant of every block; its engines must be loaded.
            before: Called before each engine; after it, only that one must be loaded.

        Returns:
            The prediction, (rows, C, H, W) float32.
        """
        for (name, _), buffer in self._buffers.items():
            if name == "latents":
                self._backend.write(buffer, latents)
            elif name == "timestep":
                self._backend.write(buffer, np.array([timestep], dtype=np.float32))
        if before is None:
            self._sequences[pattern]()
        else:
            for call in self._plan(pattern):
                if call.starts_engine:
                    before()
                call.run()
        result: NDArray[np.float32] = self._backend.read(self._output(pattern))
        return result

    def time_blocks(
        self, repeats: int, on_repeat: Callable[[], None] = lambda: None
    ) -> dict[str, dict[str, float]]:
        """Return the median seconds of every variant of every block, on whatever its inputs hold.

        The repeats are interleaved: what disturbs the machine for a while disturbs all of them. One more
        comes first and is thrown away; ``on_repeat`` is called before each.
        """
        self.load(self.every_variant())
        seconds: dict[tuple[str, str], list[float]] = {
            (block.name, variant): [] for block in self.blocks for variant in block.variants
        }
        engines = {
            (b.name, variant): entry.onnx for b in self.blocks for variant, entry in b.variants.items()
        }
        for repeat in range(repeats + 1):
            on_repeat()
            for key, found in seconds.items():
                engine = self._engines[engines[key]]
                before = time.perf_counter()
                engine.run()
                self._backend.synchronize()
                if repeat:  # the first warms up
                    found.append(time.perf_counter() - before)
        return {
            block.name: {variant: median(seconds[block.name, variant]) for variant in block.variants}
            for block in self.blocks
        }

    def every_variant(self) -> list[Pattern]:
        """Return patterns that together run every variant of every block, as few as do."""
        names = [[*block.variants] for block in self.blocks]
        return [tuple(of[min(i, len(of) - 1)] for of in names) for i in range(max(map(len, names)))]

    def every_engine(self) -> list[str]:
        """Return the engines of all variants of all blocks."""
        return [entry.onnx for block in self.blocks for entry in block.variants.values()]

    def _variant(self, block: BlockEntry, variant: str) -> str:
        entry = block.variants.get(variant)
        if entry is None:
            raise QlipError(
                f"block {block.name} has no variant {variant}",
                expected=" or ".join([*block.variants][:5]),
                found=variant,
                fix="build the bundle with --granularity block for uniform bits",
            )
        return entry.onnx

    def _ports(self, keys: Iterable[str]) -> Iterator[tuple[tuple[str, DType], TensorEntry]]:
        """Yield the ports of these engines and the places of their buffers."""
        for key in keys:
            entry = self._engines.entry(key)
            for port in (*entry.inputs, *entry.outputs):
                yield (port.name, port.dtype), port

    def _bind(self, engine: Engine, entry: EngineEntry) -> None:
        for port in (*entry.inputs, *entry.outputs):
            engine.bind(port.name, self._buffers[port.name, port.dtype])

    def _output(self, pattern: Pattern) -> Buffer:
        """Return the buffer that the last engine of ``pattern`` writes."""
        (output,) = self._engines.entry(self._variant(self.blocks[-1], pattern[-1])).outputs
        return self._buffers[output.name, output.dtype]

    def _plan(self, pattern: Pattern) -> list[_Call]:
        if pattern in self._plans:
            return self._plans[pattern]
        plan: list[_Call] = []
        ready: dict[str, list[DType]] = {}
        for key in self.engines_of([pattern]):
            entry = self._engines.entry(key)
            for port in entry.inputs:
                if port.name in self._external or port.dtype in ready[port.name]:
                    continue
                source = self._buffers[port.name, ready[port.name][0]]
                target = self._buffers[port.name, port.dtype]
                plan.append(_Call(_cast(self._backend, source, target)))
                ready[port.name].append(port.dtype)
            plan.append(_Call(_start(self._engines, key), starts_engine=True))
            for port in entry.outputs:
                ready[port.name] = [port.dtype]
        self._plans[pattern] = plan
        return plan


@dataclass(frozen=True)
class _Call:
    run: Callable[[], None]
    starts_engine: bool = False


def _start(engines: Engines, key: str) -> Callable[[], None]:
    # An engine may be dropped and loaded again between two steps.
    return lambda: engines[key].run()


def _cast(backend: Backend, source: Buffer, target: Buffer) -> Callable[[], None]:
    return lambda: backend.cast(source, target)
