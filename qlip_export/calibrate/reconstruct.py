"""Reconstruction of one block: learn which of its weights to round up, so that its outputs stay the same.

AdaRound (Nagel et al. 2020, equations 21-24) over a whole block at a time, as BRECQ and Q-Diffusion do it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlip_export.calibrate.batching import Stack, slices
from qlip_export.calibrate.kept import LearnedBlock
from qlip_export.capture import CallableDenoiser
from qlip_export.cuda_graph import recorded
from qlip_export.quant.rounding import floor_codes
from qlip_export.quant.weights import code_range, round_to_nearest

STRETCH = (-0.1, 1.1)
"""The rectified sigmoid's range (AdaRound, equation 23): 0 and 1 are reached at finite values."""

REGULARIZATION = 0.01
WARM_UP = 0.2
BETA = (20.0, 2.0)


class Rounding(nn.Module):
    """The rounding of one weight: V of AdaRound, its soft and its hard form."""

    def __init__(self, name: str, weight: Tensor, bits: int) -> None:
        """Take the weight (C, ...) of layer ``name`` and scale it as rounding to nearest does."""
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
        """Return the weight for ``up``, 0 to 1, of its shape."""
        return torch.clamp(self.floor + up, self.low, self.high) * self.scale

    def up(self) -> Tensor:
        """Return which weights were learned to go up, bool."""
        return self.logit.detach() >= 0

    def nearest_up(self) -> Tensor:
        """Return which weights go up when rounded to nearest, bool."""
        return self.rest >= 0.5

    def hard(self) -> Tensor:
        """Return the weight as learned."""
        return self.weight(self.up().float())

    def nearest(self) -> Tensor:
        """Return the weight rounded to nearest."""
        return self.weight(self.nearest_up().float())


@dataclass(frozen=True)
class Models:
    """The denoiser at full precision, the one whose weights change, and what both run on.

    Attributes:
        reference: At full precision.
        quantized: With the weights that were learned so far.
        inputs: Of all samples.
        at_once: Samples that run together.
    """

    reference: CallableDenoiser
    quantized: CallableDenoiser
    inputs: list[Tensor]
    at_once: int

    def targets(self, name: str) -> Tensor:
        """Return the outputs of a block at full precision, float16."""
        outputs = Stack(len(self.inputs[0]))

        def after(_: nn.Module, args: Any, output: Any) -> None:
            outputs.add(_joined(output))
            raise _Reached

        with self.reference.module.get_submodule(name).register_forward_hook(after):
            self._reach(self.reference)
        return outputs.values

    def calls(self, name: str) -> _Calls:
        """Return what a block is called with after the quantized blocks before it."""
        calls: list[_Calls] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            if not calls:
                held = [Stack(len(self.inputs[0])) if isinstance(v, Tensor) else v for v in given]
                calls.append(_Calls(len(args), tuple(kwargs), held))
            for stack, value in zip(calls[0].values, given, strict=True):
                if isinstance(stack, Stack):
                    stack.add(value)
            raise _Reached

        with self.quantized.module.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True):
            self._reach(self.quantized)
        return calls[0]

    @torch.no_grad()
    def _reach(self, called: CallableDenoiser) -> None:
        """Run a model over all inputs, each time until a hook has what it wants."""
        for part in slices(len(self.inputs[0]), self.at_once):
            with contextlib.suppress(_Reached):
                called(*(t[part].float() for t in self.inputs))


def learn_block(
    models: Models, name: str, roundings: dict[str, Rounding], iterations: int, batch: int
) -> LearnedBlock:
    """Learn the rounding of a block's weights, given by parameter name; what it is learned on goes again."""
    block, at_once = models.quantized.module.get_submodule(name), models.at_once
    targets, calls = models.targets(name), models.calls(name)
    nearest = _error(block, {k: r.nearest() for k, r in roundings.items()}, calls, targets, at_once)
    _learn(block, roundings, calls, targets, iterations, batch, at_once)
    learned = _error(block, {k: r.hard() for k, r in roundings.items()}, calls, targets, at_once)
    return LearnedBlock(
        up={r.layer: r.up().cpu().numpy() for r in roundings.values()},
        error_nearest=nearest,
        error_learned=learned,
        flipped=sum(int((r.up() != r.nearest_up()).sum()) for r in roundings.values()),
    )


@dataclass(frozen=True)
class _Calls:
    """Many calls of a block: its arguments, tensors stacked; all else is alike and taken from the first."""

    positional: int
    names: tuple[str, ...]
    values: list[Any]

    def at(self, index: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of one call over the samples of ``index``, float32."""
        values = [v.values[index].float() if isinstance(v, Stack) else v for v in self.values]
        named = zip(self.names, values[self.positional :], strict=True)
        return tuple(values[: self.positional]), dict(named)


class _Reached(Exception):  # noqa: N818 - it ends a forward pass early and is no error
    pass


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
    for part in slices(len(targets), at_once):
        wanted = targets[part].float()
        error += float((_run(block, weights, calls, part) - wanted).square().sum())
        energy += float(wanted.square().sum())
    return error / max(energy, 1e-30)


def _learn(
    block: nn.Module,
    learned: dict[str, Rounding],
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
        for part in slices(batch, at_once):
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
