"""A choice keeps within its limits, covers batches, and fuses only blocks that always change together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qlip_export.errors import QlipError
from qlip_export.manifest import BlockEntry, LayerEntry, VariantEntry
from qlip_export.policy.table import DecisionTable, UnitChoice
from qlip_export.runtime.schedule import Scheduler, layer_bits
from qlip_export.spec import Container, container_of, mixed_name
from qlip_export.variants.choose import Choice, Chooser, Hardware, Limits
from qlip_export.variants.fuse import fused_name, runs_of_one_mind
from tests.variants.policies import random_table

QUALITIES = np.random.default_rng(1).random(300).tolist()
NAMES = {"time": [], "a": ["l0", "l1", "l2", "l3"], "b": ["l4", "l5", "l6"], "c": ["l7"]}


def layer(name: str) -> LayerEntry:
    return LayerEntry(name=name, kind="conv", macs=100, weights=1000, quantized=True)


BLOCKS = {block: tuple(map(layer, names)) for block, names in NAMES.items()}
WIDTHS = {Container.INT8: 1, Container.HALF: 2, Container.FLOAT: 4}
TIMES = {name: {8: 1.0, 16: 2.0, 32: 4.0} for name in BLOCKS}


def choose(
    table: DecisionTable, limits: Limits | None = None, hardware: Hardware | None = None, **options: Any
) -> Choice:
    options = {"precision": "layer", "fuse": False, "batches": False} | options
    chooser = Chooser(table, QUALITIES, limits or Limits(), hardware or Hardware(), **options)
    return chooser(BLOCKS, ["time"])


def entries(choice: Choice) -> list[BlockEntry]:
    """Return the blocks that an export of ``choice`` would list."""
    found = []
    for run in choice.runs:
        layers = tuple(e for name in run for e in BLOCKS[name])
        patterns = [tuple(of[e.name] for e in layers) for of in choice.variants[fused_name(run)]]
        variants = {
            mixed_name(p or (32,)): VariantEntry(
                bits=max(p, default=32),
                layers=p if len(set(p)) > 1 else None,
                container=container_of(min(p, default=32)),
                onnx="x",
            )
            for p in patterns
        }
        found.append(
            BlockEntry(
                name=fused_name(run), inputs=(), outputs=(), layers=layers, reference="x", variants=variants
            )
        )
    return found


def run(table: DecisionTable, blocks: list[BlockEntry], qualities: list[float]) -> np.ndarray:
    """Return the bits of each unit, (steps, units)."""
    names = [e.name for block in blocks for e in block.quantized]
    return layer_bits(blocks, Scheduler(table, blocks)(qualities))[:, [names.index(u) for u in table.units]]


@pytest.mark.parametrize("count", [1, 2, None])
@pytest.mark.parametrize("seed", range(4))
def test_a_batch_gets_the_highest_bits_of_each_layer_or_more(count: int | None, seed: int) -> None:
    table = random_table(8, 2, seed=seed)
    blocks = entries(choose(table, Limits(max_variants=count), batches=True))
    for batch in ([0.1, 0.9], [0.2, 0.5, 0.6], [0.0, 1.0]):
        asked = np.array([table.batch_bits(batch, step) for step in range(8)])
        assert (run(table, blocks, batch) >= asked).all()
    alone = np.array([table.bits(0.4, step) for step in range(8)])
    assert (run(table, blocks, [0.4]) == alone).all() or count is not None


def test_without_batches_in_mind_a_batch_may_lack_an_engine() -> None:
    falling = UnitChoice(thresholds=(0.5,), bits=(16, 8), forced=8)
    rising = UnitChoice(thresholds=(0.5,), bits=(8, 16), forced=16)
    units = tuple(name for names in NAMES.values() for name in names)
    row = tuple(rising if i % 2 else falling for i in range(len(units)))
    table = DecisionTable(
        options=(8, 16, 32), units=units, group_of_step=(0,), forced_steps=0, choices=(row,)
    )
    blocks = entries(choose(table))
    assert run(table, blocks, [0.1]).tolist() == [list(table.bits(0.1, 0))]
    with pytest.raises(QlipError, match="no engine has the bits that the policy asks for"):
        run(table, blocks, [0.1, 0.9])
    assert (run(table, entries(choose(table, batches=True)), [0.1, 0.9]) == 16).all()


def test_engine_bytes_stay_within_the_budget_and_more_of_it_never_hurts() -> None:
    table = random_table(8, 2, seed=3)
    hardware = Hardware(engine_bytes=lambda layers: 500 + sum(e.weights * WIDTHS[c] for e, c in layers))
    least = choose(table, Limits(max_variants=1), hardware).chosen
    most = choose(table, hardware=hardware).chosen
    assert least is not None and most is not None
    assert least.bytes is not None and most.bytes is not None
    averages = []
    for budget in np.linspace(least.bytes, most.bytes, 8).astype(int).tolist():
        found = choose(table, Limits(max_engine_bytes=budget), hardware).chosen
        assert found is not None and found.bytes is not None and found.bytes <= budget
        averages.append(found.fab)
    assert averages[0] <= least.fab
    assert averages[-1] == most.fab < averages[0]
    assert averages == sorted(averages, reverse=True)
    with pytest.raises(QlipError, match="not even one engine for each block"):
        choose(table, Limits(max_engine_bytes=least.bytes - 1), hardware)


def test_every_size_of_images_has_engines_of_its_own() -> None:
    table = random_table(8, 2, seed=3)

    def chosen(limits: Limits, sizes: int) -> Any:
        return choose(
            table, limits, Hardware(engine_bytes=lambda layers: 500 + len(layers), sizes=sizes)
        ).chosen

    one, two = (chosen(Limits(max_variants=2), sizes) for sizes in (1, 2))
    assert (two.engines, two.bytes, two.fab) == (2 * one.engines, 2 * one.bytes, one.fab)
    assert (
        chosen(Limits(max_engine_bytes=two.bytes), 2).fab == chosen(Limits(max_engine_bytes=one.bytes), 1).fab
    )


def test_a_target_is_reached_with_the_fewest_engines() -> None:
    table = random_table(8, 2, seed=3)
    rows = [choose(table, Limits(max_variants=n), Hardware(milliseconds=TIMES)).chosen for n in (1, 2, 3, 4)]
    seconds = [row.seconds for row in rows if row is not None and row.seconds is not None]
    assert len(seconds) == 4
    for limits in (
        Limits(target_fab=(rows[1].fab + rows[2].fab) / 2 if rows[1] and rows[2] else None),
        Limits(target_latency=(seconds[1] + seconds[2]) / 2),
    ):
        found = choose(table, limits, Hardware(milliseconds=TIMES)).chosen
        assert found is not None and found.variants == 3
    with pytest.raises(QlipError, match="no number of variants reaches this target"):
        choose(table, Limits(target_latency=1e-6), Hardware(milliseconds=TIMES))
    with pytest.raises(QlipError, match="needs the times of this model's blocks"):
        choose(table, Limits(target_latency=1.0))


def test_variants_that_were_timed_take_what_they_took() -> None:
    table = random_table(8, 2, seed=3)
    guessed = choose(table, hardware=Hardware(milliseconds=TIMES))
    (block, of) = next((n, of) for n, of in guessed.variants.items() if len(of) > 1)
    patterns = [tuple(v[e.name] for e in BLOCKS[block]) for v in of]
    slow = Hardware(milliseconds=TIMES, measured={block: dict.fromkeys(patterns, 1000.0)})
    found = choose(table, hardware=slow).chosen
    assert found is not None and found.seconds is not None
    assert guessed.chosen is not None and guessed.chosen.seconds is not None
    # Each of eight steps runs one of the block's variants; the others take what was guessed.
    assert 8.0 < found.seconds < 8.0 + guessed.chosen.seconds
    assert choose(table, hardware=Hardware(milliseconds=TIMES, measured={block: {(1,): 9.0}})) == guessed


def test_seconds_are_those_of_uniform_blocks_where_all_layers_agree() -> None:
    always = UnitChoice(thresholds=(), bits=(16,), forced=16)
    units = tuple(name for names in NAMES.values() for name in names)
    table = DecisionTable(
        options=(8, 16, 32),
        units=units,
        group_of_step=(0,) * 8,
        forced_steps=0,
        choices=((always,) * len(units),),
    )
    chosen = choose(table, hardware=Hardware(milliseconds=TIMES)).chosen
    assert chosen is not None and chosen.engines == 3
    assert chosen.fab == 16
    # Eight steps of three blocks at 16 bits; the timestep embedding at its fastest.
    assert chosen.seconds == pytest.approx(8 * (3 * 2.0 + 1.0) / 1000)


# --- fusion


def test_blocks_are_fused_where_their_variants_come_in_pairs() -> None:
    serving = {
        "a": np.array([0, 0, 1, 2]),
        "b": np.array([3, 3, 0, 1]),  # says what a says, in other numbers
        "c": np.array([0, 0, 1, 1]),
        "d": np.array([1, 1, 0, 0]),
        "e": np.array([0, 0, 0, 0]),
    }
    assert runs_of_one_mind("abcde", serving, []) == [["a", "b"], ["c", "d"], ["e"]]
    assert runs_of_one_mind("abcde", serving, ["b"]) == [["a"], ["b"], ["c", "d"], ["e"]]
    assert [fused_name(run) for run in (["a"], ["a", "b", "c"])] == ["a", "a..c"]


def test_one_variant_of_each_block_leaves_one_block_beside_the_timestep_embedding() -> None:
    table = random_table(8, 2, seed=5)
    choice = choose(table, Limits(max_variants=1), fuse=True)
    assert choice.runs == [["time"], ["a", "b", "c"]]
    assert [len(of) for of in choice.variants["a..c"]] == [8]
    blocks = entries(choice)
    for q in (0.1, 0.6):
        assert (run(table, blocks, [q]) >= [table.bits(q, step) for step in range(8)]).all()


def test_fused_blocks_run_what_they_ran_apart() -> None:
    rising = UnitChoice(thresholds=(0.5,), bits=(8, 16), forced=16)
    late = UnitChoice(thresholds=(0.75,), bits=(8, 32), forced=32)
    units = tuple(name for names in NAMES.values() for name in names)
    row = tuple(late if unit in NAMES["c"] else rising for unit in units)
    table = DecisionTable(
        options=(8, 16, 32), units=units, group_of_step=(0, 0), forced_steps=1, choices=(row,)
    )
    choice = choose(table, fuse=True)
    assert choice.runs == [["time"], ["a", "b"], ["c"]]
    for q in (0.1, 0.6, 0.9):
        assert run(table, entries(choice), [q]).tolist() == [list(table.bits(q, step)) for step in (0, 1)]


def test_blocks_at_uniform_bits_are_fused_too() -> None:
    rising = UnitChoice(thresholds=(0.5,), bits=(8, 16), forced=16)
    falling = UnitChoice(thresholds=(0.5,), bits=(16, 8), forced=8)
    table = DecisionTable(
        options=(8, 16, 32),
        units=("a", "b", "c"),
        group_of_step=(0,),
        forced_steps=0,
        choices=((rising, rising, falling),),
    )
    # b and c change together as well, but one at a time is at 8 bits: a uniform run could not use the pair.
    assert choose(table, precision="block", fuse=True).runs == [["time"], ["a", "b"], ["c"]]
