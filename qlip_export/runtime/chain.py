"""Block engines run one after the other, sharing buffers: the denoiser at any choice of bits per block.

Every value between blocks has one buffer for each dtype that some variant reads or writes. Engines are bound
to them once, when they are loaded; a step then only starts engines. Where neighbours disagree about the dtype
(an FP32 block after a BF16 one), the plan of that bit pattern contains a cast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np
from numpy.typing import NDArray

from qlip_export.backends.base import Backend, Buffer, Engine
from qlip_export.bundle import BlockEntry, Bundle, EngineEntry
from qlip_export.errors import QlipError
from qlip_export.runtime.targets import Target
from qlip_export.spec import DType, variant_name

Pattern = tuple[str, ...]
"""Name of the variant that every block runs, in the order of the chain."""


class Chain:
    """The denoiser of a bundle."""

    def __init__(self, bundle: Bundle, target: Target) -> None:
        """Prepare buffers lazily; no engine is loaded yet."""
        self.blocks = bundle.manifest.blocks
        self._bundle = bundle
        self._target = target.entry
        self._backend = target.backend
        self._engines: dict[tuple[str, str], Engine] = {}
        self._buffers: dict[tuple[str, DType], Buffer] = {}
        self._plans: dict[Pattern, Callable[[], None]] = {}
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
        missing: dict[tuple[str, str], EngineEntry] = {}
        patterns = list(patterns)
        for pattern in patterns:
            for block, variant in zip(self.blocks, pattern, strict=True):
                if (block.name, variant) not in self._engines:
                    missing[block.name, variant] = self._engine_entry(block, variant)
        # Hashing and loading are single-threaded and leave the interpreter free: two at a time.
        with ThreadPoolExecutor(max_workers=2) as pool:
            loaded = pool.map(self._load, missing.values())
            for (key, entry), engine in zip(missing.items(), loaded, strict=True):
                self._bind(engine, entry)
                self._engines[key] = engine
        for pattern in patterns:
            if pattern not in self._plans:
                self._plans[pattern] = self._backend.sequence(self._plan(pattern))

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

    def step(self, latents: NDArray[np.float32], timestep: float, pattern: Pattern) -> NDArray[np.float32]:
        """Run the denoiser once.

        Args:
            latents: (rows, C, H, W) float32; two rows an image where guidance is classifier-free, the
                unconditional half first.
            timestep: As the sampler table gives it.
            pattern: Variant of every block; its engines must be loaded.

        Returns:
            The prediction, (rows, C, H, W) float32.
        """
        for (name, _), buffer in self._buffers.items():
            if name == "latents":
                self._backend.write(buffer, latents)
            elif name == "timestep":
                self._backend.write(buffer, np.array([timestep], dtype=np.float32))
        self._plans[pattern]()
        (output,) = self.blocks[-1].outputs
        dtype = self._engine_entry(self.blocks[-1], pattern[-1]).outputs[0].dtype
        result: NDArray[np.float32] = self._backend.read(self._buffers[output, dtype])
        return result

    def time_blocks(
        self, repeats: int, on_repeat: Callable[[], None] = lambda: None
    ) -> dict[str, dict[str, float]]:
        """Return the median seconds of every variant of every block, on whatever its inputs hold.

        The repeats are interleaved: what disturbs the machine for a while disturbs all of them. One more
        comes first and is thrown away; ``on_repeat`` is called before each.
        """
        names = [[*block.variants] for block in self.blocks]
        most = max(map(len, names))
        self.load(tuple(of[min(i, len(of) - 1)] for of in names) for i in range(most))
        seconds: dict[tuple[str, str], list[float]] = {
            (block.name, variant): [] for block in self.blocks for variant in block.variants
        }
        for repeat in range(repeats + 1):
            on_repeat()
            for key, found in seconds.items():
                engine = self._engines[key]
                before = time.perf_counter()
                engine.run()
                self._backend.synchronize()
                if repeat:  # the first warms up
                    found.append(time.perf_counter() - before)
        return {
            block.name: {variant: median(seconds[block.name, variant]) for variant in block.variants}
            for block in self.blocks
        }

    def _engine_entry(self, block: BlockEntry, variant: str) -> EngineEntry:
        entry = block.variants.get(variant)
        if entry is None:
            raise QlipError(
                f"block {block.name} has no variant {variant}",
                expected=" or ".join([*block.variants][:5]),
                found=variant,
                fix="build the bundle with --granularity block for uniform bits",
            )
        return self._bundle.engine(self._target, entry.onnx)

    def _load(self, entry: EngineEntry) -> Engine:
        return self._backend.load(self._bundle.file(entry.path), entry)

    def _bind(self, engine: Engine, entry: EngineEntry) -> None:
        for port in (*entry.inputs, *entry.outputs):
            key = (port.name, port.dtype)
            if key not in self._buffers:
                self._buffers[key] = self._backend.allocate(port.shape, port.dtype)
                if port.name in self._held:
                    self._backend.write(self._buffers[key], self._held[port.name])
            engine.bind(port.name, self._buffers[key])

    def _plan(self, pattern: Pattern) -> list[Callable[[], None]]:
        plan: list[Callable[[], None]] = []
        ready: dict[str, list[DType]] = {}
        for block, variant in zip(self.blocks, pattern, strict=True):
            entry = self._engine_entry(block, variant)
            for port in entry.inputs:
                if port.name in self._external or port.dtype in ready[port.name]:
                    continue
                source = self._buffers[port.name, ready[port.name][0]]
                target = self._buffers[port.name, port.dtype]
                plan.append(_cast(self._backend, source, target))
                ready[port.name].append(port.dtype)
            plan.append(self._engines[block.name, variant].run)
            for port in entry.outputs:
                ready[port.name] = [port.dtype]
        return plan


def _cast(backend: Backend, source: Buffer, target: Buffer) -> Callable[[], None]:
    return lambda: backend.cast(source, target)
