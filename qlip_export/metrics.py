"""The numbers of an evaluation: Fréchet distance, CLIP score, average bits, bit operations; intervals."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from qlip_export.features import Moments
from qlip_export.spec import Frozen


def frechet_distance(features: NDArray[np.float32], reference: Moments) -> float:
    """Return the Fréchet distance of (N, width) features to a reference, by torchmetrics in float64.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), https://arxiv.org/abs/1706.08500, equation 6.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_PassThrough(features.shape[1]))
    metric.update(torch.from_numpy(features.astype(np.float64)), real=False)
    mean, count = torch.from_numpy(reference.mean), reference.count
    metric.real_features_sum = mean * count
    metric.real_features_cov_sum = torch.from_numpy(reference.covariance) * (count - 1) + count * torch.outer(
        mean, mean
    )
    metric.real_features_num_samples = torch.tensor(count)
    # Rounding can take the distance of two equal sets below zero.
    return max(0.0, float(metric.compute()))


class _PassThrough(nn.Module):
    """Stands for the feature network of torchmetrics: what it gets are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def clip_scores(images: NDArray[np.float32], texts: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosine of each image embedding and its prompt's, both (N, C); (N,) in [-1, 1]."""
    one, two = images.astype(np.float64), texts.astype(np.float64)
    scores: NDArray[np.float64] = (one * two).sum(1) / (
        np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    )
    return scores


def bit_operations(
    bits: NDArray[np.integer],
    macs: NDArray[np.integer],
    fixed_macs: int,
    weight_bits: int,
) -> NDArray[np.float64]:
    """Return the BitOPs of each image, (N,): MACs x weight bits x activation bits over its whole run.

    Both halves of classifier-free guidance and all steps are counted. Layers that do not follow the bit
    options count at 16 bits, and at 32 in a run that is at 32 bits throughout.

    Args:
        bits: (N, steps, units).
        macs: Multiply-accumulates of each unit's layers that follow the options, one sample, (units,).
        fixed_macs: Those of all other layers, one sample.
        weight_bits: Bits of the weights.
    """
    halves = 2
    fixed_bits = np.where((bits == 32).all((1, 2)), 32, 16)
    followed = (bits.astype(np.float64) @ macs).sum(1)
    operations: NDArray[np.float64] = (
        halves * weight_bits * (followed + bits.shape[1] * float(fixed_macs) * fixed_bits)
    )
    return operations


class Estimate(Frozen):
    """A metric with its 95 % interval, and its ratio to the baseline's with the paired interval."""

    value: float
    low: float
    high: float
    ratio: float | None = Field(
        default=None, description="to the baseline; none without one, or where that is 0"
    )
    ratio_low: float | None = None
    ratio_high: float | None = None


@dataclass(frozen=True)
class Draws:
    """A metric of all images, and of each resample: (B,) float64."""

    value: float
    resampled: NDArray[np.float64]

    def estimate(self, baseline: Draws | None = None) -> Estimate:
        """Return the intervals: value ± 1.96 standard deviations of the resamples.

        A resample holds images twice, which widens no distribution but biases Fréchet distances upward; the
        deviation is free of that, percentiles and quotients of resamples would not be. So the ratio's is that
        of ``metric - ratio * baseline`` (the delta method), which is what pairs it: both metrics must come
        from the same images drawn.
        """
        spread = 1.96 * float(self.resampled.std(ddof=1))
        found = Estimate(value=self.value, low=self.value - spread, high=self.value + spread)
        if baseline is None or baseline.value <= _ZERO:
            return found
        ratio = self.value / baseline.value
        residuals = (self.resampled - ratio * baseline.resampled) / baseline.value
        spread = 1.96 * float(residuals.std(ddof=1))
        return found.model_copy(
            update={"ratio": ratio, "ratio_low": ratio - spread, "ratio_high": ratio + spread}
        )


_ZERO = 1e-9
"""A distance below this is that of a set to itself."""


def resample(count: int, *, times: int = 200, seed: int = 0) -> NDArray[np.int64]:
    """Return the images in each bootstrap resample, (times, count) int64, for all configurations alike."""
    return np.random.Generator(np.random.Philox(seed)).integers(0, count, (times, count))


def mean_draws(values: NDArray[np.float64], images: NDArray[np.int64]) -> Draws:
    """Return the mean of (N,) values over all images and over each resample."""
    return Draws(float(values.mean()), values[images].mean(1))


def median_draws(values: NDArray[np.float64], images: NDArray[np.int64]) -> Draws:
    """Return the median of (N,) values over all images and over each resample."""
    return Draws(float(np.median(values)), np.median(values[images], axis=1))


def frechet_draws(features: NDArray[np.float32], reference: Moments, images: NDArray[np.int64]) -> Draws:
    """Return the Fréchet distance to a fixed reference of all images and of each resample.

    A resample is a vector of weights. With R = S2^(1/2), the eigenvalues of S1 S2 are those of R S1 R, the
    weighted covariance of ``features @ R``: one product and one symmetric eigenproblem for each resample.
    """
    from threadpoolctl import threadpool_limits

    wide = features.astype(np.float64)
    values, vectors = np.linalg.eigh(reference.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    turned, squares = wide @ root, (wide**2).sum(1)
    reference_trace = float(np.trace(reference.covariance))
    count = len(wide)

    def distance(chosen: NDArray[np.int64]) -> float:
        weights = np.bincount(chosen, minlength=count).astype(np.float64)
        mean, turned_mean = weights @ wide / count, weights @ turned / count
        centred = (turned - turned_mean) * np.sqrt(weights)[:, None]
        # Both products have the same eigenvalues but for zeros.
        product = centred @ centred.T if count < centred.shape[1] else centred.T @ centred
        shared = np.linalg.eigvalsh(product / (count - 1)).clip(min=0)
        trace = (weights @ squares - count * (mean @ mean)) / (count - 1)
        shift = mean - reference.mean
        return float(shift @ shift + trace + reference_trace - 2 * np.sqrt(shared).sum())

    # Many small problems: one thread for each is faster than all threads for one.
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        resampled = np.array(list(pool.map(distance, images)))
    return Draws(frechet_distance(features, reference), resampled)
