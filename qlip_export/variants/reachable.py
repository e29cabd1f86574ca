"""Everything that a policy can ask of a block: a step function of q for each timestep group.

A layer changes its bits at a few values of q (`policy.table`), so a block of n layers with three bit options
has at most 2n + 1 patterns in a timestep group, and one more in the forced first steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlip_export.policy.table import DecisionTable, UnitChoice

Bits = NDArray[np.uint8]
"""Activation bits of layers, the last axis in the order of a block's quantized layers."""


@dataclass(frozen=True)
class Staircase:
    """What a block is asked for in one timestep group.

    Attributes:
        thresholds: (T,) float32, increasing values of q.
        patterns: (T + 1, layers); row i holds where exactly i thresholds are at most q.
        forced: (layers,), in the forced first steps of the group.
    """

    thresholds: NDArray[np.float32]
    patterns: Bits
    forced: Bits


def staircase(table: DecisionTable, group: int, units: Sequence[int | None]) -> Staircase:
    """Return what a block is asked for in a timestep group.

    Args:
        table: The policy.
        group: Timestep group.
        units: For each layer of the block the index of its unit; a layer without one asks for nothing, 0.
    """
    row = table.choices[group]
    choices = {unit: row[unit] for unit in units if unit is not None}
    every = {threshold for choice in choices.values() for threshold in choice.thresholds}
    thresholds = np.array(sorted(every), dtype=np.float32)
    starts = np.concatenate([np.zeros(1, dtype=np.float32), thresholds])
    columns = {unit: _bits_at(choice, starts) for unit, choice in choices.items()}
    patterns = np.zeros((len(starts), len(units)), dtype=np.uint8)
    forced = np.zeros(len(units), dtype=np.uint8)
    for i, unit in enumerate(units):
        if unit is not None:
            patterns[:, i] = columns[unit]
            forced[i] = choices[unit].forced
    return Staircase(thresholds, patterns, forced)


def _bits_at(choice: UnitChoice, q: NDArray[np.float32]) -> Bits:
    thresholds = np.array(choice.thresholds, dtype=np.float32)
    return np.array(choice.bits, dtype=np.uint8)[np.searchsorted(thresholds, q, side="right")]


def steps_of(table: DecisionTable) -> list[tuple[int, int]]:
    """Return for each timestep group how many of its steps follow q, and how many are forced."""
    free, forced = [0] * len(table.choices), [0] * len(table.choices)
    for step, group in enumerate(table.group_of_step):
        (forced if step < table.forced_steps else free)[group] += 1
    return list(zip(free, forced, strict=True))


@dataclass(frozen=True)
class Demand:
    """The distinct patterns that a policy can ask of a block, and how often.

    Attributes:
        patterns: (P, layers), distinct.
        steps: (P,) float64, expected sampling steps of a run at each of them; their sum is that of the steps.
        states: (S,) int64, the pattern in each state of the policy: `states_of` tells which these are.
    """

    patterns: Bits
    steps: NDArray[np.float64]
    states: NDArray[np.int64]

    @property
    def top(self) -> Bits:
        """The highest bits of each layer in any pattern, (layers,): it covers them all."""
        highest: Bits = self.patterns.max(axis=0)
        return highest


PRIOR = 1e-6
"""Share of the weight of q that is spread evenly over [0, 1]: no q that is possible costs nothing."""


def demand(
    table: DecisionTable,
    units: Sequence[int | None],
    qualities: Sequence[float],
    edges: Sequence[NDArray[np.float32]],
    *,
    batches: bool = False,
) -> Demand:
    """Return what a policy can ask of a block.

    Args:
        table: The policy.
        units: For each layer of the block the index of its unit.
        qualities: q of the calibration prompts; their distribution says how often a pattern is asked for.
        edges: For each group the values of q between which states are told apart, see `edges_of`.
        batches: Ask for the highest bits of each layer too, which a batch of prompts may need together.
    """
    rows: list[Bits] = []
    weights: list[NDArray[np.float64]] = []
    sample = np.sort(np.asarray(qualities, dtype=np.float32))
    for group, (free, forced) in enumerate(steps_of(table)):
        stairs = staircase(table, group, units)
        if free:
            starts = np.concatenate([np.zeros(1, dtype=np.float32), edges[group]])
            rows.append(stairs.patterns[np.searchsorted(stairs.thresholds, starts, side="right")])
            weights.append(free * shares(edges[group], sample))
        if forced:
            rows.append(stairs.forced[None])
            weights.append(np.full(1, float(forced)))
    if batches:
        rows.append(np.concatenate(rows).max(axis=0, keepdims=True))
        weights.append(np.zeros(1))
    every, steps = np.concatenate(rows), np.concatenate(weights)
    patterns, states = np.unique(every, axis=0, return_inverse=True)
    states = states.reshape(-1)
    summed = np.bincount(states, weights=steps, minlength=len(patterns)).astype(np.float64)
    return Demand(patterns, summed, states)


def edges_of(table: DecisionTable) -> list[NDArray[np.float32]]:
    """Return for each group every value of q at which any unit changes its bits, increasing.

    The states of a policy are the intervals between them, group by group, where any step of the group
    follows q, and one state for the forced steps of a group, where it has some.
    """
    return [
        np.array(sorted({t for choice in row for t in choice.thresholds}), dtype=np.float32)
        for row in table.choices
    ]


def shares(edges: NDArray[np.float32], sample: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the probability of each interval between ``edges``, (len(edges) + 1,), by sorted values of q."""
    lengths = np.diff(np.concatenate([[0.0], edges.astype(np.float64), [1.0]]))
    if not len(sample):
        return np.asarray(lengths)
    counts = np.diff(np.concatenate([[0], np.searchsorted(sample, edges, side="left"), [len(sample)]]))
    return np.asarray((1 - PRIOR) * counts / len(sample) + PRIOR * lengths)
