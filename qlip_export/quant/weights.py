"""Weights on a small signed grid: one scale per output channel, codes packed the way ONNX packs INT4.

The grid is symmetric (zero point 0) and uses all of its ``2**bits`` codes, the lowest one (-8 at 4 bits)
included: TensorRT, OpenVINO and ONNX Runtime all take it, and no error bound gets worse by one more code.
Scales are rounded to numbers that FP16 holds exactly, so that FP32 and FP16 engines share the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qlip_export.errors import QlipError

MIN_SCALE = 2.0**-14
"""The smallest normal FP16 number: below it scales lose digits, and some devices flush them to zero."""

MAX_SCALE = float(np.finfo(np.float16).max)

# Clipping a channel at a share of its largest magnitude. The error is flat around its minimum, so steps of 7%
# are within a percent of it; a normal channel has it near 0.6, one with a lonely outlier far below.
CLIPPING_RATIOS = np.geomspace(1.0, 0.1, 34)

# Elements worked on at a time: four float32 buffers of this size stay in a core's second-level cache.
CHUNK = 1 << 16


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight as integer codes and scales.

    Attributes:
        codes: int8, shape of the weight, values in ``[-2**(bits-1), 2**(bits-1) - 1]``.
        scale: float32 (C,), one for each index of ``axis``; at least `MIN_SCALE`.
        axis: The output channels' axis.
        bits: 2 to 8.
    """

    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    axis: int
    bits: int

    def dequantize(self) -> NDArray[np.float32]:
        """Return ``codes * scale``, float32, in the shape of the weight."""
        shape = [1] * self.codes.ndim
        shape[self.axis] = -1
        weight: NDArray[np.float32] = self.codes * self.scale.reshape(shape)
        return weight


class WeightQuantizer(Protocol):
    """A weight quantization method."""

    def __call__(self, name: str, weight: NDArray[Any], bits: int, axis: int) -> QuantizedWeight:
        """Quantize ``weight``, any shape and float dtype, with one scale for each index of ``axis``.

        Raises:
            QlipError: The weight of layer ``name`` cannot be quantized.
        """


def round_to_nearest(name: str, weight: NDArray[Any], bits: int, axis: int) -> QuantizedWeight:
    """Round every channel to its grid, with the scale of least squared error over `CLIPPING_RATIOS`.

    Ties go to the even code. A channel of zeros gets `MIN_SCALE`, and so does one too small for any larger
    scale. The first ratio is 1, so clipping is chosen only where it lowers the error.

    Args:
        name: The layer, for error messages.
        weight: Any shape and float dtype.
        bits: 2 to 8.
        axis: The output channels' axis.

    Raises:
        QlipError: The weight is empty, holds NaN or infinity, or needs a scale that FP16 cannot hold, or
            ``bits`` is out of range.
    """
    _check(name, weight, bits)
    low, high = code_range(bits)
    axis = axis % weight.ndim
    rows = np.moveaxis(weight, axis, 0)
    shape = rows.shape
    rows = rows.reshape(shape[0], -1)
    codes = np.empty(rows.shape, np.int8)
    scale = np.empty(shape[0], np.float32)
    step = max(1, CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[start : start + step], np.float32)
        chosen = _best_scale(part, low, high)
        scale[start : start + step] = chosen
        codes[start : start + step] = np.clip(np.rint(part / chosen[:, None]), low, high)
    codes = np.ascontiguousarray(np.moveaxis(codes.reshape(shape), 0, axis))
    return QuantizedWeight(codes=codes, scale=scale, axis=axis, bits=bits)


