"""Q2B learns which units can do with few bits, on a toy whose answer is known and on the tiny model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlip_export.calibrate.bits import Learned, Plan, bit_costs, mean_bits, shift_to, train_q2b
from qlip_export.calibrate.trajectories import Trajectories
from qlip_export.policy.q2b import Part, QualityToBits
from qlip_export.quant.fake import FakeQuantizer
from qlip_export.quant.ranges import Ranges
from qlip_export.simulate import Simulator

STEPS = 6
VARIANTS: list[tuple[tuple[int, ...], tuple[Part, ...]]] = [
    ((8, 16), ("q",)),
    ((8, 16, 32), ("q", "h")),
    ((8, 16, 32), ("q", "m")),
    ((8, 16, 32), ("q", "m", "h")),
    ((6, 8, 16, 32), ("q", "m", "h")),
]


class Toy(nn.Module):
    """Adds up its layers' outputs: what a layer's quantization does to the sum is known."""

    def __init__(self, weights: dict[str, float]) -> None:
        super().__init__()
        for name, weight in weights.items():
            layer = nn.Linear(4, 4, bias=False)
            layer.weight.data = weight * torch.eye(4)
            self.add_module(name, layer.requires_grad_(False))

    def forward(self, x: Tensor) -> Tensor:
        return sum((layer(x) for layer in self.children()), torch.zeros_like(x))


@dataclass
class ToySimulator:
    """Stands in for `Simulator`: a denoiser, its quantizer, and guidance that only has a prompt."""

    denoiser: Toy
    thresholds: dict[str, float]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rows: int = 2

    @cached_property
    def layers(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.denoiser.named_children())

    @cached_property
    def quantizer(self) -> FakeQuantizer:
        return FakeQuantizer(self.denoiser, {6: self.thresholds, 8: self.thresholds})

    def guided(self, latents: Tensor, timesteps: Tensor, states: Tensor, guidance: float) -> Tensor:
        prediction: Tensor = self.denoiser(torch.cat([latents, latents]).float())
        return prediction.chunk(2)[1]


def toy(weights: dict[str, float], threshold: float) -> ToySimulator:
    """Return a toy whose layers clip their inputs to ``threshold`` at 8 bits and below."""
    return ToySimulator(Toy(weights), dict.fromkeys(weights, threshold))


def runs(simulator: ToySimulator, prompts: int = 8) -> Trajectories:
    inputs = torch.randn(prompts, STEPS, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    return Trajectories(
        inputs=inputs.half(),
        predictions=simulator.denoiser(inputs.half().float()).half(),
        timesteps=torch.arange(float(STEPS)),
        states=torch.zeros(prompts, 1, 1),
        empty=torch.zeros(1, 1, 1),
        guidance=1.0,
    )


def plan_for(simulator: Any, **changes: Any) -> Plan:
    """Every layer is a unit."""
    count = len(simulator.layers)
    settings: dict[str, Any] = {
        "options": (8, 16),
        "parts": frozenset({"q"}),
        "units": simulator.layers,
        "unit_of_layer": tuple(range(count)),
        "groups": 3,
        "forced_steps": 0,
        "lambda_bit": 1e-3,
        "target_fab": None,
        "iterations": 150,
        "batch": 6,
        "seed": 0,
    }
    settings |= changes
    settings.setdefault("at_once", settings["batch"])
    settings.setdefault("costs", bit_costs(settings["options"], settings["unit_of_layer"], count))
    return Plan(**settings)


def trained(simulator: ToySimulator, **changes: Any) -> Learned:
    runs_ = runs(simulator)
    qualities = torch.linspace(0, 1, len(runs_.inputs))
    return train_q2b(simulator, runs_, qualities, plan_for(simulator, **changes))  # type: ignore[arg-type]


def bits_of(
    learned: Learned, options: tuple[int, ...], q: float, step: int, forced: bool = False
) -> list[int]:
    choice, _ = learned.q2b(torch.tensor([q]), step * 3 // STEPS, forced)
    return [options[int(i)] for i in choice[0].argmax(-1)]


# --- what is learned


@pytest.mark.parametrize(("options", "parts"), VARIANTS)
def test_bits_go_where_they_matter(options: tuple[int, ...], parts: tuple[Part, ...]) -> None:
    """At 8 bits and below both layers lose most of their input; only one of them has a say in the output."""
    simulator = toy({"harmless": 0.0, "vital": 1.0}, threshold=0.05)
    learned = trained(simulator, options=options, parts=frozenset(parts))
    for step in range(STEPS):
        for q in (0.0, 0.5, 1.0):
            harmless, vital = bits_of(learned, options, q, step)
            assert harmless == options[0], (q, step)
            assert vital >= 16, (q, step)
    assert learned.error < 1e-3
    assert (options[0] + 16) / 2 <= learned.fab <= (options[0] + options[-1]) / 2


def test_a_dearer_bit_is_bought_less_often() -> None:
    """Layers that matter more and more: a higher price leaves fewer of them their bits."""
    simulator = toy({f"layer{i}": 0.02 * 3**i for i in range(5)}, threshold=0.5)
    fabs = [trained(simulator, lambda_bit=weight).fab for weight in (1e-6, 1e-3, 1e-1, 100.0)]
    assert fabs == sorted(fabs, reverse=True)
    assert fabs[0] == 16 and fabs[-1] == 8
    assert len(set(fabs)) > 2


def test_cost_decides_between_units_alike() -> None:
    simulator = toy({"cheap": 0.3, "dear": 0.3}, threshold=0.5)
    learned = trained(simulator, costs=torch.tensor([[0.0, 1e-4], [0.0, 1e4]]))
    assert bits_of(learned, (8, 16), 0.5, 0) == [16, 8]


@pytest.mark.parametrize(("target", "met"), [(9.0, 9.0), (12.0, 12.0), (15.0, 15.0), (30.0, 16.0)])
def test_target_is_met_where_it_can_be(target: float, met: float) -> None:
    """More than 16 bits help no layer of this toy: then it stays at those."""
    simulator = toy({f"layer{i}": 0.02 * 3**i for i in range(5)}, threshold=0.5)
    learned = trained(
        simulator,
        options=(8, 16, 32),
        parts=frozenset({"q", "m", "h"}),
        lambda_bit=None,
        target_fab=target,
        iterations=100,
    )
    assert learned.fab == pytest.approx(met, rel=0.02)


def test_forced_steps_run_as_for_the_best_prompt() -> None:
    simulator = toy({"harmless": 0.0, "vital": 1.0}, threshold=0.05)
    learned = trained(simulator, forced_steps=2)
    assert bits_of(learned, (8, 16), 0.5, 0, forced=True) == [16, 16]
    assert learned.fab == pytest.approx((2 * 16 + 4 * 12) / 6)


def test_training_is_reproducible_and_leaves_no_rounding_behind() -> None:
    simulator = toy({"harmless": 0.0, "vital": 1.0}, threshold=0.05)
    first, second = (trained(simulator, iterations=5) for _ in range(2))
    assert torch.equal(first.q2b.offset, second.q2b.offset)
    assert not torch.equal(first.q2b.offset, trained(simulator, iterations=5, seed=1).q2b.offset)
    x = torch.randn(2, 4)
    assert torch.equal(simulator.denoiser(x), x)


@pytest.mark.parametrize("at_once", [1, 4])
def test_what_runs_at_once_changes_no_result(at_once: int) -> None:
    """A part that is smaller than the others counts less."""
    simulator = toy({"harmless": 0.0, "vital": 1.0}, threshold=0.05)
    together, apart = (trained(simulator, at_once=n, iterations=20) for n in (6, at_once))
    for name, value in together.q2b.state_dict().items():
        torch.testing.assert_close(apart.q2b.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert apart.fab == pytest.approx(together.fab, rel=1e-5)
    assert apart.error == pytest.approx(together.error, rel=1e-5)


def test_progress_hears_of_every_iteration() -> None:
    simulator, heard = toy({"vital": 1.0}, threshold=0.05), []
    runs_ = runs(simulator)
    train_q2b(
        simulator,  # type: ignore[arg-type]
        runs_,
        torch.full((8,), 0.9),
        plan_for(simulator, iterations=3),
        lambda fab, error: heard.append((fab, error)),
    )
    assert [fab for fab, _ in heard] == [16, 16, 16]
    assert all(error < 1e-3 for _, error in heard)


# --- costs, averages, targets


def test_cost_is_the_bits_of_every_layer_and_the_lowest_is_free() -> None:
    assert bit_costs((8, 16, 32), (0, 0, 1), 2).tolist() == [[0, 32, 64], [0, 16, 32]]


def spread(options: tuple[int, ...], parts: tuple[Part, ...], units: int = 20) -> QualityToBits:
    """Return a Q2B whose units change their mind at many qualities."""
    q2b = QualityToBits(options, units, 3, frozenset(parts))
    generator = torch.Generator().manual_seed(0)
    for parameter, width in zip(q2b.parameters(), (6.0, 2.0, 1.0, 1.0), strict=False):
        parameter.data = width * torch.randn(parameter.shape, generator=generator)
    return q2b


def spread_plan(options: tuple[int, ...], parts: tuple[Part, ...], **changes: Any) -> Plan:
    units = tuple(f"unit{i}" for i in range(20))
    plan = plan_for(ToySimulator(Toy(dict.fromkeys(units, 1.0)), {}), options=options, parts=frozenset(parts))
    # Two layers in each of the first ten units, so that units do not count alike.
    return replace(plan, unit_of_layer=(*range(20), *range(10)), **changes)


@pytest.mark.parametrize(("options", "parts"), VARIANTS)
def test_average_is_that_of_the_decision_table(options: tuple[int, ...], parts: tuple[Part, ...]) -> None:
    q2b, plan = spread(options, parts), spread_plan(options, parts, forced_steps=1)
    qualities = torch.linspace(0.02, 0.98, 9)
    table = q2b.table(plan.units, [step * 3 // STEPS for step in range(STEPS)], 1)
    bits = torch.tensor([[table.bits(float(q), step) for step in range(STEPS)] for q in qualities])
    expected = float(bits[:, :, list(plan.unit_of_layer)].float().mean())
    assert mean_bits(q2b, plan, qualities, STEPS) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("options", "parts"), VARIANTS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_shift_meets_what_can_be_met(options: tuple[int, ...], parts: tuple[Part, ...], share: float) -> None:
    q2b, qualities = spread(options, parts), torch.linspace(0, 1, 50)
    reach = spread_plan(options, parts)
    ends = []
    for target in (0.0, 100.0):
        other = spread(options, parts)
        shift_to(other, replace(reach, target_fab=target), qualities, STEPS)
        ends.append(mean_bits(other, reach, qualities, STEPS))
    assert ends[0] < ends[1]
    plan = replace(reach, target_fab=ends[0] + share * (ends[1] - ends[0]))
    shift_to(q2b, plan, qualities, STEPS)
    assert mean_bits(q2b, plan, qualities, STEPS) == pytest.approx(plan.target_fab, rel=0.02)


def test_the_tiny_model_learns(towers: Path, calibration: Path, trajectories: Trajectories) -> None:
    """Through the real denoiser: gradients reach every unit, and the price lowers the bits."""
    from qlip_export.checkpoint import Checkpoint

    simulator = Simulator(Checkpoint(towers), ranges=Ranges.load(calibration / "ranges.json"), steps=4)
    plan = plan_for(simulator, iterations=6, batch=4, lambda_bit=1e4, groups=2)
    learned = train_q2b(simulator, trajectories, torch.full((4,), 0.51), plan)
    assert learned.fab == 8
    assert learned.error > 0
    free = train_q2b(
        simulator, trajectories, torch.full((4,), 0.51), replace(plan, lambda_bit=1e-12, iterations=1)
    )
    assert (free.q2b.offset != 0).all()
    assert free.fab > 8
