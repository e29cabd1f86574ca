"""Learned rounding of weights, block by block: AdaRound as Q-Diffusion applies it to denoisers.

A weight may be rounded down or up to its grid. Which of the two is learned so that the output of a block (a
ResNet, a transformer block, or a single layer outside of these) stays what it is at full precision, on
inputs sampled over prompts and timesteps. Blocks are visited in the order in which they run; the inputs of
each come through the already quantized blocks before it (Nagel et al. 2020, equations 21-24; Li et al. 2023).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlip_export.calibrate.kept import KeptBlocks, LearnedBlock
from qlip_export.calibrate.trajectories import Trajectories
from qlip_export.capture import denoiser_family
from qlip_export.checkpoint import Checkpoint
from qlip_export.cuda_graph import recorded
from qlip_export.quant.layers import layers_of
from qlip_export.quant.rounding import floor_codes
from qlip_export.quant.weights import WeightQuantizer, code_range, round_to_nearest
from qlip_export.simulate import Simulator

BLOCKS = (
    "ResnetBlock2D",
    "BasicTransformerBlock",
    "FluxTransformerBlock",
    "FluxSingleTransformerBlock",
)
"""Classes reconstructed as a whole; all other layers are reconstructed one by one."""

STRETCH = (-0.1, 1.1)
"""The rectified sigmoid's range (AdaRound, equation 23): 0 and 1 are reached at finite values."""

REGULARIZATION = 0.01
WARM_UP = 0.2
BETA = (20.0, 2.0)


@dataclass(frozen=True)
class Rounded:
    """Learned rounding of all layers.

    Attributes:
        up: By layer, which weights go to the code above, shape of the weight.
        scale: By layer, (C,) float32.
        error_nearest: Mean over blocks of the squared output error of rounding to nearest, relative to the
            output.
        error_learned: The same with what was learned.
        flipped: Share of weights that do not go to the nearest code.
    """

    up: dict[str, NDArray[np.bool_]]
    scale: dict[str, NDArray[np.float32]]
    error_nearest: float
    error_learned: float
    flipped: float


def learn_rounding(
    simulator: Simulator,
    trajectories: Trajectories,
    *,
    bits: int,
    samples: int,
    iterations: int,
    batch: int,
    at_once: int,
    seed: int,
    kept: KeptBlocks | None = None,
    on_block: Callable[[str], None] = lambda _: None,
) -> Rounded:
    """Learn the rounding of every Conv2d and Linear of the denoiser.

    Args:
        simulator: With the full-precision weights; they stay as they are.
        trajectories: Where block inputs are sampled.
        bits: Weight bits.
        samples: Denoiser inputs to sample, half of them with the empty prompt.
        iterations: Steps of Adam for each block.
        batch: Samples of a step.
        at_once: Samples that run together, as many as the device holds; gradients of a step add up.
        seed: Of the choice of samples and batches.
        kept: Where blocks that an earlier run learned are taken from, and others are kept.
        on_block: Called with the name of each block before it is learned.
    """
    import copy

    torch.manual_seed(seed)
    # Learning needs FP32; the quantized copy is the one whose weights change.
    reference = copy.deepcopy(simulator.denoiser).float()
    quantized = copy.deepcopy(reference)
    latents, timesteps, states = _sample_inputs(trajectories, samples)
    model_inputs = [latents, timesteps, *simulator.inputs(states, trajectories.guidance)]
    whole_reference, whole_quantized = simulator.callable(reference), simulator.callable(quantized)
    names = {id(module): name for name, module in layers_of(quantized).items()}
    component = simulator.checkpoint.component(denoiser_family(simulator.checkpoint).denoiser_folder)

    def weights(layer: str) -> Tensor:
        # Those of the checkpoint, which the build rounds; on a GPU the denoiser holds them in FP16.
        return torch.from_numpy(component.get(f"{layer}.weight").astype(np.float32))

    blocks: list[LearnedBlock] = []
    for index, name in enumerate(blocks_of(simulator)):
        on_block(name)
        block = quantized.get_submodule(name)
        inside = {f"{n}.weight" if n else "weight": m for n, m in block.named_modules() if id(m) in names}
        roundings = {
            key: _Rounding(names[id(m)], weights(names[id(m)]).to(m.weight.device), bits)
            for key, m in inside.items()
        }
        learned = None if kept is None else kept.get(name)
        if learned is None:
            torch.manual_seed(seed + index)  # a run that goes on learns what one that nothing cut would have
            targets = _targets_of(reference.get_submodule(name), whole_reference, model_inputs, at_once)
            calls = _calls_of(block, whole_quantized, model_inputs, at_once)
            learned = _learned_block(block, roundings, calls, targets, iterations, batch, at_once)
            if kept is not None:
                kept.put(name, learned)
        blocks.append(learned)
        for key, rounding in roundings.items():
            up = torch.from_numpy(learned.up[rounding.layer]).to(rounding.rest.device)
            inside[key].weight.data.copy_(rounding.weight(up.float()))
    return Rounded(
        up={layer: up for block in blocks for layer, up in block.up.items()},
        scale={layer: scale for block in blocks for layer, scale in block.scale.items()},
        error_nearest=float(np.mean([block.error_nearest for block in blocks])),
        error_learned=float(np.mean([block.error_learned for block in blocks])),
        flipped=sum(b.flipped for b in blocks) / sum(up.size for b in blocks for up in b.up.values()),
    )


