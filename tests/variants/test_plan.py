"""A plan runs every layer at the policy's bits or more, and at the average that it promises."""

from __future__ import annotations

import numpy as np
import pytest

from qlip_export.errors import QlipError
from qlip_export.variants.plan import EXACT, Planner, layer_bits, units_of_blocks
from tests.variants.policies import random_table

BLOCKS = {"a": ["l0", "l1", "l2", "l3"], "b": ["l4", "l5", "l6"], "c": ["l7"]}
QUALITIES = np.random.default_rng(1).random(500).tolist()


@pytest.mark.parametrize("count", [1, 2, 3, EXACT])
def test_layers_never_run_below_the_policy(count: int) -> None:
    table = random_table(8, 2, seed=5)
    plan = Planner(table, BLOCKS, QUALITIES).plan(count)
    run = layer_bits(table, BLOCKS, plan.variants, QUALITIES)
    found = np.stack([run[unit] for unit in table.units], axis=-1)
    asked = np.array([[table.bits(q, step) for step in range(8)] for q in QUALITIES])
    assert (found >= asked).all()
    assert (found == asked).all() == (count == EXACT)
    assert plan.fab == pytest.approx(found.mean(), abs=0.1)
    assert plan.engines == sum(len(v) for v in plan.variants.values()) <= 3 * count


def test_counts_may_differ_from_block_to_block() -> None:
    plan = Planner(random_table(8, 2, seed=5), BLOCKS, QUALITIES).plan({"a": 2, "b": 1, "c": 3})
    assert [len(plan.variants[name]) for name in "abc"] == [2, 1, 3]


def test_blocks_decide_for_their_layers() -> None:
    table = random_table(3).model_copy(update={"units": ("b", "a", "c")})
    assert units_of_blocks(table, BLOCKS) == {"a": [1] * 4, "b": [0] * 3, "c": [2]}
    fused = {"a..b": BLOCKS["a"] + BLOCKS["b"], "c": BLOCKS["c"]}
    assert units_of_blocks(table, fused, {"a": "a..b", "b": "a..b"}) == {"a..b": [1] * 7, "c": [2]}


def test_a_unit_that_is_not_there_is_named() -> None:
    with pytest.raises(QlipError, match="found: l7"):
        Planner(random_table(8), {"a": BLOCKS["a"], "b": BLOCKS["b"]}, QUALITIES)
