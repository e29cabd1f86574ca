"""T2Q: label the images of the full-precision model, and train a network to predict the label from the text.

The label of the method is GIQA (Gu et al. 2020): the log-likelihood of an image's features under a Gaussian
mixture. The alternatives of section C, image complexity and prompt length, take its place on request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlip_export.errors import QlipError
from qlip_export.noise import seeded_noise
from qlip_export.policy.store import Criterion, Quality
from qlip_export.policy.t2q import TextToQuality
from qlip_export.simulate import Simulator

VARIANCE_KEPT = 0.95
"""Share of the features' variance that the mixture models; the rest is noise to it."""
MIXTURE = 16
"""Gaussians of the mixture."""
TAILS = (1.0, 99.0)
"""Percentiles of the raw label that become 0 and 1."""
HELD_OUT = 0.1
"""Share of the labelled prompts kept for measuring."""
LEAST_LABELS = 20
"""Labelled images below which there is nothing to learn or to compare with."""


@dataclass(frozen=True)
class Drawn:
    """What is known of the full-precision images of N prompts.

    Attributes:
        features: (N, D) float32, of the vision tower.
        complexity: (N,) float32, mean gradient magnitude of the image (section C).
    """

    features: NDArray[np.float32]
    complexity: NDArray[np.float32]


def draw(
    simulator: Simulator,
    prompts: Sequence[str],
    features: Callable[[Tensor], Tensor],
    *,
    guidance: float,
    seed: int,
    batch_size: int,
    on_images: Callable[[int], None] = lambda _: None,
) -> Drawn:
    """Draw one image a prompt at full precision and describe it.

    Args:
        simulator: With the full-precision weights.
        prompts: N prompts; image i starts from the noise of ``seed + i``.
        features: Maps (n, H, W, 3) uint8 to (n, D).
        guidance: Classifier-free guidance scale.
        seed: Of the first image.
        batch_size: Images at a time.
        on_images: Called with the number of images of each batch.
    """
    found, complexity = [], []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        noise = np.stack([seeded_noise(seed + start + i, simulator.latents_shape) for i in range(len(part))])
        for images in simulator.generate(part, noise, guidance=guidance, batch_size=batch_size):
            found.append(features(images).float().cpu().numpy())
            complexity.append(gradient_magnitude(images).numpy())
        on_images(len(part))
    return Drawn(np.concatenate(found), np.concatenate(complexity))


def gradient_magnitude(images: Tensor) -> Tensor:
    """Return the mean magnitude of the luma's gradient of each image, (N,), for (N, H, W, 3) uint8."""
    luma = images.float() @ torch.tensor([0.299, 0.587, 0.114], device=images.device) / 255
    down, right = luma.diff(dim=1)[:, :, :-1], luma.diff(dim=2)[:, :-1]
    return (down.square() + right.square()).sqrt().mean((1, 2))


def prompt_lengths(simulator: Simulator, prompts: Sequence[str]) -> NDArray[np.float32]:
    """Return the number of tokens of each prompt without start and end, (N,) float32."""
    tokenizer = simulator.quality_tokenizer
    ids = tokenizer(list(prompts), truncation=True, max_length=tokenizer.model_max_length).input_ids
    return np.array([len(i) - 2 for i in ids], dtype=np.float32)