def quantized_weights(
    checkpoint: Checkpoint, layers: Sequence[str], quantize: WeightQuantizer, bits: int
) -> dict[str, NDArray[np.float32]]:
    """Return the weights of ``layers`` on their grid, float32, by parameter name."""
    component = checkpoint.component(denoiser_family(checkpoint).denoiser_folder)
    return {
        f"{name}.weight": quantize(
            name, component.get(f"{name}.weight").astype(np.float32), bits, 0
        ).dequantize()
        for name in layers
    }


def blocks_of(simulator: Simulator) -> list[str]:
    """Return the names of the blocks to reconstruct, in the order in which they run."""
    denoiser = simulator.denoiser
    found: list[str] = []
    for name, module in denoiser.named_modules():
        if any(name.startswith(f"{block}.") for block in found):
            continue
        if type(module).__name__ in BLOCKS or isinstance(module, (nn.Conv2d, nn.Linear)):
            found.append(name)
    order: list[str] = []
    handles = [
        denoiser.get_submodule(name).register_forward_pre_hook(lambda _m, _a, name=name: order.append(name))
        for name in found
    ]
    latents = torch.zeros(1, *simulator.latents_shape, device=simulator.device)
    with torch.no_grad():
        simulator.predict(latents, latents.new_zeros(1), simulator.encode([""]).states)
    for handle in handles:
        handle.remove()
    return order


