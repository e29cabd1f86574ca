"""Q/DQ puts the input of a layer on a symmetric grid, and nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qlip_export.errors import QlipError
from qlip_export.graph.layers import find_layers
from qlip_export.graph.qdq import insert_qdq
from qlip_export.quant.ranges import activation_scale
from tests.graph.conftest import graph, relative, run

RNG = np.random.default_rng(0)
X = (2 * RNG.standard_normal((3, 4, 8, 8))).astype(np.float32)
W = RNG.standard_normal((5, 4, 3, 3)).astype(np.float32)


def convolution() -> ir.Model:
    return graph("""
        g (float[3, 4, 8, 8] x, float[5, 4, 3, 3] conv__weight) => (float[3, 5, 8, 8] y) {
            y = Conv <pads: ints = [1, 1, 1, 1]> (x, conv__weight)
        }
    """)


def fake_quantized(x: np.ndarray, threshold: float, bits: int) -> np.ndarray:
    """Round to the nearest level (ties to even), saturate at the last one: the definition.

    Below zero INT8 has one level more than above, and 8 bits use it; narrower grids are symmetric.
    """
    high = 2 ** (bits - 1) - 1
    low = -128 if bits == 8 else -high
    scale = np.float64(np.float16(threshold / high))
    return (np.clip(np.rint(x / scale), low, high) * scale).astype(np.float32)


@pytest.mark.parametrize("threshold", [0.7, 3.0, 8.0])
@pytest.mark.parametrize("bits", [8, 7, 6, 4, 2])
def test_grid_is_that_of_the_formula(bits: int, threshold: float) -> None:
    model = convolution()
    assert insert_qdq(model, {"conv": bits}, {"conv": threshold}) == 1
    found = run(model, {"x": X, "conv.weight": W})["y"]
    rounded = fake_quantized(X, threshold, bits)
    expected = run(convolution(), {"x": rounded, "conv.weight": W})["y"]
    assert relative(found, expected) < 1e-6


def test_fewer_bits_lie_further_off() -> None:
    exact = run(convolution(), {"x": X, "conv.weight": W})["y"]
    errors = []
    for bits in (8, 6, 4):
        model = convolution()
        insert_qdq(model, {"conv": bits}, {"conv": float(np.abs(X).max())})
        errors.append(relative(run(model, {"x": X, "conv.weight": W})["y"], exact))
    assert errors[0] < 0.02 < errors[1] < errors[2]
    # Each bit less doubles the step.
    assert errors[1] / errors[0] == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize("bits", [8, 6])
def test_scale_survives_fp16_and_reaches_the_threshold(bits: int) -> None:
    scale = activation_scale(3.3, bits)
    assert float(np.float16(scale)) == scale
    assert scale * (2 ** (bits - 1) - 1) == pytest.approx(3.3, rel=1e-3)


def test_tiny_and_huge_thresholds_stay_in_fp16() -> None:
    assert activation_scale(1e-9, 8) == 2.0**-14
    assert activation_scale(1e9, 8) == 65504.0


def two_readers() -> ir.Model:
    return graph("""
        g (float[2, 7, 5] x, float[9, 5] q__weight, float[9, 5] k__weight)
            => (float[2, 7, 9] a, float[2, 7, 9] b)
        {
            qt = Transpose <perm: ints = [1, 0]> (q__weight)
            kt = Transpose <perm: ints = [1, 0]> (k__weight)
            a = MatMul (x, qt)
            b = MatMul (x, kt)
        }
    """)


def quantizers(model: ir.Model) -> int:
    return sum(node.op_type == "QuantizeLinear" for node in model.graph)


def test_layers_that_read_the_same_tensor_share_one_pair() -> None:
    model = two_readers()
    assert insert_qdq(model, {"q": 8, "k": 8}, {"q": 2.0, "k": 2.0}) == 2
    assert quantizers(model) == 1


def test_layers_with_different_ranges_or_bits_do_not_share() -> None:
    for bits, ranges in (({"q": 8, "k": 8}, {"q": 2.0, "k": 3.0}), ({"q": 8, "k": 6}, {"q": 2.0, "k": 2.0})):
        model = two_readers()
        insert_qdq(model, bits, ranges)
        assert quantizers(model) == 2
        ir.to_proto(model)


def test_layers_that_are_not_named_stay_as_they_are() -> None:
    model = two_readers()
    insert_qdq(model, {"q": 8}, {"q": 2.0})
    q, k = (layer.node for layer in find_layers(model.graph))
    assert (q.inputs[0].producer().op_type, k.inputs[0].name) == ("DequantizeLinear", "x")


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_range_must_be_positive(threshold: float) -> None:
    with pytest.raises(QlipError, match="no activation range for layer 'conv'"):
        insert_qdq(convolution(), {"conv": 8}, {"conv": threshold})


def test_missing_range_and_unknown_layer() -> None:
    with pytest.raises(QlipError, match=r"no activation range for layer 'conv'(.|\n)*found: None"):
        insert_qdq(convolution(), {"conv": 8}, {})
    with pytest.raises(QlipError, match=r"not in the graph(.|\n)*found: other"):
        insert_qdq(convolution(), {"other": 8}, {"other": 1.0})


def test_layers_that_share_an_input_share_a_pair_that_stands_before_all_of_them() -> None:
    """Named in alphabetical order, as manifests list them: `to_k` before `to_q`, which runs first."""
    model = graph("""
        g (float[2, 4] x, float[4, 4] to_q__weight, float[4, 4] to_k__weight)
        => (float[2, 4] q, float[2, 4] k) {
            q = MatMul (x, to_q__weight)
            k = MatMul (x, to_k__weight)
        }
    """)
    assert insert_qdq(model, {"to_k": 8, "to_q": 8}, {"to_k": 2.0, "to_q": 2.0}) == 2
    assert [node.op_type for node in model.graph].count("QuantizeLinear") == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
