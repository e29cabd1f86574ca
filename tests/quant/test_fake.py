"""Fake quantization in torch: every sample on a grid of its own, and gradients for the choice among grids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from qlip_export.errors import QlipError
from qlip_export.quant.fake import (
    ChooseGrid,
    FakeQuantizer,
    _choice_gradients,
    grid_of,
    round_rows,
)
from qlip_export.quant.ranges import activation_scale

OPTIONS = [(1.5, 8), (0.8, 6), (0.0, 16), (0.0, 32)]
"""Threshold and bits of a sample each; the thresholds clip some values."""
GRIDS = torch.tensor([grid_of(*option) for option in OPTIONS])


def fake_quantize(x: Tensor, threshold: float, bits: int) -> Tensor:
    """Round all of ``x`` to one grid."""
    return round_rows(x, torch.tensor([grid_of(threshold, bits)]))


LAYOUTS = {
    "vectors": lambda: randn(4, 7),
    "tokens": lambda: randn(4, 3, 5),
    "images": lambda: randn(4, 3, 5, 2),
    "channels last": lambda: randn(4, 3, 5, 2).contiguous(memory_format=torch.channels_last),
    "a view": lambda: randn(4, 6, 5)[:, ::2],
    "one pixel": lambda: randn(4, 3, 1, 1),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def naive(x: Tensor, threshold: float, bits: int) -> Tensor:
    """What the engines compute: QuantizeLinear and DequantizeLinear, or a cast to FP16 and back."""
    if bits == 32:
        return x
    if bits == 16:
        return x.half().to(x.dtype)
    step, limit = activation_scale(threshold, bits), 2 ** (bits - 1) - 1
    codes = np.clip(np.rint(x.float().numpy() / np.float32(step)), -128 if bits == 8 else -limit, limit)
    return torch.from_numpy(codes * np.float32(step)).to(x.dtype)


# --- rounding


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_sample_is_rounded_to_its_own_grid(layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout]().to(dtype)
    rounded = round_rows(x, GRIDS)
    for sample, found, option in zip(x, rounded, OPTIONS, strict=True):
        assert torch.equal(found, fake_quantize(sample[None], *option)[0])
        assert torch.equal(found, naive(sample, *option))
    assert len({tuple(found.flatten().tolist()) for found in round_rows(x[:1].expand_as(x), GRIDS)}) > 2
    assert (rounded.shape, rounded.dtype) == (x.shape, dtype)
    for memory in (torch.contiguous_format, torch.channels_last):
        if x.ndim == 4 or memory is torch.contiguous_format:
            assert rounded.is_contiguous(memory_format=memory) or not x.is_contiguous(memory_format=memory)


def test_one_grid_serves_all_samples() -> None:
    x = randn(4, 3)
    assert torch.equal(round_rows(x, GRIDS[:1]), round_rows(x, GRIDS[:1].expand(4, 3)))


@pytest.mark.parametrize(("bits", "lowest", "highest"), [(8, -128, 127), (6, -31, 31), (4, -7, 7)])
def test_lowest_and_highest_code(bits: int, lowest: int, highest: int) -> None:
    """INT8's lowest code can be reached in the engines; a narrower grid is clipped, symmetrically, before."""
    step = activation_scale(1.0, bits)
    codes = fake_quantize(torch.tensor([-1e6, 0.0, 1e6]), 1.0, bits) / step
    assert codes.tolist() == [lowest, 0, highest]


def test_ties_go_to_the_even_code() -> None:
    step = activation_scale(1.0, 8)
    assert (fake_quantize(torch.tensor([0.5, 1.5, 2.5]) * step, 1.0, 8) / step).tolist() == [0, 2, 2]


# --- gradients


