"""Which variant of a block runs: a binary search in q, prepared once for each timestep group."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlip_export.errors import QlipError
from qlip_export.policy.table import DecisionTable
from qlip_export.variants.merge import cheapest
from qlip_export.variants.reachable import Bits, staircase


@dataclass(frozen=True)
class _Group:
    thresholds: list[float]
    patterns: Bits
    forced_pattern: Bits
    serving: list[int]
    forced: int


class Dispatch:
    """Chooses among the variants of one block."""

    def __init__(
        self,
        table: DecisionTable,
        units: Sequence[int | None],
        variants: Bits,
        costs: NDArray[np.float64],
    ) -> None:
        """Find for all that the policy can ask for what it asks for, or the cheapest variant that covers it.

        Args:
            table: The policy.
            units: For each quantized layer of the block the index of its unit.
            variants: (V, layers).
            costs: (V,), of running each.
        """
        self._table, self._variants, self._costs = table, variants, costs
        self._same = {variant.tobytes(): i for i, variant in enumerate(variants)}
        self._groups = [self._prepared(units, group) for group in range(len(table.choices))]

    def _prepared(self, units: Sequence[int | None], group: int) -> _Group:
        stairs = staircase(self._table, group, units)
        asked = np.concatenate([stairs.patterns, stairs.forced[None]])
        serving = self._serving(asked)
        return _Group(stairs.thresholds.tolist(), stairs.patterns, stairs.forced, serving[:-1], serving[-1])

    def choose(self, qualities: Sequence[float], step: int) -> int:
        """Return the index of the variant for a batch of prompts at a sampling step.

        Where prompts ask for different patterns, each layer needs the highest bits that any of them asks for
        (QLIP, section E), and the cheapest variant that has them runs.

        Raises:
            QlipError: No variant has them.
        """
        group = self._groups[self._table.group_of_step[step]]
        if step < self._table.forced_steps:
            return self._found(group.forced, group.forced_pattern)
        states = {bisect_right(group.thresholds, float(np.float32(q))) for q in qualities}
        if len(states) == 1:
            (state,) = states
            return self._found(group.serving[state], group.patterns[state])
        united = group.patterns[sorted(states)].max(axis=0)
        return self._found(self._serving(united[None])[0], united)

    def _serving(self, asked: Bits) -> list[int]:
        """Return the variant of each of the patterns ``asked``, (P, layers); -1 where none covers it."""
        same = np.array([self._same.get(pattern.tobytes(), -1) for pattern in asked])
        others = np.flatnonzero(same < 0)
        if len(others):
            same[others] = cheapest(self._variants, asked[others], self._costs)
        found: list[int] = same.tolist()
        return found

    def _found(self, index: int, asked: Bits) -> int:
        if index < 0:
            raise QlipError(
                "no engine has the bits that the policy asks for",
                expected=f"a variant with at least {_shown(asked)} bits",
                found=" or ".join(_shown(variant) for variant in self._variants[:5]) or "none",
                fix="compile the bundle again; for batches, build it with the --batch-size they have",
            )
        return index


def _shown(bits: Bits) -> str:
    return ",".join(map(str, bits.tolist()))
