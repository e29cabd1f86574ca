"""The bits of every block at every step, known from the qualities of a batch before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from qlip_export.bundle import BlockEntry, best_fast_option
from qlip_export.errors import QlipError
from qlip_export.policy.table import DecisionTable
from qlip_export.runtime.chain import BitPattern


def schedule(
    table: DecisionTable, blocks: Sequence[BlockEntry], qualities: Sequence[float]
) -> list[BitPattern]:
    """Look up the whole run of one batch.

    Every unit gets the highest bits that any prompt of the batch asks for (QLIP, section E), and a block runs
    at the highest bits that any of its units got. A block without a unit (the timestep embedding, which is
    FP32 at every option) runs at `best_fast_option`, as it does in uniform runs.

    Args:
        table: The policy's decision table.
        blocks: The denoiser's blocks; a unit is one of them, or one of their layers.
        qualities: q of every prompt in the batch, in (0, 1).

    Returns:
        One pattern for each sampling step.

    Raises:
        QlipError: No qualities, one that is not in [0, 1], or a unit that is neither block nor layer.
    """
    if not qualities or not all(0 <= q <= 1 for q in qualities):
        raise QlipError("no bits for these qualities", expected="one or more in [0, 1]", found=str(qualities))
    owner = {name: i for i, b in enumerate(blocks) for name in (b.name, *(layer.name for layer in b.layers))}
    if strangers := [unit for unit in table.units if unit not in owner]:
        raise QlipError(
            "the policy decides over what the bundle does not have",
            found=strangers[0],
            fix="build the bundle again",
        )
    places = [owner[unit] for unit in table.units]
    idle = best_fast_option(table.options)
    known: dict[tuple[int, bool], BitPattern] = {}
    patterns = []
    for step, group in enumerate(table.group_of_step):
        key = (group, step < table.forced_steps)
        if key not in known:
            highest = [0] * len(blocks)
            for place, bits in zip(places, table.batch_bits(qualities, step), strict=True):
                highest[place] = max(highest[place], bits)
            known[key] = tuple(bits or idle for bits in highest)
        patterns.append(known[key])
    return patterns


def feature_average_bits(blocks: Sequence[BlockEntry], patterns: Sequence[BitPattern]) -> float:
    """Return FAB: the mean activation bits over quantized layers and steps (QLIP, metrics)."""
    layers = [sum(layer.quantized for layer in block.layers) for block in blocks]
    total = sum(n * bits for pattern in patterns for n, bits in zip(layers, pattern, strict=True))
    return total / (sum(layers) * len(patterns))


def engine_switches(patterns: Sequence[BitPattern]) -> int:
    """Return how often a block runs at other bits than in the step before, summed over blocks and steps."""
    return sum(a != b for before, after in pairwise(patterns) for a, b in zip(before, after, strict=True))
