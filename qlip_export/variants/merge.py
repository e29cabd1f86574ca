"""Fewer variants of a block than patterns: merged by rounding layers up, never down.

A set of variants serves a pattern by the one with the fewest bits that has at least the pattern's in every
layer. Wanted are the N variants that add the fewest bits, averaged over steps and prompts.

Where the patterns are nested (each has at least the bits of the one before, as in one timestep group whose
layers all rise with q), some optimal variants are patterns and serve neighbours, so dynamic programming
along their order finds an optimum. In general the problem contains set cover. Then three heuristics compete:
the same dynamic programme along the order of total bits, agglomeration of the pair that costs least, and
greedy addition; each is refined by serving every pattern anew until nothing changes.
`tests/variants/test_merge.py` holds them against exhaustive search.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qlip_export.variants.reachable import Bits, Demand

MOST_CLASSES = 192
"""Patterns beyond which neighbours along q are merged first, where patterns are not nested."""
MOST_COUNTED = 64
"""Variants of a block beyond which only the reachable patterns themselves are offered."""

_Floats = NDArray[np.float64]


def covers(variants: Bits, patterns: Bits) -> NDArray[np.bool_]:
    """Return whether each variant has at least the bits of each pattern in every layer, (V, P)."""
    result = np.empty((len(variants), len(patterns)), dtype=np.bool_)
    for i, variant in enumerate(variants):
        result[i] = (variant >= patterns).all(axis=1)
    return result


def cheapest(variants: Bits, patterns: Bits, costs: _Floats) -> NDArray[np.int64]:
    """Return for each pattern the cheapest variant that covers it, (P,) int64; -1 where none does."""
    found = covers(variants, patterns)
    best: NDArray[np.int64] = np.where(found, costs[:, None], np.inf).argmin(axis=0)
    best[~found.any(axis=0)] = -1
    return best


def bits_of(patterns: Bits) -> _Floats:
    """Return the bits of all layers together, (P,)."""
    return np.asarray(patterns.sum(axis=1, dtype=np.float64))


class Merger:
    """The variants of one block, for any number of them.

    Attributes:
        demand: What the policy can ask for.
    """

    def __init__(self, demand: Demand) -> None:
        """Nothing is computed before it is asked for."""
        self.demand = demand
        self._found: dict[int, Bits] = {}

    def variants(self, count: int) -> Bits:
        """Return at most ``count`` variants, (V, layers), that cover all patterns and add few bits.

        More variants never add more bits.
        """
        patterns = self.demand.patterns
        if count >= len(patterns):
            return patterns
        count = min(count, MOST_COUNTED)
        if count not in self._found:
            found = self._nested(count) if self._order is not None else self._heuristic(count)
            if count > 1 and self.added(fewer := self.variants(count - 1)) < self.added(found):
                found = fewer
            self._found[count] = found
        return self._found[count]

    def added(self, variants: Bits) -> float:
        """Return the bits that ``variants`` add, summed over layers, expected over the steps of a run."""
        return self.expected(variants) - float(self.demand.steps @ bits_of(self.demand.patterns))

    def expected(self, variants: Bits) -> float:
        """Return the bits at which ``variants`` run, summed over layers, expected over the steps of a run."""
        patterns = self.demand.patterns
        costs = bits_of(variants)
        if variants is patterns:
            return float(self.demand.steps @ costs)
        return float(self.demand.steps @ costs[cheapest(variants, patterns, costs)])

    # --- nested patterns

    @cached_property
    def _order(self) -> NDArray[np.int64] | None:
        """The order in which each pattern covers the one before; none where there is no such order."""
        patterns = self.demand.patterns
        order = np.argsort(bits_of(patterns), kind="stable")
        nested = (patterns[order[1:]] >= patterns[order[:-1]]).all()
        return np.asarray(order) if nested else None

    def _nested(self, count: int) -> Bits:
        assert self._order is not None
        patterns, steps = self.demand.patterns[self._order], self.demand.steps[self._order]
        below = np.concatenate([[0.0], np.cumsum(steps)])
        # Serving i..j by j runs the steps of i..j at the bits of j.
        costs = bits_of(patterns)[None, :] * (below[None, 1:] - below[:-1, None])
        ends = [end for _, end in _partition(costs, count)]
        served: Bits = patterns[ends]
        return served

    # --- any patterns

    @cached_property
    def _classes(self) -> tuple[Bits, _Floats]:
        """Patterns, or where they are many, what covers neighbours along q; and the steps at each."""
        states = self.demand.states
        _, first = np.unique(states, return_index=True)
        along_q = states[np.sort(first)]
        return _thinned(self.demand.patterns[along_q], self.demand.steps[along_q], MOST_CLASSES)

    @cached_property
    def _along_bits(self) -> tuple[Bits, _Floats]:
        """The classes in the order of their bits, and the cost of serving those from i to j together."""
        patterns, steps = self._classes
        order = np.argsort(bits_of(patterns), kind="stable")
        patterns, steps = patterns[order], steps[order]
        below = np.concatenate([[0.0], np.cumsum(steps)])
        costs = np.full((len(patterns), len(patterns)), np.inf)
        for j in range(len(patterns)):
            joins = np.maximum.accumulate(patterns[j::-1], axis=0)
            costs[: j + 1, j] = bits_of(joins)[::-1] * (below[j + 1] - below[: j + 1])
        return patterns, costs

    @cached_property
    def _agglomerated(self) -> dict[int, Bits]:
        """What is left when the cheapest pair is merged again and again, by how many are left."""
        patterns, steps = self._classes
        joins, weights = patterns.copy(), steps.copy()
        bits, gone = bits_of(joins), np.zeros(len(joins), dtype=np.bool_)
        costs = np.full((len(joins), len(joins)), np.inf)

        def update(i: int) -> None:
            together = bits_of(np.maximum(joins[i], joins))
            row = (weights[i] + weights) * together - weights[i] * bits[i] - weights * bits
            row[gone | (np.arange(len(joins)) == i)] = np.inf
            costs[i], costs[:, i] = row, row

        for i in range(len(joins)):
            update(i)
        left = {len(joins): joins.copy()}
        for size in range(len(joins) - 1, 0, -1):
            i, j = (int(k) for k in np.unravel_index(int(costs.argmin()), costs.shape))
            joins[i] = np.maximum(joins[i], joins[j])
            weights[i] += weights[j]
            bits[i], gone[j] = joins[i].sum(dtype=np.float64), True
            costs[j], costs[:, j] = np.inf, np.inf
            update(i)
            if size <= MOST_COUNTED:
                left[size] = joins[~gone]
        return left

    def _added_greedily(self, count: int) -> Bits:
        """Begin with what covers all, and add the class that saves most, again and again."""
        patterns, steps = self._classes
        bits, covered = bits_of(patterns), self._covered
        top = patterns.max(axis=0)
        chosen, at = [top], np.full(len(patterns), float(top.sum(dtype=np.float64)))
        for _ in range(count - 1):
            saved = (covered * (steps * np.maximum(at - bits[:, None], 0.0))).sum(axis=1)
            best = int(saved.argmax())
            if saved[best] <= 0:
                break
            chosen.append(patterns[best])
            at = np.where(covered[best], np.minimum(at, bits[best]), at)
        return np.stack(chosen)

    @cached_property
    def _covered(self) -> NDArray[np.bool_]:
        patterns, _ = self._classes
        return covers(patterns, patterns)

    def _heuristic(self, count: int) -> Bits:
        patterns, costs = self._along_bits
        along_bits = np.stack([patterns[i : j + 1].max(axis=0) for i, j in _partition(costs, count)])
        agglomerated = self._agglomerated.get(count, self._classes[0])
        offers = [along_bits, agglomerated, self._added_greedily(count)]
        return min(map(self._refined, offers), key=self._cost)

    def _cost(self, variants: Bits) -> float:
        patterns, steps = self._classes
        costs = bits_of(variants)
        return float(steps @ costs[cheapest(variants, patterns, costs)])

    def _refined(self, variants: Bits) -> Bits:
        """Serve every class by the cheapest variant, lower each to what it serves, until nothing changes."""
        patterns, _ = self._classes
        while True:
            serving = cheapest(variants, patterns, bits_of(variants))
            lowered = np.stack([patterns[serving == v].max(axis=0) for v in np.unique(serving)])
            if lowered.shape == variants.shape and (lowered == variants).all():
                return variants
            variants = lowered


def _partition(costs: _Floats, count: int) -> list[tuple[int, int]]:
    """Cut 0..m-1 into at most ``count`` runs of least cost; return first and last of each, in order.

    ``costs[i, j]`` is the cost of the run i..j.
    """
    size = len(costs)
    best, starts = costs[0].copy(), []
    for _ in range(min(count, size) - 1):
        # Run i..j comes after a partition that ends at i - 1.
        before = np.concatenate([[np.inf], best[:-1]])
        through = np.where(np.tri(size, dtype=np.bool_).T, before[:, None] + costs, np.inf)
        start = through.argmin(axis=0)
        better = through[start, np.arange(size)]
        keep = better < best
        starts.append(np.where(keep, start, -1))
        best = np.where(keep, better, best)
    runs, end, level = [], size - 1, len(starts) - 1
    while end >= 0:
        while level >= 0 and starts[level][end] < 0:
            level -= 1
        start_of_run = int(starts[level][end]) if level >= 0 else 0
        runs.append((start_of_run, end))
        end, level = start_of_run - 1, level - 1
    return runs[::-1]


def _thinned(patterns: Bits, steps: _Floats, most: int) -> tuple[Bits, _Floats]:
    """Merge neighbours that cost least until at most ``most`` patterns are left."""
    while (excess := len(patterns) - most) > 0:
        bits = bits_of(patterns)
        together = bits_of(np.maximum(patterns[:-1], patterns[1:]))
        costs = (steps[:-1] + steps[1:]) * together - steps[:-1] * bits[:-1] - steps[1:] * bits[1:]
        # Local minima have no pattern in common, so all of them can be merged at once.
        before, after = np.concatenate([[np.inf], costs[:-1]]), np.concatenate([costs[1:], [np.inf]])
        pairs = np.flatnonzero((costs < before) & (costs <= after))
        pairs = pairs[np.argsort(costs[pairs], kind="stable")[:excess]]
        patterns[pairs] = np.maximum(patterns[pairs], patterns[pairs + 1])
        steps[pairs] += steps[pairs + 1]
        patterns, steps = np.delete(patterns, pairs + 1, axis=0), np.delete(steps, pairs + 1)
    return patterns, steps