@layouts
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_gradient_of_a_choice_is_what_each_grid_would_have_done(
    layout: str, count: int, memory: torch.memory_format
) -> None:
    """Whatever the memory layout in which the gradient arrives: a convolution may turn it around."""
    options, x = OPTIONS[:count], LAYOUTS[layout]().requires_grad_()
    choice = torch.tensor([0, 1, count - 1, 0])
    weights = nn.functional.one_hot(choice, count).float().requires_grad_()
    output = ChooseGrid.apply(x, weights, GRIDS[:count])
    assert torch.equal(output, round_rows(x.detach(), GRIDS[choice]))
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    if gradient.ndim == 4:
        gradient = gradient.contiguous(memory_format=memory)
    output.backward(gradient)
    expected = torch.tensor(
        [
            [float((g * naive(sample, *option)).sum()) for option in options]
            for sample, g in zip(x.detach(), gradient, strict=True)
        ]
    )
    assert weights.grad is not None and x.grad is not None
    torch.testing.assert_close(weights.grad, expected, rtol=1e-5, atol=1e-5)
    # Straight through the rounding; nothing where the chosen grid clipped.
    for sample, g, passed, chosen in zip(x.detach(), gradient, x.grad, choice, strict=True):
        threshold, bits = options[chosen]
        clipped = (naive(sample, threshold, bits) - sample).abs() > 0.51 * activation_scale(threshold, bits)
        assert torch.equal(passed, torch.where(clipped & torch.tensor(bits <= 8), 0.0, g))
    if layout != "one pixel":
        assert (x.grad == 0).any() and (x.grad != 0).any()


def test_sixteen_and_thirty_two_bits_clip_nothing() -> None:
    x = torch.tensor([[1e4], [1e4]], requires_grad=True)
    ChooseGrid.apply(x, torch.eye(2), GRIDS[2:]).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[1.0], [1.0]]


def test_gradients_are_one_graph_for_the_compiler() -> None:
    """On a GPU many small kernels would take longer than the denoiser; other sizes and layers reuse it."""
    counted = CompileCounter()
    compiled = torch.compile(_choice_gradients, dynamic=True, fullgraph=True, backend=counted)
    layers = torch.stack([GRIDS] * 4)
    for count, size, grids in zip((5, 5, 9, 64), (128, 30, 9, 4096), layers, strict=True):
        rows = randn(count, size)
        arguments = (rows, rows.flip(0), grids[torch.arange(count) % 4], grids)
        for mine, theirs in zip(compiled(*arguments), _choice_gradients(*arguments), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert counted.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 4])
def test_compiled_for_a_gpu_it_is_the_same(count: int) -> None:
    """In FP16 and channels last, as the denoiser is there."""
    x = randn(4, 8, 16, 16).half().contiguous(memory_format=torch.channels_last)
    choice = nn.functional.one_hot(torch.tensor([0, 1, count - 1, 0]), count).float()
    found = []
    for device in ("cpu", "cuda"):
        values, weights = (t.detach().clone().to(device).requires_grad_() for t in (x, choice))
        output = ChooseGrid.apply(values, weights, GRIDS[:count].to(device))
        output.backward(x.flip(0).to(device))
        assert values.grad is not None and weights.grad is not None
        found.append([t.detach().cpu() for t in (output, values.grad, weights.grad)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-2)


# --- hooks


@pytest.fixture
def denoiser() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3), nn.SiLU(), nn.Linear(3, 3))


def test_only_the_layers_named_are_quantized(denoiser: Any) -> None:
    quantizer, x = FakeQuantizer(denoiser, {8: {"0": 1.5, "2": 1.0}}), randn(4, 3)
    plain = denoiser(x)
    quantizer.set_bits({"0": 8})
    assert torch.equal(denoiser(x), denoiser[2](denoiser[1](denoiser[0](naive(x, 1.5, 8)))))
    quantizer.set_bits({"2": 16})
    assert torch.equal(denoiser(x), denoiser[2](naive(denoiser[1](denoiser[0](x)), 0.0, 16)))
    quantizer.set_functions({})
    assert torch.equal(denoiser(x), plain)


def test_removing_leaves_nothing_behind(denoiser: Any) -> None:
    quantizer, x = FakeQuantizer(denoiser, {8: {"0": 1.5}}), randn(4, 3)
    quantizer.set_bits({"0": 8})
    quantized = denoiser(x)
    quantizer.remove()
    assert not torch.equal(denoiser(x), quantized)
    assert not any(module._forward_pre_hooks for module in denoiser.modules())


def test_what_is_unknown_is_refused(denoiser: Any) -> None:
    quantizer = FakeQuantizer(denoiser, {8: {"0": 1.5}})
    with pytest.raises(QlipError, match="the denoiser has no layer '1'"):
        quantizer.set_bits({"1": 8})
    with pytest.raises(QlipError, match="the denoiser has no layer '1'"):
        quantizer.set_functions({"1": torch.relu})
    with pytest.raises(QlipError, match="no 6-bit range for layer '0'"):
        quantizer.grid("0", 6)
    assert quantizer.grids(["0", "2"], [16, 32]).tolist() == [[list(grid_of(0.0, b)) for b in (16, 32)]] * 2
