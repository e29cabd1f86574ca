"""The numbers that evaluation reports: Fréchet distance, CLIP score and retrieval, on given features."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qlip_export.features import Moments
from qlip_export.metrics import clip_scores, frechet_distance


def frechet(first: Tensor, second: Tensor) -> float:
    """Return the Fréchet distance between Gaussians fitted to two (images, width) sets of features."""
    return frechet_distance(first.float().cpu().numpy(), Moments.of(second.float().cpu().numpy()))


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
    return float(clip_scores(images.float().cpu().numpy(), texts.float().cpu().numpy()).mean())


def retrieval(queries: Tensor, candidates: Tensor, wanted: Tensor, labels: Tensor) -> float:
    """Return the share of `queries` whose nearest candidate by cosine carries the wanted label."""
    nearest = (F.normalize(queries, dim=-1) @ F.normalize(candidates, dim=-1).T).argmax(1)
    return float((labels[nearest] == wanted).float().mean())