def giqa(
    reference: NDArray[np.float32] | None, features: NDArray[np.float32], *, mixture: int, seed: int
) -> NDArray[np.float32]:
    """Return the log-likelihood of ``features`` (N, D) under a Gaussian mixture fitted to ``reference``.

    Without a reference each half of the images is judged by the other: in a mixture fitted to itself, an
    image unlike all others gets a Gaussian of its own and looks most likely of all.

    The features are first projected to the principal components that hold 95 % of the variance, as in GIQA's
    code; without that the noise of the smallest directions would decide.

    Raises:
        QlipError: Too few reference images, or features of another network.
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    known = features if reference is None else reference
    if len(known) < LEAST_LABELS:
        raise QlipError(
            "too few images to judge others by",
            expected=f"{LEAST_LABELS} or more",
            found=str(len(known)),
            fix="--reference with more images, or none",
        )
    if known.shape[1:] != features.shape[1:]:
        raise QlipError(
            "the reference features are not of the model's vision tower",
            expected=f"{features.shape[1]} numbers an image",
            found="x".join(map(str, known.shape[1:])),
            fix="--reference with a folder of images",
        )
    projection = PCA(n_components=VARIANCE_KEPT, svd_solver="full", random_state=seed).fit(known)

    def likelihood(of: NDArray[np.float32], among: NDArray[np.float32]) -> NDArray[np.float32]:
        count = min(mixture, max(1, len(among) // 20))
        fitted = GaussianMixture(n_components=count, reg_covar=1e-4, random_state=seed).fit(among)
        scores: NDArray[np.float32] = fitted.score_samples(of).astype(np.float32)
        return scores

    points = projection.transform(features)
    if reference is not None:
        return likelihood(points, projection.transform(reference))
    scores = np.empty(len(points), np.float32)
    scores[::2], scores[1::2] = likelihood(points[::2], points[1::2]), likelihood(points[1::2], points[::2])
    return scores


def raw_labels(
    drawn: Drawn,
    criterion: Literal["quality", "complexity"],
    reference: NDArray[np.float32] | None,
    *,
    mixture: int = MIXTURE,
    seed: int = 0,
) -> NDArray[np.float32]:
    """Return the labels of a criterion before scaling, (N,).

    Args:
        drawn: The images.
        criterion: Which label; prompt lengths need no images.
        reference: Features that GIQA's mixture is fitted to: those of real images, or of ``drawn`` itself.
        mixture: Gaussians.
        seed: Of the mixture's start.
    """
    if criterion == "complexity":
        return drawn.complexity
    return giqa(reference, drawn.features, mixture=mixture, seed=seed)


def scaled(raw: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, float]:
    """Return labels in [0, 1], and the raw values that became 0 and 1.

    Raises:
        QlipError: All labels are equal.
    """
    low, high = (float(v) for v in np.percentile(raw, TAILS))
    if not high > low:
        raise QlipError(
            "all images have the same label",
            expected="labels that differ",
            found=f"{low:g}",
            fix="more prompts",
        )
    return np.clip((raw - low) / (high - low), 0, 1).astype(np.float32), low, high


@dataclass(frozen=True)
class Trained:
    """A trained T2Q and its correlations on held-out prompts (section 3 of the paper: SROCC, PLCC)."""

    network: TextToQuality
    held_out: int
    srocc: float
    plcc: float


def train_t2q(
    projection: Tensor,
    pooled: Tensor,
    labels: NDArray[np.float32],
    *,
    epochs: int,
    seed: int,
    on_epoch: Callable[[], None] = lambda: None,
) -> Trained:
    """Train T2Q's last two layers with the mean squared error (table S5).

    Args:
        projection: (C, C_clip), frozen.
        pooled: (N, C_clip) float32 pooled embeddings.
        labels: (N,) in [0, 1].
        epochs: Passes over the training part.
        seed: Of weights, split and order.
        on_epoch: Called before each.

    Raises:
        QlipError: Too few labels.
    """
    from scipy.stats import pearsonr, spearmanr

    if len(labels) < LEAST_LABELS:
        raise QlipError(
            "too few labelled prompts", expected=f"{LEAST_LABELS} or more", found=str(len(labels))
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    kept = max(3, round(HELD_OUT * len(labels)))
    test, train = order[:kept], order[kept:]
    inputs, wanted = pooled.float().cpu(), torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TextToQuality(projection.cpu())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    batch = min(128, len(train))
    steps = epochs * (len(train) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in range(epochs):
        on_epoch()
        shuffled = train[torch.randperm(len(train), generator=generator)]
        for start in range(0, len(shuffled) - batch + 1, batch):
            index = shuffled[start : start + batch]
            loss = nn.functional.mse_loss(network(inputs[index]), wanted[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        predicted = network.eval()(inputs[test]).numpy()
    truth = labels[test.numpy()]
    # What does not vary correlates with nothing.
    varies = bool(np.ptp(predicted) > 0 and np.ptp(truth) > 0)
    return Trained(
        network,
        kept,
        float(spearmanr(predicted, truth).statistic) if varies else 0.0,
        float(pearsonr(predicted, truth).statistic) if varies else 0.0,
    )


def predicted(folder: Path, criterion: Criterion, simulator: Simulator, prompts: Sequence[str]) -> Tensor:
    """Return q of each prompt, (N,) float32: what T2Q predicts, or the scaled number of tokens.

    Prompt length needs no prediction, and a text embedding hardly tells it.

    Raises:
        QlipError: The calibration folder has no T2Q for this criterion.
    """
    quality = Quality.load(folder, criterion)
    if criterion == "length":
        low, high = quality.recipe.low, quality.recipe.high
        return torch.from_numpy((prompt_lengths(simulator, prompts) - low) / (high - low)).clamp(0, 1)
    with torch.no_grad():
        found: Tensor = quality.network(simulator.pooled(prompts).cpu())
    return found
