"""The decision table says what Q2B says for every quality, thresholds and their neighbours included."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlip_export.errors import QlipError
from qlip_export.policy.q2b import QualityToBits, timestep_groups
from qlip_export.policy.table import DecisionTable, UnitChoice, decision, quality_probability

VARIANTS = [
    ((8, 16), "q"),
    ((8, 16, 32), "qh"),
    ((8, 16, 32), "qm"),
    ((8, 16, 32), "qmh"),
    ((6, 8, 16, 32), "qmh"),
]


def random_q2b(options: tuple[int, ...], parts: str, units: int, groups: int, seed: int) -> QualityToBits:
    generator = torch.Generator().manual_seed(seed)
    module = QualityToBits(options, units, groups, frozenset(parts)).double()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 3
    return module


@pytest.mark.parametrize(("options", "parts"), VARIANTS)
def test_table_equals_q2b_for_every_quality(options: tuple[int, ...], parts: str) -> None:
    module = random_q2b(options, parts, units=9, groups=3, seed=1)
    table = module.table([f"u{i}" for i in range(9)], timestep_groups(12, 3), forced_steps=2)
    thresholds = [t for row in table.choices for choice in row for t in choice.thresholds]
    assert thresholds, "a policy that never changes its mind tests nothing"
    near = np.array(thresholds, dtype=np.float32)
    neighbours = [near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(1))]
    qualities = np.concatenate([np.linspace(0, 1, 10_000, dtype=np.float32), *neighbours])
    for step in (2, 5, 11):
        hard, _ = module(torch.from_numpy(qualities.astype(np.float64)), table.group_of_step[step])
        wanted = np.array(options)[hard.argmax(-1).numpy()]
        found = np.array([table.bits(float(q), step) for q in qualities])
        assert (found == wanted).all()


def test_first_steps_are_forced() -> None:
    module = random_q2b((8, 16, 32), "qmh", units=6, groups=2, seed=3)
    table = module.table("abcdef", timestep_groups(8, 2), forced_steps=2)
    hard, _ = module(torch.tensor([0.0], dtype=torch.float64), 0, forced=True)
    assert table.bits(0.0, 1) == tuple(np.array([8, 16, 32])[hard[0].argmax(-1).numpy()])
    assert table.bits(0.0, 0) == table.bits(1.0, 0)


@settings(max_examples=200)
@given(st.data())
def test_a_unit_changes_at_most_twice_among_three_options(data: st.DataObject) -> None:
    module = random_q2b((8, 16, 32), "qmh", units=4, groups=1, seed=data.draw(st.integers(0, 10_000)))
    for choice in module.table("abcd", (0,), 0).choices[0]:
        assert len(choice.thresholds) <= 2
        assert len(set(choice.bits)) == len(choice.bits), "an option is left once and never asked for again"


def test_probabilities_sum_to_one() -> None:
    for options, parts in VARIANTS:
        module = random_q2b(options, parts, units=5, groups=2, seed=0)
        total = module.probabilities(torch.rand(7, dtype=torch.float64), 1).sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))


def test_a_batch_takes_the_highest_bits_of_each_unit() -> None:
    low_high = UnitChoice(thresholds=(0.5,), bits=(8, 32), forced=32)
    high_low = UnitChoice(thresholds=(0.5,), bits=(16, 8), forced=8)
    table = DecisionTable(
        options=(8, 16, 32),
        units=("a", "b"),
        group_of_step=(0,),
        forced_steps=0,
        choices=((low_high, high_low),),
    )
    assert table.bits(0.25, 0) == (8, 16)
    assert table.bits(0.75, 0) == (32, 8)
    assert table.batch_bits([0.25, 0.75], 0) == (32, 16)


def test_a_tie_goes_to_the_lower_bits() -> None:
    assert decision(np.array([[0.5, 0.0], [0.5, 0.0]]), 0.3) == 0


def test_quality_probability_survives_extreme_logits() -> None:
    assert quality_probability(0.0, 4000.0, 0.0) == 0.0
    assert quality_probability(1.0, 4000.0, 0.0) == 1.0


@pytest.mark.parametrize(
    ("options", "parts"),
    [((8,), "q"), ((16, 8), "q"), ((8, 16), "qmh"), ((8, 16, 32), "q"), ((4, 6, 8, 16), "qm")],
)
def test_options_and_parts_must_fit(options: tuple[int, ...], parts: str) -> None:
    with pytest.raises(QlipError):
        QualityToBits(options, 3, 2, frozenset(parts))


def test_sizes_are_the_papers() -> None:
    module = QualityToBits((8, 16, 32), units=141, groups=10, parts=frozenset("qmh"))
    floats = sum(p.numel() for p in module.parameters())
    assert floats == 3102
    assert round(floats * 4 / 1024, 1) == 12.1
