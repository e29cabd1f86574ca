"""Q2B: learn at which quality each unit of the denoiser needs more bits, against the fake-quantized denoiser.

Loss (QLIP, equation of section 3.3): the squared difference of full-precision and quantized prediction, plus
lambda_bit times the cost of the chosen options. Only Q2B learns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qlip_export.calibrate.batching import slices
from qlip_export.calibrate.trajectories import Trajectories
from qlip_export.cuda_graph import recorded
from qlip_export.policy.q2b import Part, QualityToBits, timestep_groups
from qlip_export.quant.fake import ChooseGrid
from qlip_export.simulate import Simulator

TRAINER = 2
"""Raised when this code learns something else from the same settings: policies are then made again."""
LEARNING_RATE = 0.05
LAMBDA_BIT = 1e-3
"""Weight of the cost where none is given, and where steering it to a FAB starts."""
LAMBDA_RATE = 0.05
"""How fast lambda_bit follows the FAB in an iteration, where it is steered to a target."""
LOSS_SCALE = 16.0
"""FP16 gradients of the denoiser would lose their smallest values without it."""


@dataclass(frozen=True)
class Plan:
    """What Q2B decides over, and how it is trained.

    Attributes:
        options: Bit options, increasing.
        parts: Learned parts (figure S2).
        units: Names of the K units.
        unit_of_layer: Unit of every layer of the simulator, as an index.
        costs: (K, options) float32: the cost of each choice.
        groups: Timestep groups G.
        forced_steps: First steps with p_q = 1.
        lambda_bit: Weight of the cost; steered if ``target_fab`` is given.
        target_fab: Mean bits over layers and steps to aim for.
        iterations: Steps of Adam.
        batch: Prompts and timesteps of a step.
        at_once: Of these, how many run together, as many as the device holds; their gradients add up.
        seed: Of the batches.
    """

    options: tuple[int, ...]
    parts: frozenset[Part]
    units: tuple[str, ...]
    unit_of_layer: tuple[int, ...]
    costs: Tensor
    groups: int
    forced_steps: int
    lambda_bit: float | None
    target_fab: float | None
    iterations: int
    batch: int
    at_once: int
    seed: int


@dataclass(frozen=True)
class Learned:
    """A trained Q2B.

    Attributes:
        q2b: On the CPU.
        lambda_bit: At the end.
        fab: Mean bits over layers, steps and the training prompts.
        error: Mean squared error of the guided prediction over the last tenth of training.
    """

    q2b: QualityToBits
    lambda_bit: float
    fab: float
    error: float


def bit_costs(options: Sequence[int], unit_of_layer: Sequence[int], units: int) -> Tensor:
    """Return the paper's cost of each choice, (K, options): its bits for each layer; the lowest is free."""
    layers = torch.bincount(torch.tensor(unit_of_layer), minlength=units).float()
    bits = torch.tensor([0.0, *map(float, options[1:])])
    return layers[:, None] * bits


