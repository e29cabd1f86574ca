"""From qualities to the bits of every block at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from qlip_export.errors import QlipError
from qlip_export.manifest import BlockEntry, LayerEntry, VariantEntry
from qlip_export.policy.table import DecisionTable, UnitChoice
from qlip_export.runtime.schedule import Scheduler, block_bits, engine_switches, feature_average_bits
from qlip_export.spec import container_of


def block(name: str, *layers: str, quantized: bool = True) -> BlockEntry:
    entries = (
        LayerEntry(name=layer, kind="conv", macs=1, weights=1, quantized=quantized) for layer in layers
    )
    variants = {f"a{b}": VariantEntry(bits=b, container=container_of(b), onnx="x") for b in (8, 16, 32)}
    return BlockEntry(
        name=name, inputs=(), outputs=(), layers=tuple(entries), reference="x", variants=variants
    )


BLOCKS = (block("time", "time.linear", quantized=False), block("a", "a.0", "a.1", "a.2"), block("b", "b.0"))
RISING = UnitChoice(thresholds=(0.5,), bits=(8, 16), forced=16)
FALLING = UnitChoice(thresholds=(0.25, 0.75), bits=(32, 16, 8), forced=8)
LOW = UnitChoice(thresholds=(), bits=(8,), forced=8)


def schedule(policy: DecisionTable, blocks: Sequence[BlockEntry], qualities: list[float]) -> list[Any]:
    """Return the bits of every block at every step."""
    patterns = Scheduler(policy, blocks)(qualities)
    return [tuple(map(block_bits, blocks, pattern)) for pattern in patterns]


def table(units: tuple[str, ...], *choices: tuple[UnitChoice, ...], forced_steps: int = 0) -> DecisionTable:
    groups = tuple(step // 2 for step in range(2 * len(choices)))
    return DecisionTable(
        options=(8, 16, 32), units=units, group_of_step=groups, forced_steps=forced_steps, choices=choices
    )


def test_every_step_follows_its_group() -> None:
    by_block = table(("a", "b"), (RISING, FALLING), (FALLING, LOW))
    assert schedule(by_block, BLOCKS, [0.1]) == [(16, 8, 32)] * 2 + [(16, 32, 8)] * 2
    assert schedule(by_block, BLOCKS, [0.5]) == [(16, 16, 16)] * 2 + [(16, 16, 8)] * 2


def test_first_steps_are_forced_even_within_a_group() -> None:
    by_block = table(("a", "b"), (RISING, FALLING), forced_steps=1)
    assert schedule(by_block, BLOCKS, [0.1]) == [(16, 16, 8), (16, 8, 32)]


def test_units_may_come_in_another_order_than_blocks() -> None:
    assert schedule(table(("b", "a"), (LOW, RISING)), BLOCKS, [0.9]) == [(16, 16, 8)] * 2


def test_a_batch_gets_the_highest_bits_that_a_prompt_asks_for() -> None:
    by_block = table(("a", "b"), (RISING, FALLING))
    low, high = schedule(by_block, BLOCKS, [0.1]), schedule(by_block, BLOCKS, [0.9])
    assert (low[0], high[0]) == ((16, 8, 32), (16, 16, 8))
    # Neither prompt's own schedule: a from one, b from the other.
    assert schedule(by_block, BLOCKS, [0.1, 0.9]) == [(16, 16, 32)] * 2
    assert schedule(by_block, BLOCKS, [0.9, 0.9, 0.9]) == high


def test_a_block_runs_at_the_highest_bits_of_its_layers() -> None:
    by_layer = table(("a.0", "a.1", "a.2", "b.0"), (LOW, RISING, LOW, FALLING))
    assert schedule(by_layer, BLOCKS, [0.1]) == [(16, 8, 32)] * 2
    assert schedule(by_layer, BLOCKS, [0.8]) == [(16, 16, 8)] * 2


@pytest.mark.parametrize("qualities", [[], [float("nan")], [-0.1], [0.5, 1.5]])
def test_what_is_no_quality_is_refused(qualities: list[float]) -> None:
    with pytest.raises(QlipError, match="no bits for these qualities"):
        schedule(table(("a", "b"), (RISING, FALLING)), BLOCKS, qualities)


def test_unit_that_the_bundle_lacks_is_named() -> None:
    with pytest.raises(QlipError, match="found: c"):
        schedule(table(("a", "c"), (RISING, FALLING)), BLOCKS, [0.5])


def test_fab_weighs_blocks_by_their_quantized_layers() -> None:
    # Three layers at 8 and one at 32, then four at 16; the time block has no say.
    patterns = [("a32", "a8", "a32"), ("a32", "a16", "a16")]
    assert feature_average_bits(BLOCKS, patterns) == (14 + 16) / 2


def test_switches_are_counted_for_each_block() -> None:
    assert engine_switches([("a8", "a8")]) == 0
    assert engine_switches([("a8", "a8"), ("a8", "a8"), ("a16", "a32"), ("a8", "a32")]) == 3
