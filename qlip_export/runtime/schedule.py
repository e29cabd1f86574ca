"""The variant of every block at every step, known from the qualities of a batch before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from qlip_export.bundle import best_fast_option
from qlip_export.errors import QlipError
from qlip_export.manifest import BlockEntry
from qlip_export.policy.table import DecisionTable
from qlip_export.runtime.chain import Pattern
from qlip_export.spec import variant_name
from qlip_export.variants.dispatch import Dispatch
from qlip_export.variants.plan import units_of_blocks


class Scheduler:
    """Chooses the variants of a denoiser's blocks by a policy."""

    def __init__(self, table: DecisionTable, blocks: Sequence[BlockEntry]) -> None:
        """Prepare the lookup.

        Every layer gets at least the bits that its unit asks for: a block runs the variant with the fewest
        bits that has them. A block whose layers follow no unit (the timestep embedding, which is FP32 at
        every option) runs at `best_fast_option`, as it does in uniform runs, or at the only one it has.

        Args:
            table: The policy's decision table; a unit is a block, or a layer.
            blocks: The denoiser's blocks.

        Raises:
            QlipError: A unit is neither block nor layer.
        """
        self._table = table
        layers = {block.name: [layer.name for layer in block.quantized] for block in blocks}
        parts = {part: block.name for block in blocks for part in block.parts}
        units = units_of_blocks(table, layers, parts)
        idle = variant_name(best_fast_option(table.options))
        self._choices: list[tuple[list[str], Dispatch | None]] = []
        for block in blocks:
            if all(unit is None for unit in units[block.name]):
                self._choices.append(([idle if idle in block.variants else min(block.variants)], None))
                continue
            names = [*block.variants]
            bits = np.array([block.layer_bits(name) for name in names], dtype=np.uint8)
            dispatch = Dispatch(table, units[block.name], bits, bits.sum(axis=1, dtype=np.float64))
            self._choices.append((names, dispatch))

    def __call__(self, qualities: Sequence[float]) -> list[Pattern]:
        """Look up the whole run of one batch.

        Args:
            qualities: q of every prompt in the batch, in (0, 1).

        Returns:
            One pattern for each sampling step.

        Raises:
            QlipError: No qualities, one that is not in [0, 1], or no variant has the bits that are needed.
        """
        if not qualities or not all(0 <= q <= 1 for q in qualities):
            raise QlipError(
                "no bits for these qualities", expected="one or more in [0, 1]", found=str(qualities)
            )
        known: dict[tuple[int, bool], Pattern] = {}
        patterns = []
        for step, group in enumerate(self._table.group_of_step):
            key = (group, step < self._table.forced_steps)
            if key not in known:
                known[key] = tuple(
                    names[dispatch.choose(qualities, step) if dispatch else 0]
                    for names, dispatch in self._choices
                )
            patterns.append(known[key])
        return patterns


def layer_bits(blocks: Sequence[BlockEntry], patterns: Sequence[Pattern]) -> NDArray[np.uint8]:
    """Return the bits of every quantized layer at every step, (steps, layers), in the order of the chain."""
    known = {
        pattern: np.array(
            [bits for block, name in zip(blocks, pattern, strict=True) for bits in block.layer_bits(name)],
            dtype=np.uint8,
        )
        for pattern in dict.fromkeys(patterns)
    }
    return np.stack([known[pattern] for pattern in patterns])


def block_bits(block: BlockEntry, variant: str) -> float:
    """Return the bits of a block: those of all its layers, or their mean where they differ."""
    entry = block.variants[variant]
    return entry.bits if entry.layers is None else round(sum(entry.layers) / len(entry.layers), 2)


def feature_average_bits(blocks: Sequence[BlockEntry], patterns: Sequence[Pattern]) -> float:
    """Return FAB: the mean activation bits over quantized layers and steps (QLIP, metrics)."""
    return float(layer_bits(blocks, patterns).mean())


def engine_switches(patterns: Sequence[Pattern]) -> int:
    """Return how often a block runs another variant than in the step before, over blocks and steps."""
    return sum(a != b for before, after in pairwise(patterns) for a, b in zip(before, after, strict=True))
