"""The variants of every block of a denoiser for one policy, and what they are expected to cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlip_export.errors import QlipError
from qlip_export.policy.table import DecisionTable
from qlip_export.variants.merge import Merger, bits_of, cheapest
from qlip_export.variants.reachable import Bits, demand, edges_of, staircase, steps_of

EXACT = 2**31
"""As a number of variants: one for every pattern that can be asked for."""


def units_of_blocks(
    table: DecisionTable, blocks: Mapping[str, Sequence[str]], parts: Mapping[str, str] | None = None
) -> dict[str, list[int | None]]:
    """Return for each layer of each block the index of the unit that decides over it.

    Args:
        table: The policy; its units are blocks or layers.
        blocks: The quantized layers of every block.
        parts: Blocks that were fused, and what into.

    Raises:
        QlipError: A unit is neither block nor layer.
    """
    index = {unit: i for i, unit in enumerate(table.units)}
    known = {*blocks, *(layer for layers in blocks.values() for layer in layers), *(parts or {})}
    if strangers := index.keys() - known:
        raise QlipError(
            "the policy decides over what the bundle does not have",
            found=min(strangers),
            fix="build the bundle again",
        )
    of_block = {block: index[block] for block in blocks if block in index}
    for part, block in (parts or {}).items():
        if part in index:
            of_block.setdefault(block, index[part])  # the parts of a fused block never differ
    return {
        block: [index.get(layer, of_block.get(block)) for layer in layers] for block, layers in blocks.items()
    }


@dataclass(frozen=True)
class VariantPlan:
    """Variants of every block.

    Attributes:
        variants: By block, (V, layers).
        fab: Feature average bits, expected over the calibration prompts.
    """

    variants: dict[str, Bits]
    fab: float

    @property
    def engines(self) -> int:
        """How many engines that takes."""
        return sum(map(len, self.variants.values()))


class Planner:
    """Plans the variants of a denoiser's blocks for one policy."""

    def __init__(
        self,
        table: DecisionTable,
        blocks: Mapping[str, Sequence[str]],
        qualities: Sequence[float],
        *,
        batches: bool = False,
    ) -> None:
        """Enumerate what the policy can ask for.

        Args:
            table: The policy.
            blocks: The quantized layers of every block that has some.
            qualities: q of the calibration prompts.
            batches: Whether prompts share a run, so that their needs are united.

        Raises:
            QlipError: The policy decides over other units.
        """
        edges = edges_of(table)
        units = units_of_blocks(table, blocks)
        self._steps = len(table.group_of_step)
        self._layers = sum(map(len, blocks.values()))
        self.mergers = {
            name: Merger(demand(table, units[name], qualities, edges, batches=batches)) for name in blocks
        }

    def plan(self, counts: int | Mapping[str, int]) -> VariantPlan:
        """Return at most so many variants of each block, or so many of a block by its name."""
        chosen = {
            name: merger.variants(counts if isinstance(counts, int) else counts[name])
            for name, merger in self.mergers.items()
        }
        bits = sum(self.mergers[name].expected(variants) for name, variants in chosen.items())
        return VariantPlan(chosen, bits / (self._steps * self._layers))


def layer_bits(
    table: DecisionTable,
    blocks: Mapping[str, Sequence[str]],
    variants: Mapping[str, Bits],
    qualities: Sequence[float],
) -> dict[str, NDArray[np.uint8]]:
    """Return the bits at which ``variants`` run each layer for prompts of these qualities.

    Each prompt runs alone. Returns (N, steps) by layer.
    """
    units = units_of_blocks(table, blocks)
    q = np.asarray(qualities, dtype=np.float32)
    groups, forced = np.array(table.group_of_step), np.arange(len(table.group_of_step)) < table.forced_steps
    found: dict[str, NDArray[np.uint8]] = {}
    for name, layers in blocks.items():
        run = np.empty((len(q), len(groups), len(layers)), dtype=np.uint8)
        costs = bits_of(variants[name])
        for group, _ in enumerate(steps_of(table)):
            stairs = staircase(table, group, units[name])
            asked = np.concatenate([stairs.patterns, stairs.forced[None]])
            served = variants[name][cheapest(variants[name], asked, costs)]
            state = np.searchsorted(stairs.thresholds, q, side="right")
            run[:, (groups == group) & ~forced] = served[state][:, None]
            run[:, (groups == group) & forced] = served[-1]
        found.update({layer: run[..., i] for i, layer in enumerate(layers)})
    return found
