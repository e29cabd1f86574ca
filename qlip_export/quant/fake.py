"""The quantized denoiser in torch: the same grids as the engines, at any bits for any layer and sample.

A layer's input is rounded to what the container of its bits holds. The bits may differ from sample to sample
of a batch, so that prompts with different schedules run side by side; and the choice may carry a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qlip_export.errors import QlipError
from qlip_export.quant.layers import layers_of
from qlip_export.quant.ranges import activation_scale
from qlip_export.spec import Container, container_of

Grid = tuple[float, float, float]
"""Step, lowest and highest code of a grid. A step of 0 leaves values as they are, one below 0 means FP16."""

_EXACT: Grid = (0.0, 0.0, 0.0)
_HALF: Grid = (-1.0, 0.0, 0.0)


def grid_of(threshold: float, bits: int) -> Grid:
    """Return the grid of an activation option.

    Up to 8 bits: symmetric, reaching ``threshold``; INT8's lowest code is reachable in the engines, so it is
    here. 9 to 16 bits: FP16. 32 bits: values as they are.
    """
    container = container_of(bits)
    if container is Container.INT8:
        limit = 2 ** (bits - 1) - 1
        return activation_scale(threshold, bits), float(-128 if bits == 8 else -limit), float(limit)
    return _HALF if container is Container.HALF else _EXACT


def round_rows(x: Tensor, grids: Tensor) -> Tensor:
    """Round every sample of ``x`` to a grid of its own.

    Args:
        x: (N, ...), any float dtype.
        grids: (N or 1, 3) float32, a `Grid` for each sample.
    """
    rows = _as_rows(x, x)
    rounded: Tensor = _fused(_round)(rows, grids)
    return _as_was(rounded, x)


class ChooseGrid(torch.autograd.Function):
    """Rounds every sample to the grid it chose, and tells the choice what each grid would have done.

    Forward is `round_rows`. Backward, the gradient for the weight of grid ``o`` is the inner product of the
    output's gradient with ``x`` rounded to that grid (the output is the weighted sum of all of them, with
    one-hot weights); values pass straight through the rounding, and stop where they were clipped.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, grids: Tensor) -> Tensor:
        """Round ``x``.

        Args:
            ctx: Of autograd.
            x: (N, ...), any float dtype.
            weights: (N, options) float32, one-hot.
            grids: (options, 3) float32.
        """
        ctx.save_for_backward(x, weights, grids)
        return round_rows(x, grids[weights.argmax(1)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of ``x`` and of ``weights``."""
        x, weights, grids = ctx.saved_tensors
        rows, gradient = _as_rows(x, x), _as_rows(gradients[0].to(x.dtype), x)
        passed, inner = _fused(_choice_gradients)(rows, gradient, grids[weights.argmax(1)], grids)
        return _as_was(passed, x), inner, None


class FakeQuantizer:
    """Quantizes the inputs of a denoiser's layers as it runs, through hooks.

    Layers that have not been given a function or bits stay as they are.
    """

    def __init__(self, denoiser: nn.Module, thresholds: Mapping[int, Mapping[str, float]]) -> None:
        """Attach to ``denoiser``.

        Args:
            denoiser: Its Conv2d and Linear modules are the layers, by their module path.
            thresholds: Clipping threshold by bits (those up to 8) and layer.
        """
        self._thresholds = thresholds
        self._functions: Mapping[str, Callable[[Tensor], Tensor]] = {}
        self._layers = layers_of(denoiser)
        self._handles = [
            module.register_forward_pre_hook(self._hook(name)) for name, module in self._layers.items()
        ]

    def set_bits(self, bits: Mapping[str, int]) -> None:
        """Choose the activation bits of layers from now on.

        Raises:
            QlipError: No such layer, or no range for it at these bits.
        """

        def at(grid: Grid) -> Callable[[Tensor], Tensor]:
            return lambda x: round_rows(x, torch.tensor([grid], device=x.device))

        self.set_functions({name: at(self.grid(name, option)) for name, option in bits.items()})

    def set_functions(self, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        """Choose what happens to the inputs of layers from now on, layer by layer.

        Raises:
            QlipError: No such layer.
        """
        if unknown := set(functions) - set(self._layers):
            raise QlipError(f"the denoiser has no layer {min(unknown)!r}")
        self._functions = functions

    def grid(self, layer: str, bits: int) -> Grid:
        """Return the grid of a layer's input.

        Raises:
            QlipError: No such layer, or no range for it at these bits.
        """
        if layer not in self._layers:
            raise QlipError(f"the denoiser has no layer {layer!r}")
        if container_of(bits) is not Container.INT8:
            return grid_of(0.0, bits)
        threshold = self._thresholds.get(bits, {}).get(layer)
        if threshold is None:
            raise QlipError(f"no {bits}-bit range for layer {layer!r}", fix="calibrate again")
        return grid_of(threshold, bits)

    def grids(self, layers: Sequence[str], options: Sequence[int]) -> Tensor:
        """Return the grids of layers at bit options, (layers, options, 3) float32."""
        return torch.tensor([[self.grid(layer, bits) for bits in options] for layer in layers])

    def remove(self) -> None:
        """Detach from the denoiser."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def quantize_input(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            function = self._functions.get(name)
            return None if function is None else (function(args[0]), *args[1:])

        return quantize_input


def _round(x: Tensor, grids: Tensor) -> Tensor:
    # Unpacked in here: views of one tensor among its arguments make the compiler compile again and again.
    step, low, high = grids[:, :1], grids[:, 1:2], grids[:, 2:]
    wide = x.float()
    width = torch.where(step > 0, step, 1.0)
    grid = torch.clamp(torch.round(wide / width), low, high) * width
    return torch.where(step > 0, grid, torch.where(step < 0, wide.half().float(), wide)).to(x.dtype)


def _choice_gradients(x: Tensor, gradient: Tensor, chosen: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``x``, and its inner product with ``x`` on each of ``grids``, (N, options).

    The loop over the options is unrolled, so one kernel reads ``x`` and the gradient once.
    """
    step, low, high = chosen[:, :1], chosen[:, 1:2], chosen[:, 2:]
    wide = x.float()
    inside = (step <= 0) | ((wide >= (low - 0.5) * step) & (wide <= (high + 0.5) * step))
    passed = torch.where(inside, gradient, 0).to(gradient.dtype)
    inner = [(_round(x, grids[i : i + 1]).float() * gradient.float()).sum(1) for i in range(len(grids))]
    return passed, torch.stack(inner, 1)


RECOMPILE_LIMIT = 64
"""Each number of options is compiled for a few memory layouts; torch's own limit is 8, then it gives up."""


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    compiled: Callable[..., Any] = torch.compile(function, dynamic=True)
    return compiled


def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` as one kernel where launches and memory traffic cost more than compiling does."""
    if not torch.cuda.is_available():
        return function
    return lambda x, *rest: _compiled(function)(x, *rest) if x.is_cuda else function(x, *rest)


def _as_rows(x: Tensor, like: Tensor) -> Tensor:
    """Return ``x`` as (N, everything else), without a copy if it has the memory layout of ``like``.

    The elements are in the order of ``like``, so that rows of two tensors belong together.
    """
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(len(x), -1)


def _as_was(rows: Tensor, like: Tensor) -> Tensor:
    """Undo `_as_rows`: ``rows`` in the shape and layout of ``like``."""
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        n, c, h, w = like.shape
        return rows.reshape(n, h, w, c).permute(0, 3, 1, 2)
    return rows.reshape(like.shape)
