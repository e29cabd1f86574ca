"""The numbers that evaluation reports: Fréchet distance, CLIP score and retrieval, on given features."""

import numpy
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def frechet(first: Tensor, second: Tensor) -> float:
    """Return the Fréchet distance between Gaussians fitted to two (images, width) sets of features.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), https://arxiv.org/abs/1706.08500, equation 6, in FP64.
    """
    one, two = (features.double().cpu().numpy() for features in (first, second))
    shift = one.mean(0) - two.mean(0)
    covariance_one, covariance_two = numpy.cov(one, rowvar=False), numpy.cov(two, rowvar=False)
    values, vectors = numpy.linalg.eigh(covariance_one)
    root = (vectors * numpy.sqrt(values.clip(min=0))) @ vectors.T
    # The eigenvalues of S1 S2 are those of the symmetric S1^(1/2) S2 S1^(1/2).
    shared = numpy.sqrt(numpy.linalg.eigvalsh(root @ covariance_two @ root).clip(min=0)).sum()
    return float(shift @ shift + numpy.trace(covariance_one) + numpy.trace(covariance_two) - 2 * shared)


def halves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split the numbers below `count` into two random halves."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: count // 2], order[count // 2 :]


def frechet_of_halves(features: Tensor, others: Tensor, draws: int) -> float:
    """Return the mean distance between one half of `features` and the other half of `others`, over `draws`.

    With `others` the same real features this is the yardstick of two halves of the real set; with generated
    ones, row by row from the same captions, it is the same measurement at the same number of images.
    """
    found = []
    for seed in range(draws):
        one, two = halves(features.shape[0], seed)
        found.append(frechet(features[one], others[two]))
    return sum(found) / draws


def clip_score(images: Tensor, texts: Tensor) -> float:
    """Return the mean cosine between the embeddings of images and of their captions, row by row."""
    return float(F.cosine_similarity(images.float(), texts.float(), dim=-1).mean())


def retrieval(queries: Tensor, candidates: Tensor, wanted: Tensor, labels: Tensor) -> float:
    """Return the share of `queries` whose nearest candidate by cosine carries the wanted label."""
    nearest = (F.normalize(queries, dim=-1) @ F.normalize(candidates, dim=-1).T).argmax(1)
    return float((labels[nearest] == wanted).float().mean())
