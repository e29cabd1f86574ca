"""What every engine of a target takes on this machine, and which variants are therefore not worth running."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from qlip_export.bundle import Bundle
from qlip_export.compiled import TargetEntry, TimingEntry
from qlip_export.errors import QlipError
from qlip_export.manifest import BlockEntry
from qlip_export.progress import Progress
from qlip_export.runtime.chain import Chain
from qlip_export.runtime.targets import choose_target
from qlip_export.workspace import Workspace

SECONDS = 10.0
"""What timing may take, roughly, unless `LEAST` repeats take longer."""
LEAST, MOST = 5, 25
"""Repeats of every engine."""
MARGIN = 0.1
"""A variant is dominated if another takes less than 1 - MARGIN of its time: less is noise."""


def time_target(
    root: Path, backend: str, progress: Progress, *, keep_dominated: bool = False
) -> TimingEntry | None:
    """Time every engine of a target and keep the milliseconds, and what they mean, in the manifest.

    Times that are there already are those of the same engines and are kept. Where the engines do not run
    here, this is said and nothing is written.

    Args:
        root: The bundle.
        backend: Whose engines.
        progress: Display.
        keep_dominated: Run variants although others of at least their bits are faster.

    Returns:
        What is in the manifest now.

    Raises:
        QlipError: No bundle, or it has no such engines.
    """
    wait = f"another build is writing {root}; waiting for it"
    with Workspace.open_target(root, backend, lambda: progress.note(wait)) as workspace:
        bundle = Bundle.open(root)
        try:
            target = choose_target(bundle, backend)
        except QlipError as error:
            progress.note(f"not timed: {error.problem}")
            return None
        sizes, held = bundle.manifest.sizes, target.entry.profile
        known = target.entry.timing
        if known is not None:
            milliseconds, repeats = known.milliseconds, known.repeats
        else:
            milliseconds, repeats = {}, MOST
            if held:  # one set of engines, timed in the size that it is tuned for
                own = bundle.manifest.shapes.sizes
                best = {axis: held[axis].opt if axis in held else n for axis, n in own.items()}
                sizes = (bundle.manifest.resized(best),)
            for size in sizes:
                one = bundle.narrowed(size)
                entry = size.targets[target.name]
                found, times = _measure(one, Chain(one, replace(target, entry=entry)), progress)
                milliseconds, repeats = milliseconds | found, min(repeats, times)
        instead = {
            size.shapes.label: {} if keep_dominated else dominated(size.blocks, milliseconds)
            for size in (bundle.manifest.sizes[:1] if held else bundle.manifest.sizes)
        }
        timing = TimingEntry(
            milliseconds=milliseconds,
            repeats=repeats,
            instead=instead.pop(bundle.manifest.shapes.label),
            other_sizes=instead,
        )
        if timing != known:
            timed_entry: TargetEntry = target.entry.model_copy(update={"timing": timing})
            workspace.replace_target(bundle.manifest, target.name, timed_entry)
    return timing


def _measure(bundle: Bundle, chain: Chain, progress: Progress) -> tuple[dict[str, float], int]:
    """Return the median milliseconds of every engine of a block by its ONNX file, and how often each ran."""
    manifest = bundle.manifest
    rng = np.random.default_rng(0)
    noise = {t.name: rng.standard_normal(t.shape).astype(np.float32) for t in manifest.inputs}
    patterns = chain.every_variant()
    progress.stage("load", len(patterns))
    chain.load(patterns)
    for name in noise.keys() - {"latents", "timestep"}:
        chain.hold(name, noise[name])
    seconds = 0.0
    for pattern in patterns:
        progress.item(pattern[-1])
        # Twice: the buffers shall hold what a run would leave there, and the first call is no measure.
        for _ in range(2):
            before = time.perf_counter()
            chain.step(noise["latents"], 500.0, pattern)
            took = time.perf_counter() - before
        seconds += took
    repeats = max(LEAST, min(MOST, int(SECONDS / seconds)))
    progress.stage("time", repeats + 1)
    times = chain.time_blocks(repeats, lambda: progress.item("every engine in turn"))
    return {
        block.variants[name].onnx: round(1000 * found, 4)
        for block in manifest.blocks
        for name, found in times[block.name].items()
    }, repeats


def dominated(blocks: tuple[BlockEntry, ...], milliseconds: Mapping[str, float]) -> dict[str, dict[str, str]]:
    """Return the variants that are slower than another of at least their bits, and the fastest such.

    Args:
        blocks: The denoiser's.
        milliseconds: Of every variant, by its ONNX file; others are not looked at.

    Returns:
        By block and by the name of the variant.
    """
    found: dict[str, dict[str, str]] = {}
    for block in blocks:
        timed = {name: v for name, v in block.variants.items() if v.onnx in milliseconds}
        for name, variant in timed.items():
            at_least = [other for other in timed if _covers(block, other, name)]
            best = min(at_least, key=lambda other: milliseconds[timed[other].onnx])
            if milliseconds[timed[best].onnx] < (1 - MARGIN) * milliseconds[variant.onnx]:
                found.setdefault(block.name, {})[name] = best
    return found


def _covers(block: BlockEntry, other: str, name: str) -> bool:
    """Return whether every layer has at least the bits in variant ``other`` that it has in ``name``."""
    if block.variants[other].bits < block.variants[name].bits:
        return False
    pairs = zip(block.layer_bits(other), block.layer_bits(name), strict=True)
    return all(more >= bits for more, bits in pairs)
