"""What a policy asks for over many prompts, without drawing them: figures S1, S3 and S4 of the paper."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from qlip_export.errors import QlipError
from qlip_export.manifest import Manifest
from qlip_export.runtime.chain import Pattern
from qlip_export.runtime.schedule import Scheduler, feature_average_bits
from qlip_export.spec import Frozen

BATCHES = (1, 2, 4, 8, 16, 32)
DRAWS = 24
"""Random batches of each size."""

LEVELS = (
    "1: name",
    "2: name, keyword",
    "3: name, style",
    "4: sentence with style",
    "5: sentence with two keywords",
)
"""What every fifth line of a model's richness.txt holds, from the plainest prompt to the richest."""


class Level(Frozen):
    """Prompts of equal richness."""

    label: str
    q: tuple[float, ...]
    fab: tuple[float, ...]


class BatchSize(Frozen):
    """FAB of random batches of one size: mean, least and most."""

    size: int
    mean: float
    least: float
    most: float


class Share(Frozen):
    """How often a block, with the layers in it that follow the bit options, runs at each of them."""

    block: str
    layers: int
    shares: dict[int, float] = Field(description="bits -> share of all prompts and steps, summing to 1")


class PolicyStatistics(Frozen):
    """A policy over many prompts."""

    prompts: int
    source: str = Field(description="where these prompts come from")
    q: tuple[float, ...]
    fab: tuple[float, ...] = Field(description="of each prompt by itself")
    shares: tuple[Share, ...]
    batches: tuple[BatchSize, ...]
    ladder: bool = Field(description="whether richness has levels of its own; else words are counted")
    richness: tuple[Level, ...]


def statistics(
    manifest: Manifest, qualities: Sequence[float], source: str, richness: Sequence[Level], ladder: bool
) -> PolicyStatistics:
    """Look up the schedule of every quality, alone and in batches.

    Raises:
        QlipError: The bundle has no policy.
    """
    schedule = _scheduler(manifest)
    schedules = [schedule([q]) for q in qualities]
    return PolicyStatistics(
        prompts=len(qualities),
        source=source,
        q=tuple(qualities),
        fab=tuple(feature_average_bits(manifest.blocks, patterns) for patterns in schedules),
        shares=_shares(manifest, schedules),
        batches=_batches(manifest, np.array(qualities)),
        ladder=ladder,
        richness=tuple(richness),
    )


def ladder_levels(manifest: Manifest, qualities: Sequence[float]) -> list[Level]:
    """Return the levels of a richness file whose lines have ``qualities``."""
    return [_level(manifest, label, qualities[i :: len(LEVELS)]) for i, label in enumerate(LEVELS)]


def word_levels(manifest: Manifest, prompts: Sequence[str], qualities: Sequence[float]) -> list[Level]:
    """Return prompts as levels, by their number of words."""
    by_words: dict[int, list[float]] = defaultdict(list)
    for prompt, q in zip(prompts, qualities, strict=True):
        by_words[len(prompt.split())].append(q)
    return [_level(manifest, str(words), by_words[words]) for words in sorted(by_words)]


def _level(manifest: Manifest, label: str, qualities: Sequence[float]) -> Level:
    schedule = _scheduler(manifest)
    fab = [feature_average_bits(manifest.blocks, schedule([q])) for q in qualities]
    return Level(label=label, q=tuple(qualities), fab=tuple(fab))


def _scheduler(manifest: Manifest) -> Scheduler:
    if manifest.policy is None:
        raise QlipError("the bundle has no policy", fix="build it with --policy auto")
    return Scheduler(manifest.policy.table, manifest.blocks)


def _shares(manifest: Manifest, schedules: Sequence[Sequence[Pattern]]) -> tuple[Share, ...]:
    counts = [Counter[int]() for _ in manifest.blocks]
    for patterns in schedules:
        for pattern in patterns:
            for block, count, variant in zip(manifest.blocks, counts, pattern, strict=True):
                count.update(block.layer_bits(variant))
    found = []
    for block, count in zip(manifest.blocks, counts, strict=True):
        if layers := len(block.quantized):
            shares = {bits: times / count.total() for bits, times in sorted(count.items())}
            found.append(Share(block=block.name, layers=layers, shares=shares))
    return tuple(found)


def _batches(manifest: Manifest, qualities: NDArray[np.float64]) -> tuple[BatchSize, ...]:
    """Return FAB by batch size: one prompt by itself is its own batch, larger ones are drawn at random."""
    generator, schedule = np.random.default_rng(0), _scheduler(manifest)
    found = []
    for size in (size for size in BATCHES if size <= len(qualities)):
        batches = (
            qualities[:, None]
            if size == 1
            else np.stack([generator.choice(qualities, size, replace=False) for _ in range(DRAWS)])
        )
        fab = [feature_average_bits(manifest.blocks, schedule(list(batch))) for batch in batches]
        found.append(BatchSize(size=size, mean=sum(fab) / len(fab), least=min(fab), most=max(fab)))
    return tuple(found)