class _Rounding(nn.Module):
    """The rounding of one weight: V of AdaRound, its soft and its hard form."""

    def __init__(self, name: str, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.layer = name
        array = weight.float().cpu().numpy()
        self.scale_array = round_to_nearest(name, array, bits, 0).scale
        shape = (-1, *[1] * (weight.ndim - 1))
        self.scale = torch.from_numpy(self.scale_array).to(weight.device).view(shape)
        self.floor = torch.from_numpy(floor_codes(array, self.scale_array)).to(weight.device)
        self.low, self.high = code_range(bits)
        self.rest = (weight.float() / self.scale - self.floor).clamp(0, 1)
        low, high = STRETCH
        inside = ((self.rest - low) / (high - low)).clamp(1e-4, 1 - 1e-4)
        self.logit = nn.Parameter(torch.log(inside / (1 - inside)))

    def share(self) -> Tensor:
        """Return h(V) in [0, 1], how far up each weight goes (equation 23)."""
        low, high = STRETCH
        return (torch.sigmoid(self.logit) * (high - low) + low).clamp(0, 1)

    def weight(self, up: Tensor) -> Tensor:
        return torch.clamp(self.floor + up, self.low, self.high) * self.scale

    def up(self) -> Tensor:
        return self.logit.detach() >= 0

    def nearest_up(self) -> Tensor:
        return self.rest >= 0.5

    def hard(self) -> Tensor:
        return self.weight(self.up().float())

    def nearest(self) -> Tensor:
        return self.weight(self.nearest_up().float())


class _Stack:
    """Rows of many calls in one FP16 tensor, there from the first on: joining them would hold all twice."""

    def __init__(self, count: int) -> None:
        self._count, self._filled = count, 0
        self.values = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        if not self._filled:
            self.values = rows.new_empty(self._count, *rows.shape[1:], dtype=torch.float16)
        self.values[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)


@dataclass(frozen=True)
class _Calls:
    """Many calls of a block: its arguments, tensors stacked; all else is alike and taken from the first."""

    positional: int
    names: tuple[str, ...]
    values: list[Any]

    def at(self, index: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of one call over the samples of ``index``, float32."""
        values = [v.values[index].float() if isinstance(v, _Stack) else v for v in self.values]
        named = zip(self.names, values[self.positional :], strict=True)
        return tuple(values[: self.positional]), dict(named)


def _sample_inputs(trajectories: Trajectories, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, timesteps and states of ``samples`` denoiser inputs spread over prompts and steps."""
    prompts, steps = trajectories.inputs.shape[:2]
    device = trajectories.inputs.device
    number = torch.arange(samples, device=device)
    # Every step equally often, with the empty prompt every other time; prompts at random.
    step, prompt = number % steps, torch.randint(prompts, (samples,), device=device)
    states = trajectories.states[prompt]
    if trajectories.empty is not None:
        empty = (step + number // steps) % 2 == 0
        states = torch.where(empty.view(-1, *[1] * (states.ndim - 1)), trajectories.empty, states)
    return trajectories.inputs[prompt, step], trajectories.timesteps[step], states


def _parts(count: int, at_once: int) -> Iterator[slice]:
    return (slice(start, min(start + at_once, count)) for start in range(0, count, at_once))


class _Reached(Exception):  # noqa: N818 - it ends a forward pass early and is no error
    pass


def _targets_of(block: nn.Module, called: nn.Module, model_inputs: Sequence[Tensor], at_once: int) -> Tensor:
    """Run the model up to and with ``block``; return the outputs of that, float16."""
    outputs = _Stack(len(model_inputs[0]))

    def after(_: nn.Module, args: Any, output: Any) -> None:
        outputs.add(_joined(output))
        raise _Reached

    with block.register_forward_hook(after):
        _reach(called, model_inputs, at_once)
    return outputs.values


def _calls_of(block: nn.Module, called: nn.Module, model_inputs: Sequence[Tensor], at_once: int) -> _Calls:
    """Run the model up to ``block``; return what that is called with."""
    calls: list[_Calls] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        if not calls:
            held = [_Stack(len(model_inputs[0])) if isinstance(v, Tensor) else v for v in given]
            calls.append(_Calls(len(args), tuple(kwargs), held))
        for stack, value in zip(calls[0].values, given, strict=True):
            if isinstance(stack, _Stack):
                stack.add(value)
        raise _Reached

    with block.register_forward_pre_hook(before, with_kwargs=True):
        _reach(called, model_inputs, at_once)
    return calls[0]


@torch.no_grad()
def _reach(called: nn.Module, model_inputs: Sequence[Tensor], at_once: int) -> None:
    """Run the model over all its inputs, each time until a hook has what it wants."""
    for part in _parts(len(model_inputs[0]), at_once):
        with contextlib.suppress(_Reached):
            called(*(t[part].float() for t in model_inputs))


def _run(block: nn.Module, weights: dict[str, Tensor], calls: _Calls, index: Any) -> Tensor:
    args, kwargs = calls.at(index)
    return _joined(torch.func.functional_call(block, weights, args, kwargs))


def _joined(output: Any) -> Tensor:
    """Return a block's output; text and image tokens (N, tokens, width) that it returns apart are joined."""
    joined: Tensor = output if isinstance(output, Tensor) else torch.cat(output, 1)
    return joined


@torch.no_grad()
def _error(
    block: nn.Module, weights: dict[str, Tensor], calls: _Calls, targets: Tensor, at_once: int
) -> float:
    """Return the squared error of the block's outputs relative to their energy."""
    error = energy = 0.0
    for part in _parts(len(targets), at_once):
        wanted = targets[part].float()
        error += float((_run(block, weights, calls, part) - wanted).square().sum())
        energy += float(wanted.square().sum())
    return error / max(energy, 1e-30)


def _learned_block(
    block: nn.Module,
    roundings: dict[str, _Rounding],
    calls: _Calls,
    targets: Tensor,
    iterations: int,
    batch: int,
    at_once: int,
) -> LearnedBlock:
    """Learn the rounding of the weights of ``block``, given by parameter name."""
    nearest = _error(block, {k: r.nearest() for k, r in roundings.items()}, calls, targets, at_once)
    _learn(block, roundings, calls, targets, iterations, batch, at_once)
    learned = _error(block, {k: r.hard() for k, r in roundings.items()}, calls, targets, at_once)
    return LearnedBlock(
        up={r.layer: r.up().cpu().numpy() for r in roundings.values()},
        scale={r.layer: r.scale_array for r in roundings.values()},
        error_nearest=nearest,
        error_learned=learned,
        flipped=sum(int((r.up() != r.nearest_up()).sum()) for r in roundings.values()),
    )


def _learn(
    block: nn.Module,
    learned: dict[str, _Rounding],
    calls: _Calls,
    targets: Tensor,
    iterations: int,
    batch: int,
    at_once: int,
) -> None:
    """Minimise reconstruction error and regularizer with Adam over random batches (equation 24)."""
    device = targets.device
    cuda = device.type == "cuda"
    optimizer = torch.optim.Adam([r.logit for r in learned.values()], lr=1e-2, capturable=cuda)
    beta = torch.full((), BETA[0], device=device)
    strength = torch.zeros((), device=device)

    def step() -> None:
        index = torch.randint(len(targets), (batch,), device=device)
        shares = {key: rounding.share() for key, rounding in learned.items()}
        weights = {key: learned[key].weight(share) for key, share in shares.items()}
        # Parts of the batch add up their gradients here; these go back through the rounding once.
        leaves = {key: weight.detach().requires_grad_() for key, weight in weights.items()}
        for part in _parts(batch, at_once):
            chosen = index[part]
            output = _run(block, leaves, calls, chosen)
            # Summed over channels, as Q-Diffusion's code does: the regularizer's strength is tuned to that.
            error = (output - targets[chosen].float()).square().sum(1 if output.ndim == 4 else -1).mean()
            (error * (len(chosen) / batch)).backward()
        regularizer = sum((1 - (2 * h - 1).abs().pow(beta)).sum() for h in shares.values())
        optimizer.zero_grad(set_to_none=not cuda)
        torch.autograd.backward(
            [strength * regularizer, *weights.values()], [None, *(leaf.grad for leaf in leaves.values())]
        )
        optimizer.step()

    run = recorded(step, device)
    for iteration in range(iterations):
        progress = iteration / iterations
        if progress >= WARM_UP:
            strength.fill_(REGULARIZATION)
            beta.fill_(BETA[1] + (BETA[0] - BETA[1]) * (1 - (progress - WARM_UP) / (1 - WARM_UP)))
        run()