def code_range(bits: int) -> tuple[int, int]:
    """Return the lowest and the highest code of a signed grid."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def pack_int4(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack 4-bit codes as ONNX's INT4 does: row-major, two a byte, the first in the low nibble.

    Args:
        codes: int8, any shape, values in [-8, 7].

    Returns:
        uint8, ``(codes.size + 1) // 2`` bytes; an odd count leaves the last high nibble zero.

    Raises:
        ValueError: A code is outside [-8, 7].
    """
    if codes.size and (codes.min() < -8 or codes.max() > 7):
        raise ValueError(f"4-bit codes lie in [-8, 7], found [{codes.min()}, {codes.max()}]")
    nibbles: NDArray[np.uint8] = codes.astype(np.int8).ravel().view(np.uint8) & np.uint8(0xF)
    packed: NDArray[np.uint8] = nibbles[0::2].copy()
    packed[: nibbles.size // 2] |= nibbles[1::2] << 4
    return packed


def unpack_int4(packed: NDArray[np.uint8], shape: Sequence[int]) -> NDArray[np.int8]:
    """Undo `pack_int4`.

    Args:
        packed: uint8 of any shape, ``(size + 1) // 2`` bytes.
        shape: Shape of the codes.

    Returns:
        int8 codes in [-8, 7].

    Raises:
        ValueError: The number of bytes does not fit the shape.
    """
    size = int(np.prod(shape, dtype=np.int64))
    if packed.size != (size + 1) // 2:
        raise ValueError(f"{size} codes take {(size + 1) // 2} bytes, found {packed.size}")
    nibbles = np.empty(2 * packed.size, np.uint8)
    nibbles[0::2] = packed.ravel() & 0xF
    nibbles[1::2] = packed.ravel() >> 4
    # Flipping the sign bit and subtracting its value extends the sign.
    codes: NDArray[np.int8] = (nibbles[:size] ^ 8).view(np.int8) - np.int8(8)
    return codes.reshape(shape)


def _check(name: str, weight: NDArray[Any], bits: int) -> None:
    if not 2 <= bits <= 8:
        raise QlipError(f"no weight grid of {bits} bits", expected="2 to 8", found=str(bits))
    if weight.size == 0 or weight.ndim == 0:
        raise QlipError(f"the weight of layer {name!r} is empty", found=f"shape {weight.shape}")
    largest = max(float(weight.max()), -float(weight.min()))
    if not np.isfinite(largest):
        finite = np.isfinite(weight)
        raise QlipError(
            f"the weights of layer {name!r} are not finite",
            expected="finite numbers",
            found=f"{weight.size - np.count_nonzero(finite)} NaN or infinite values of {weight.size}",
            fix="check the checkpoint; an FP16 overflow in training or conversion is the usual cause",
        )
    limit = MAX_SCALE * code_range(bits)[1]
    if largest > limit:
        raise QlipError(
            f"the weights of layer {name!r} are too large",
            expected=f"magnitudes of at most {limit:g}",
            found=f"{largest:g}",
            fix="leave the weights at 32 bits",
        )


def _round_scale(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    half: NDArray[np.float16] = np.clip(scale, MIN_SCALE, MAX_SCALE).astype(np.float16)
    rounded: NDArray[np.float32] = half.astype(np.float32)
    return rounded


def _best_scale(rows: NDArray[np.float32], low: int, high: int) -> NDArray[np.float32]:
    """Return the scale of least squared error for every row; rows (R, n), result (R,)."""
    limit = np.abs(rows).max(axis=1) / np.float32(high)
    unclipped = _round_scale(limit)
    best: NDArray[np.float32] = unclipped.copy()
    least = np.full(len(rows), np.inf, np.float32)
    grid = np.empty_like(rows)
    # In units of the unclipped grid, so that squares neither overflow nor vanish.
    unit = rows / unclipped[:, None]
    for ratio in CLIPPING_RATIOS:
        scale = _round_scale(limit * np.float32(ratio))
        relative = (scale / unclipped)[:, None]
        np.multiply(unit, 1 / relative, out=grid)
        np.rint(grid, out=grid)
        np.clip(grid, low, high, out=grid)
        np.multiply(grid, relative, out=grid)
        np.subtract(grid, unit, out=grid)
        error = np.einsum("ij,ij->i", grid, grid)
        better = error < least
        least[better] = error[better]
        best[better] = scale[better]
    return best
