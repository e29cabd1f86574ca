"""Weights on the grid: error bounds, the choice of scale, and ONNX's INT4 layout."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qlip_export.errors import QlipError
from qlip_export.quant import weights
from qlip_export.quant.weights import (
    MIN_SCALE,
    QuantizedWeight,
    WeightQuantizer,
    code_range,
    pack_int4,
    round_to_nearest,
    unpack_int4,
)

some_weights = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=4, max_side=6),
    elements=st.floats(-1000, 1000, width=32),
)
some_codes = hnp.arrays(np.int8, hnp.array_shapes(max_dims=4, max_side=7), elements=st.integers(-8, 7))


def per_channel(values: np.ndarray, like: np.ndarray, axis: int) -> np.ndarray:
    shape = [1] * like.ndim
    shape[axis] = -1
    return values.reshape(shape)


@given(some_weights, st.sampled_from([2, 3, 4, 8]), st.data())
def test_error_is_at_most_half_a_step_inside_the_clip_range(
    weight: np.ndarray, bits: int, data: st.DataObject
) -> None:
    axis = data.draw(st.integers(-weight.ndim, weight.ndim - 1))
    result = round_to_nearest("layer", weight, bits, axis)
    low, high = code_range(bits)
    assert result.codes.shape == weight.shape
    assert result.scale.shape == (weight.shape[axis],)
    assert low <= result.codes.min() <= result.codes.max() <= high
    scale = per_channel(result.scale, weight, axis)
    inside = (weight >= (low - 0.5) * scale) & (weight <= (high + 0.5) * scale)
    error = np.abs(weight - result.dequantize())
    assert (error <= 0.5 * scale * (1 + 1e-5))[inside].all()
    # Outside, the nearest code is the last one on that side.
    assert np.isin(result.codes[~inside], [low, high]).all()


@given(some_weights)
def test_scales_survive_fp16(weight: np.ndarray) -> None:
    scale = round_to_nearest("layer", weight, 4, 0).scale
    np.testing.assert_array_equal(scale.astype(np.float16).astype(np.float32), scale)
    assert (scale >= MIN_SCALE).all()


@given(some_weights, st.sampled_from([2, 4, 8]))
def test_never_worse_than_no_clipping(weight: np.ndarray, bits: int) -> None:
    low, high = code_range(bits)
    chosen = round_to_nearest("layer", weight, bits, 0)
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    limit = np.maximum(np.abs(rows).max(axis=1) / high, MIN_SCALE)
    plain = limit.astype(np.float16).astype(np.float64)[:, None]
    unclipped = np.clip(np.rint(rows / plain), low, high) * plain
    error = ((chosen.dequantize().reshape(rows.shape) - rows) ** 2).sum(axis=1)
    assert (error <= ((unclipped - rows) ** 2).sum(axis=1) * (1 + 1e-4) + 1e-9).all()


def test_normal_weights_are_near_the_best_uniform_quantizer() -> None:
    """The optimal 16-level uniform quantizer of a normal source has a distortion of 0.01154 (Max 1960)."""
    weight = np.random.default_rng(0).standard_normal((8, 20000)).astype(np.float32)
    error = np.mean((round_to_nearest("layer", weight, 4, 0).dequantize() - weight) ** 2)
    assert error < 0.01154 * 1.06


def test_outlier_is_clipped_in_its_own_channel_only() -> None:
    weight = np.random.default_rng(0).standard_normal((2, 4000)).astype(np.float32)
    calm = round_to_nearest("layer", weight, 4, 0).scale
    weight[1, 0] = 12.0
    scale = round_to_nearest("layer", weight, 4, 0).scale
    assert scale[0] == calm[0]
    assert scale[1] < 12 / 7 / 3


def test_scales_follow_the_axis() -> None:
    weight = np.random.default_rng(0).standard_normal((3, 5, 2)).astype(np.float32)
    moved = round_to_nearest("layer", np.moveaxis(weight, 0, 2), 4, 2)
    result = round_to_nearest("layer", weight, 4, 0)
    np.testing.assert_array_equal(np.moveaxis(moved.codes, 2, 0), result.codes)
    np.testing.assert_array_equal(moved.scale, result.scale)
    assert moved.codes.flags.c_contiguous


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_normal((7, 9, 3, 3)).astype(np.float32)
    whole = round_to_nearest("layer", weight, 4, 0)
    monkeypatch.setattr(weights, "CHUNK", 100)
    parts = round_to_nearest("layer", weight, 4, 0)
    np.testing.assert_array_equal(whole.codes, parts.codes)
    np.testing.assert_array_equal(whole.scale, parts.scale)


def test_zero_and_tiny_channels_are_safe() -> None:
    weight = np.array([[0, 0], [1e-30, -1e-30], [7, -7]], np.float32)
    result = round_to_nearest("layer", weight, 4, 0)
    assert result.scale.tolist() == [MIN_SCALE, MIN_SCALE, 1]
    assert result.codes.tolist() == [[0, 0], [0, 0], [7, -7]]


def test_lowest_code_is_used_and_ties_go_to_even() -> None:
    # Nearly all of the channel lies on the grid of scale 1, which makes that scale the best one.
    result = round_to_nearest("layer", np.array([[7, 2.5, 3.5, -2.5] + [7, -7, 1] * 50], np.float32), 4, 0)
    assert result.scale == [1]
    assert result.codes[0, :4].tolist() == [7, 2, 4, -2]
    negative = np.tile(np.arange(-8, 1, dtype=np.float32), (1, 20))
    assert round_to_nearest("layer", negative, 4, 0).codes.min() == -8


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_float_is_taken(dtype: type[np.floating]) -> None:
    result = round_to_nearest("layer", np.array([[1.0, -0.5]], dtype), 8, 0)
    assert result.dequantize().dtype == np.float32
    np.testing.assert_allclose(result.dequantize(), [[1, -0.5]], atol=0.005)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(
        QlipError, match=r"layer 'mid.conv1' are not finite(.|\n)*1 NaN or infinite values of 4"
    ):
        round_to_nearest("mid.conv1", np.array([[1, bad], [2, 3]], np.float32), 4, 0)


def test_other_refusals() -> None:
    with pytest.raises(QlipError, match="layer 'a' are too large"):
        round_to_nearest("a", np.full((2, 2), 1e9, np.float32), 4, 0)
    with pytest.raises(QlipError, match="layer 'a' are too large"):
        round_to_nearest("a", np.array([[1.0, -1e300]]), 8, 0)
    with pytest.raises(QlipError, match="layer 'a' is empty"):
        round_to_nearest("a", np.empty((0, 3), np.float32), 4, 0)
    with pytest.raises(QlipError, match="no weight grid of 1 bits"):
        round_to_nearest("a", np.ones((2, 2), np.float32), 1, 0)


def test_methods_are_interchangeable() -> None:
    method: WeightQuantizer = round_to_nearest
    assert isinstance(method("layer", np.ones((2, 2), np.float32), 4, 0), QuantizedWeight)


@given(some_codes)
def test_packing_round_trip(codes: np.ndarray) -> None:
    packed = pack_int4(codes)
    assert packed.dtype == np.uint8
    assert packed.size == (codes.size + 1) // 2
    np.testing.assert_array_equal(unpack_int4(packed, codes.shape), codes)


@given(some_codes)
def test_layout_is_that_of_onnx(codes: np.ndarray) -> None:
    tensor = onnx.numpy_helper.from_array(codes.astype(ml_dtypes.int4))
    assert tensor.data_type == onnx.TensorProto.INT4
    assert pack_int4(codes).tobytes() == tensor.raw_data


def test_layout_by_hand() -> None:
    assert pack_int4(np.array([1, -1, 7], np.int8)).tolist() == [0xF1, 0x07]
    # A transposed view is packed in its own row-major order, not in that of its memory.
    assert pack_int4(np.array([[1, 2], [3, 4]], np.int8).T).tolist() == [0x31, 0x42]


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\[-8, 7\], found \[-9, 0\]"):
        pack_int4(np.array([-9, 0], np.int8))
    with pytest.raises(ValueError, match="3 codes take 2 bytes, found 1"):
        unpack_int4(np.zeros(1, np.uint8), (3,))
