"""Activation ranges: where the symmetric grid of each layer ends, for each number of bits.

The threshold minimises the mean squared error of rounding and clipping over a histogram of magnitudes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from qlip_export.errors import QlipError
from qlip_export.spec import Frozen

RANGE_BITS = (4, 5, 6, 7, 8, 10, 12, 16)
"""Bit options for which thresholds are computed and stored."""
BINS = 4096


class Recipe(Frozen):
    """How the ranges were measured, so that anyone can measure them again."""

    prompts_sha256: str
    prompts: int
    steps: int
    scheduler: str
    guidance: float
    seed: int
    size: tuple[int, int] | None = Field(
        default=None, description="height and width of the images, pixels; none: the model's own"
    )
    method: str = "mse"
    random_weights: int | None = Field(
        default=None,
        description="seed of random weights that stood in for the model's: speed and memory, no quality",
    )


class LayerRange(Frozen):
    """Range of one layer's input."""

    maximum: float = Field(ge=0, description="largest magnitude seen")
    thresholds: dict[int, float] = Field(description="bits -> largest magnitude on the grid")


class Ranges(Frozen):
    """Ranges of all layers of one model."""

    fingerprint: str = Field(description="of the denoiser's config and weights")
    recipe: Recipe
    layers: dict[str, LayerRange]

    @classmethod
    def load(cls, path: Path) -> Ranges:
        """Read a ranges file.

        Raises:
            QlipError: Missing, truncated, or not a ranges file.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise QlipError(
                f"cannot read activation ranges from {path}",
                expected="a ranges.json written by 'qlip-export calibrate'",
                found=str(error).splitlines()[0],
                fix="run 'qlip-export calibrate' again",
            ) from error

    def check(self, fingerprint: str, layers: set[str], path: Path) -> None:
        """Refuse ranges that were measured on another model or other layers.

        Raises:
            QlipError: Naming the difference.
        """
        if self.fingerprint != fingerprint:
            raise QlipError(
                f"{path} was measured on another model",
                expected=f"fingerprint {fingerprint[:16]}…",
                found=f"{self.fingerprint[:16]}…",
                fix="run 'qlip-export calibrate' for this model",
            )
        if missing := layers - set(self.layers):
            raise QlipError(
                f"{path} lacks {len(missing)} of {len(layers)} layers",
                found=f"no {min(missing)}",
                fix="run 'qlip-export calibrate' for this model",
            )

    def thresholds(self, bits: int) -> dict[str, float]:
        """Return the clipping threshold of every layer at ``bits``.

        Raises:
            QlipError: No thresholds for this number of bits.
        """
        if any(bits not in r.thresholds for r in self.layers.values()):
            raise QlipError(
                f"no activation ranges for {bits} bits",
                expected=", ".join(map(str, RANGE_BITS)),
                found=str(bits),
            )
        return {name: r.thresholds[bits] for name, r in self.layers.items()}


def activation_scale(threshold: float, bits: int) -> float:
    """Return the step of a symmetric ``bits``-bit grid that reaches ``threshold``, exact in FP16.

    FP16 graphs store the scale in FP16; rounding it here keeps every container on one grid. Scales below
    FP16's smallest normal number are lifted to it.
    """
    step = threshold / (2 ** (bits - 1) - 1)
    return float(np.float16(min(max(step, 2.0**-14), 65504.0)))


class MagnitudeHistogram:
    """A histogram of |x| whose width doubles when a larger value arrives."""

    def __init__(self) -> None:
        """Start empty."""
        self.counts: NDArray[np.float64] = np.zeros(BINS)
        self.width = 0.0
        self.maximum = 0.0

    def prepare(self, maximum: float) -> None:
        """Make room for magnitudes up to ``maximum``.

        Raises:
            QlipError: ``maximum`` is not finite.
        """
        if not np.isfinite(maximum):
            raise QlipError("an activation is not finite", fix="check that the model works in FP32")
        self.maximum = max(self.maximum, maximum)
        if self.width == 0.0:
            self.width = maximum or 0.0
        while self.width and maximum > self.width:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2)])
            self.width *= 2

    def add(self, counts: NDArray[np.float64]) -> None:
        """Add counts over ``BINS`` equal bins from 0 to ``width``."""
        self.counts += counts

    def threshold(self, bits: int) -> float:
        """Return the clipping threshold of least squared error on a symmetric ``bits``-bit grid."""
        if self.maximum == 0.0:
            return 1.0  # a dead input: any grid holds it exactly
        levels = 2 ** (bits - 1) - 1
        centres = (np.arange(BINS) + 0.5) * (self.width / BINS)
        best, best_error = self.maximum, np.inf
        for ratio in np.geomspace(0.02, 1.0, 120):
            limit = self.maximum * ratio
            step = limit / levels
            clipped = centres > limit
            # Bins much finer than a step are rounded one by one; in coarser ones the error is uniform.
            rounding = np.where(
                self.width / BINS < step / 4,
                (centres - np.minimum(np.round(centres / step), levels) * step) ** 2,
                step**2 / 12,
            )
            error = float((self.counts * np.where(clipped, (centres - limit) ** 2, rounding)).sum())
            if error < best_error:
                best, best_error = limit, error
        return float(best)

    def range(self) -> LayerRange:
        """Return maximum and thresholds for all of ``RANGE_BITS``."""
        return LayerRange(
            maximum=self.maximum, thresholds={b: float(f"{self.threshold(b):.6g}") for b in RANGE_BITS}
        )
