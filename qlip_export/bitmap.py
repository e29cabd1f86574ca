"""Bits by block and step: what to show of a run, its colours, and the same in words."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from qlip_export.manifest import Manifest

PALETTE = ("#7fc8f8", "#ffd166", "#f9844a", "#c2255c")
"""From few bits to many; told apart by the colour-blind, and readable on white and on black."""


@dataclass(frozen=True)
class BitMap:
    """The bits of a run.

    Attributes:
        blocks: Names of the blocks in which some layer follows the bit options.
        rows: ``rows[block][step]``; the mean where the layers of a block differ.
    """

    blocks: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]

    @property
    def words(self) -> str:
        """The map as text."""
        told = (f"{block}: {_runs(row)}" for block, row in zip(self.blocks, self.rows, strict=True))
        return f"Bits by block and step. {'; '.join(told)}."


def bit_map(manifest: Manifest, record: dict[str, Any]) -> BitMap:
    """Return the map of a run, from what the run time tells of it: ``blocks`` and ``bits[step][block]``."""
    follows = {b.name for b in manifest.blocks if any(layer.quantized for layer in b.layers)}
    kept = [i for i, name in enumerate(record["blocks"]) if name in follows]
    return BitMap(
        blocks=tuple(record["blocks"][i] for i in kept),
        rows=tuple(tuple(step[i] for step in record["bits"]) for i in kept),
    )


def options_of(manifest: Manifest) -> list[int]:
    """Return all bits that a run may show, increasing."""
    return sorted({*manifest.bits, *(manifest.policy.table.options if manifest.policy else ())})


def colour(bits: float, options: Sequence[int]) -> str:
    """Return the colour of a bit option, or for a mean that of the next option above."""
    rank = bisect_left(options, bits)
    return PALETTE[round(rank * (len(PALETTE) - 1) / max(1, len(options) - 1))]


def _runs(bits: Sequence[float]) -> str:
    """Return bits of consecutive steps in words, e.g. `16 in steps 1 to 2, 8 in steps 3 to 25`."""
    parts, start = [], 1
    for value, run in groupby(bits):
        length = len(list(run))
        end = start + length - 1
        parts.append(f"{value:g} in step {start}" if length == 1 else f"{value:g} in steps {start} to {end}")
        start = end + 1
    return ", ".join(parts)