def train_q2b(
    simulator: Simulator,
    trajectories: Trajectories,
    qualities: Tensor,
    plan: Plan,
    on_iteration: Callable[[float, float], None] = lambda *_: None,
) -> Learned:
    """Train Q2B.

    Args:
        simulator: With the quantized weights and the activation ranges.
        trajectories: Of the full-precision model.
        qualities: (P,) float32 q of the trajectories' prompts.
        plan: See `Plan`.
        on_iteration: Gets FAB and error of each iteration.

    Raises:
        QlipError: Options or parts that do not fit, or a missing activation range.
    """
    device = simulator.device
    q2b = QualityToBits(plan.options, len(plan.units), plan.groups, plan.parts).to(device)
    grids = simulator.quantizer.grids(simulator.layers, plan.options).to(device)
    costs, layer_units = plan.costs.to(device), torch.tensor(plan.unit_of_layer, device=device)
    bits = torch.tensor(plan.options, dtype=torch.float32, device=device)
    qualities = qualities.to(device)
    prompts, steps = trajectories.inputs.shape[:2]
    group_of_step = torch.tensor(timestep_groups(steps, plan.groups), device=device)
    generator = torch.Generator(device=device).manual_seed(plan.seed)
    optimizer = torch.optim.Adam(q2b.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.iterations, LEARNING_RATE / 10)
    weight = LAMBDA_BIT if plan.lambda_bit is None else plan.lambda_bit
    errors: list[float] = []
    smooth: float | None = None
    # One timestep from each of `batch` equal parts of the run: all groups learn in every iteration.
    parts = torch.arange(plan.batch, device=device)
    prompt, step = torch.zeros_like(parts), torch.zeros_like(parts)
    cost_weight = torch.zeros((), device=device)

    def differentiate() -> Tensor:
        """Set the gradients for the batch; return its FAB and its error."""
        optimizer.zero_grad(set_to_none=False)
        found = torch.zeros(2, device=device)
        for part in slices(plan.batch, plan.at_once):
            found += differentiate_part(part)
        return found

    def differentiate_part(part: slice) -> Tensor:
        """Add a part's gradients; return its share of the batch's FAB and error."""
        row, at = prompt[part], step[part]
        choice, probability = q2b(qualities[row], group_of_step[at], at < plan.forced_steps)
        _choose(simulator, choice, plan.unit_of_layer, grids)
        prediction = simulator.guided(
            trajectories.inputs[row, at],
            trajectories.timesteps[at],
            trajectories.both_states(row),
            trajectories.guidance,
        )
        error = (prediction - trajectories.predictions[row, at].float()).square().flatten(1)
        cost = (probability * costs).sum((1, 2)).mean()
        share = len(row) / plan.batch
        (share * LOSS_SCALE * (error.sum(1).mean() + cost_weight * cost)).backward()
        fab = bits[choice.detach().argmax(-1)][:, layer_units].mean()
        return share * torch.stack([fab, error.detach().mean()])

    run = recorded(differentiate, device)
    for _ in range(plan.iterations):
        prompt.copy_(torch.randint(prompts, (plan.batch,), generator=generator, device=device))
        offset = torch.rand(plan.batch, generator=generator, device=device)
        step.copy_(((parts + offset) / plan.batch * steps).long().clamp(max=steps - 1))
        cost_weight.fill_(weight)
        fab, error = run().tolist()
        optimizer.step()
        schedule.step()
        errors.append(error)
        smooth = fab if smooth is None else 0.9 * smooth + 0.1 * fab
        if plan.target_fab is not None:
            weight *= math.exp(LAMBDA_RATE * max(-4.0, min(4.0, 10 * (smooth / plan.target_fab - 1))))
        on_iteration(fab, error)
    simulator.quantizer.set_functions({})
    q2b, qualities = q2b.cpu(), qualities.cpu()
    if plan.target_fab is not None:
        shift_to(q2b, plan, qualities, steps)
    last = errors[-max(1, len(errors) // 10) :]
    return Learned(q2b, weight, mean_bits(q2b, plan, qualities, steps), sum(last) / len(last))


@torch.no_grad()
def shift_to(q2b: QualityToBits, plan: Plan, qualities: Tensor, steps: int) -> None:
    """Shift all offsets by one number so that FAB meets its target, if any shift does: FAB grows with it."""
    assert plan.target_fab is not None
    start = q2b.offset.clone()
    low, high = -8.0, 8.0
    for _ in range(24):
        middle = (low + high) / 2
        q2b.offset.copy_(start + middle)
        if mean_bits(q2b, plan, qualities, steps) > plan.target_fab:
            high = middle
        else:
            low = middle
    q2b.offset.copy_(start + low)


@torch.no_grad()
def mean_bits(q2b: QualityToBits, plan: Plan, qualities: Tensor, steps: int) -> float:
    """Return FAB over prompts, steps and layers."""
    bits = torch.tensor(plan.options, dtype=torch.float32)
    chosen = q2b.run(qualities, timestep_groups(steps, plan.groups), plan.forced_steps)
    return float(bits[chosen].mean((0, 1))[list(plan.unit_of_layer)].double().mean())


def _choose(simulator: Simulator, choice: Tensor, unit_of_layer: Sequence[int], grids: Tensor) -> None:
    """Let every layer round its input to the grid that its unit chose; ``choice`` is (N, K, options)."""
    both = torch.cat([choice] * simulator.rows)
    simulator.quantizer.set_functions(
        {
            name: partial(_apply, weights=both[:, unit], grids=grid)
            for name, unit, grid in zip(simulator.layers, unit_of_layer, grids, strict=True)
        }
    )


def _apply(x: Tensor, weights: Tensor, grids: Tensor) -> Tensor:
    chosen: Tensor = ChooseGrid.apply(x, weights, grids)
    return chosen
