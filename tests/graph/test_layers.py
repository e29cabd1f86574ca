"""Which operations are layers, what they are called, and what they cost."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch

from qlip_export.families.unet import UNET
from qlip_export.graph.layers import find_layers, static_shape
from tests.graph.conftest import Arrays, graph


def test_layers_are_those_of_the_paper(captured: ir.Model) -> None:
    """BK-SDM-Tiny has 151 Conv2d and Linear layers, of which 141 are quantized."""
    names = [layer.name for layer in find_layers(captured.graph)]
    assert len(names) == len(set(names)) == 151
    left_out = {name for name in names if not UNET.quantizes(name)}
    assert len(left_out) == 10
    assert {name for name in left_out if not name.endswith(".conv_shortcut")} == {
        "time_embedding.linear_1",
        "time_embedding.linear_2",
    }


def test_names_are_those_of_diffusers(captured: ir.Model, denoiser: Any) -> None:
    kinds = {torch.nn.Conv2d: "conv", torch.nn.Linear: "linear"}
    modules = {name: kinds[type(m)] for name, m in denoiser.named_modules() if type(m) in kinds}
    assert {layer.name: layer.kind for layer in find_layers(captured.graph)} == modules


def test_macs_are_those_of_the_modules(captured: ir.Model, denoiser: Any, inputs: Arrays) -> None:
    counted: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(module: Any, _: Any, output: torch.Tensor) -> None:
            counted[name] = output.numel() * module.weight[0].numel()

        return hook

    handles = [
        module.register_forward_hook(count(name))
        for name, module in denoiser.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    denoiser(*(torch.from_numpy(inputs[name]) for name in ("latents", "timestep", "text")))
    for handle in handles:
        handle.remove()
    assert {layer.name: layer.macs for layer in find_layers(captured.graph)} == counted


def test_convolution_and_both_ways_to_write_a_linear_layer() -> None:
    model = graph("""
        g (float[2, 3, 8, 8] x, float[2, 7, 5] t, float[6, 3, 3, 3] a__conv__weight, float[9, 5] b__weight,
           float[9, 5] c__weight, float[2, 5] v) => (float[2, 6, 4, 4] y, float[2, 7, 9] z, float[2, 9] w)
        {
            y = Conv <pads: ints = [1, 1, 1, 1], strides: ints = [2, 2]> (x, a__conv__weight)
            turned = Transpose <perm: ints = [1, 0]> (b__weight)
            z = MatMul (t, turned)
            w = Gemm <transB: int = 1> (v, c__weight)
        }
    """)
    conv, linear, gemm = find_layers(model.graph)
    assert (conv.name, conv.kind, conv.weight, conv.transposed) == ("a.conv", "conv", "a.conv.weight", False)
    assert conv.macs == 2 * 6 * 4 * 4 * 3 * 3 * 3
    assert (linear.name, linear.kind, linear.transposed) == ("b", "linear", True)
    assert linear.macs == 2 * 7 * 9 * 5
    assert (gemm.name, gemm.macs) == ("c", 2 * 9 * 5)


def test_products_of_activations_are_no_layers() -> None:
    model = graph("g (float[2, 3] q, float[3, 4] k) => (float[2, 4] y) { y = MatMul (q, k) }")
    assert find_layers(model.graph) == []


def test_static_shape_refuses_symbols() -> None:
    model = graph("g (float[N, 3] x) => (float[N, 3] y) { y = Relu (x) }")
    with pytest.raises(ValueError, match="'x' has no static shape"):
        static_shape(model.graph.inputs[0])
