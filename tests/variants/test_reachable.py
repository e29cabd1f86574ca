"""Every pattern that a policy can ask for is found, no other, and how often it is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from qlip_export.policy.table import DecisionTable
from qlip_export.variants.reachable import demand, edges_of, staircase, steps_of
from tests.variants.policies import random_table


def asked(table: DecisionTable, layers: list[int], qualities: list[float]) -> set[tuple[int, ...]]:
    """Ask the table itself, step by step."""
    rows = [table.bits(q, step) for q in qualities for step in range(len(table.group_of_step))]
    return {tuple(row[i] for i in layers) for row in rows}


def dense(table: DecisionTable) -> list[float]:
    """Return qualities on both sides of every threshold, and 0 and 1."""
    thresholds = np.array([t for row in table.choices for c in row for t in c.thresholds], dtype=np.float32)
    below = np.nextafter(thresholds, np.float32(0))
    return [0.0, 1.0, *map(float, thresholds), *map(float, below)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("forced_steps", [0, 1, 4])
def test_exactly_what_can_be_asked_for(seed: int, forced_steps: int) -> None:
    table = random_table(6, 2, forced_steps=forced_steps, seed=seed)
    layers = [1, 2, 4]
    found = demand(table, layers, [0.5], edges_of(table))
    assert {tuple(map(int, row)) for row in found.patterns} == asked(table, layers, dense(table))
    assert len(np.unique(found.patterns, axis=0)) == len(found.patterns)


@pytest.mark.parametrize("seed", range(5))
def test_a_group_has_at_most_twice_as_many_patterns_as_layers(seed: int) -> None:
    table = random_table(9, 3, seed=seed)
    for group in range(3):
        stairs = staircase(table, group, list(range(9)))
        assert len(stairs.patterns) == len(stairs.thresholds) + 1 <= 2 * 9 + 1


def test_a_group_whose_steps_are_all_forced_asks_for_one_pattern() -> None:
    table = random_table(5, 2, steps=8, forced_steps=4)
    assert steps_of(table) == [(0, 4), (4, 0)]
    found = demand(table, list(range(5)), [], edges_of(table))
    assert found.steps.sum() == pytest.approx(8)
    assert asked(table, list(range(5)), dense(table)) == {tuple(map(int, r)) for r in found.patterns}


def test_weights_are_how_often_prompts_ask() -> None:
    table = random_table(4, 2, seed=2)
    qualities = list(np.random.default_rng(0).random(4000))
    found = demand(table, list(range(4)), qualities, edges_of(table))
    counts = {tuple(map(int, row)): 0.0 for row in found.patterns}
    for q in qualities:
        for step in range(8):
            counts[table.bits(q, step)] += 1 / len(qualities)
    np.testing.assert_allclose(found.steps, list(counts.values()), atol=0.02)
    assert found.steps.sum() == pytest.approx(8)
    assert (found.steps > 0).all(), "what is possible is never free"


def test_a_batch_may_need_the_highest_bits_of_every_layer() -> None:
    table = random_table(6, 2, seed=1)
    alone = demand(table, list(range(6)), [0.5], edges_of(table))
    together = demand(table, list(range(6)), [0.5], edges_of(table), batches=True)
    assert (alone.top == alone.patterns).all(axis=1).sum() == 0, "a top that is asked for tests nothing"
    assert (together.top == together.patterns).all(axis=1).sum() == 1
    assert len(together.patterns) == len(alone.patterns) + 1


def test_a_layer_without_a_unit_asks_for_nothing() -> None:
    found = demand(random_table(3), [0, None, 2], [0.5], edges_of(random_table(3)))
    assert (found.patterns[:, 1] == 0).all()
