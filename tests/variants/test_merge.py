"""Merged variants cover everything, add few bits, and the fewest where that can be known."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlip_export.variants import merge
from qlip_export.variants.merge import Merger, bits_of, cheapest
from qlip_export.variants.reachable import Bits, Demand, demand, edges_of
from tests.variants.policies import random_table


def demand_of(rows: list[list[int]], steps: list[float]) -> Demand:
    return Demand(np.array(rows, dtype=np.uint8), np.array(steps, dtype=np.float64), np.arange(len(rows)))


def least_added(found: Demand, count: int) -> float:
    """Try every set of ``count`` variants: joins of patterns are all that can be in an optimum."""
    joins = {tuple(row) for row in found.patterns.tolist()}
    while True:
        more = {tuple(np.maximum(a, b).tolist()) for a in joins for b in joins} | joins
        if more == joins:
            break
        joins = more
    every = np.array(sorted(joins), dtype=np.uint8)
    merger = Merger(found)
    chosen = (every[list(c)] for c in combinations(range(len(every)), min(count, len(every))))
    return min(merger.added(c) for c in chosen if (cheapest(c, found.patterns, bits_of(c)) >= 0).all())


def demands(layers: int = 3, most: int = 6) -> st.SearchStrategy[Demand]:
    row = st.lists(st.sampled_from([8, 16, 32]), min_size=layers, max_size=layers)
    rows = st.lists(row, min_size=1, max_size=most, unique_by=tuple)
    return rows.flatmap(
        lambda r: st.lists(st.floats(0.01, 5), min_size=len(r), max_size=len(r)).map(
            lambda w: demand_of(r, w)
        )
    )


def nested(draws: Demand) -> Demand:
    """Return what each pattern and all before it ask for together."""
    rows = np.unique(np.maximum.accumulate(draws.patterns, axis=0), axis=0)
    return demand_of(rows.tolist(), draws.steps[: len(rows)].tolist())


@settings(max_examples=60)
@given(demands(), st.integers(1, 4))
def test_nested_patterns_are_merged_at_the_least_cost(draws: Demand, count: int) -> None:
    found = nested(draws)
    merger = Merger(found)
    variants = merger.variants(count)
    assert len(variants) <= count
    assert merger.added(variants) == pytest.approx(least_added(found, count), abs=1e-9)


@settings(max_examples=60)
@given(demands(), st.integers(1, 3))
def test_other_patterns_are_merged_close_to_the_least_cost(found: Demand, count: int) -> None:
    """The heuristics are no proof; what is held here is that they stay within a fifth of the bits."""
    merger = Merger(found)
    variants = merger.variants(count)
    assert len(variants) <= count
    asked = float(found.steps @ bits_of(found.patterns))
    assert merger.added(variants) <= least_added(found, count) + 0.2 * asked


def test_the_heuristics_mostly_find_the_least_cost() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        rows = np.unique(rng.choice([8, 16, 32], (7, 3)), axis=0)
        found = demand_of(rows.tolist(), rng.random(len(rows)).tolist())
        hits += Merger(found).added(Merger(found).variants(3)) <= least_added(found, 3) + 1e-9
    assert hits >= 85


@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize("most", [12, merge.MOST_CLASSES])
def test_every_pattern_is_covered_and_more_variants_never_add_bits(
    monkeypatch: pytest.MonkeyPatch, rising: bool, most: int
) -> None:
    monkeypatch.setattr(merge, "MOST_CLASSES", most)
    table = random_table(20, 3, steps=12, seed=4, rising=rising)
    merger = Merger(demand(table, list(range(20)), [0.3, 0.5, 0.6], edges_of(table)))
    added = []
    for count in range(1, 16):
        variants = merger.variants(count)
        serving = cheapest(variants, merger.demand.patterns, bits_of(variants))
        assert len(variants) <= count
        assert (variants[serving] >= merger.demand.patterns).all()
        assert (serving >= 0).all()
        added.append(merger.added(variants))
    assert added == sorted(added, reverse=True)
    assert added[-1] < added[0] / 2


def test_one_variant_covers_all_and_no_limit_adds_nothing() -> None:
    found = demand_of([[8, 16], [16, 8], [8, 8]], [1, 1, 1])
    merger = Merger(found)
    assert merger.variants(1).tolist() == [[16, 16]]
    assert merger.added(merger.variants(1)) == 8 + 8 + 16
    assert merger.variants(3) is found.patterns
    assert merger.added(merger.variants(3)) == 0


def test_a_pattern_that_nothing_covers_is_told() -> None:
    variants: Bits = np.array([[8, 16]], dtype=np.uint8)
    patterns: Bits = np.array([[8, 8], [16, 8]], dtype=np.uint8)
    assert cheapest(variants, patterns, bits_of(variants)).tolist() == [0, -1]
