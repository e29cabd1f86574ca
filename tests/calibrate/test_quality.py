"""Labels of images and of prompts, and the network that learns them from the text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from qlip_export.calibrate.quality import (
    Drawn,
    draw,
    giqa,
    gradient_magnitude,
    predicted,
    prompt_lengths,
    raw_labels,
    scaled,
    train_t2q,
)
from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError
from qlip_export.noise import seeded_noise
from qlip_export.policy.store import Quality
from qlip_export.simulate import Simulator
from tests.calibrate.conftest import PROMPTS
from tests.tiny import IMAGE_SIZE, TEXT_LENGTH
from tests.tiny_calibration import pooled_embeddings, write_quality

LONG = "the cat of an apple tree on a green boat and the dog of a blue house"


def features(count: int, width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


# --- labels


def test_an_image_unlike_all_others_scores_lowest() -> None:
    drawn = features(200)
    drawn[17] = 9.0
    own = giqa(None, drawn, mixture=4, seed=0)
    assert own.argmin() == 17
    others = giqa(features(100, seed=1), drawn, mixture=4, seed=0)
    assert others.argmin() == 17
    # Likelihood falls with the distance from the middle of the one cluster that there is.
    distance = np.linalg.norm(drawn, axis=1)
    assert np.corrcoef(distance, giqa(features(100, seed=1), drawn, mixture=1, seed=0))[0, 1] < -0.8


@pytest.mark.parametrize(
    ("reference", "complaint"),
    [
        (features(19), "too few images"),
        (None, "too few images"),
        (features(50, width=5), "not of the model's vision tower"),
    ],
)
def test_reference_that_will_not_do(reference: np.ndarray | None, complaint: str) -> None:
    with pytest.raises(QlipError, match=complaint):
        giqa(reference, features(19 if reference is None else 50), mixture=4, seed=0)


def test_labels_follow_their_criterion() -> None:
    drawn = Drawn(features(50), np.arange(50, dtype=np.float32))
    assert np.array_equal(raw_labels(drawn, "complexity", None), drawn.complexity)
    own = raw_labels(drawn, "quality", None)
    assert np.array_equal(own, giqa(None, drawn.features, mixture=16, seed=0))
    assert not np.array_equal(own, raw_labels(drawn, "quality", features(50, seed=1)))


def test_scaled_labels_lie_between_the_tails() -> None:
    raw = np.linspace(-5, 5, 101, dtype=np.float32)
    raw[0] = -1000
    labels, low, high = scaled(raw)
    assert (low, high) == pytest.approx((-4.9, 4.9), abs=1e-5)
    assert (labels.min(), labels.max()) == (0, 1)
    assert labels[50] == pytest.approx(0.5)
    assert (np.diff(labels) >= 0).all()


def test_equal_labels_are_refused() -> None:
    with pytest.raises(QlipError, match="all images have the same label"):
        scaled(np.full(30, 2.0, np.float32))


def test_gradient_of_known_images() -> None:
    """Ramps of 3 levels a row and 4 a column have gradient 5 everywhere; a flat image has none."""
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(10), indexing="ij")
    ramp = (3 * rows + 4 * columns)[..., None].expand(8, 10, 3)
    images = torch.stack([ramp, torch.full((8, 10, 3), 200)]).to(torch.uint8)
    assert gradient_magnitude(images).tolist() == pytest.approx([5 / 255, 0], abs=1e-6)


def test_gradient_weighs_colours_as_the_eye_does() -> None:
    edges = torch.zeros(3, 2, 2, 3, dtype=torch.uint8)
    for channel in range(3):
        edges[channel, :, 1, channel] = 255
    assert gradient_magnitude(edges).tolist() == pytest.approx([0.299, 0.587, 0.114], abs=1e-6)


def test_length_is_counted_in_tokens(simulator: Simulator) -> None:
    found = prompt_lengths(simulator, ["", "a", "a red apple", LONG])
    assert found.tolist() == [0, 1, 3, TEXT_LENGTH - 2]


def test_drawn_images_are_described_in_the_order_of_the_prompts(simulator: Simulator) -> None:
    batches: list[int] = []
    drawn = draw(
        simulator,
        PROMPTS,
        lambda images: images.float().mean((1, 2)),
        guidance=4.0,
        seed=3,
        batch_size=3,
        on_images=batches.append,
    )
    assert batches == [3, 1]
    noise = np.stack([seeded_noise(3 + i, simulator.latents_shape) for i in range(4)])
    images = torch.cat(list(simulator.generate(PROMPTS, noise, guidance=4.0, batch_size=3)))
    assert images.shape == (4, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert np.array_equal(drawn.features, images.float().mean((1, 2)).numpy())
    assert np.array_equal(drawn.complexity, gradient_magnitude(images).numpy())
    assert len(set(drawn.complexity.tolist())) == 4


# --- T2Q


def learnable(count: int = 600, width: int = 8) -> tuple[torch.Tensor, np.ndarray]:
    """Embeddings, and labels that are a smooth function of them."""
    pooled = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    return pooled, torch.sigmoid(2 * pooled[:, 0] - pooled[:, 1].abs()).numpy()


def test_what_can_be_learned_is_learned() -> None:
    pooled, labels = learnable()
    projection = torch.cat([torch.eye(8), -torch.eye(8)])
    trained = train_t2q(projection, pooled, labels, epochs=60, seed=0)
    assert trained.held_out == 60
    assert trained.srocc > 0.95 and trained.plcc > 0.95
    assert torch.equal(trained.network.projection, projection)
    again = train_t2q(projection, pooled, labels, epochs=60, seed=0)
    assert (again.srocc, again.plcc) == (trained.srocc, trained.plcc)


def test_what_cannot_be_learned_is_not_claimed() -> None:
    """Held-out prompts are not trained on: labels at random leave no correlation."""
    pooled, labels = learnable()
    shuffled = np.random.default_rng(0).permutation(labels)
    assert abs(train_t2q(torch.eye(8), pooled, shuffled, epochs=60, seed=0).srocc) < 0.4


def test_labels_that_hardly_differ_correlate_with_nothing() -> None:
    labels = np.zeros(40, np.float32)
    labels[0] = 1
    trained = train_t2q(torch.eye(8), learnable(40)[0], labels, epochs=1, seed=0)
    assert (trained.srocc, trained.plcc) == (0, 0)


def test_too_few_labels() -> None:
    pooled, labels = learnable(19)
    with pytest.raises(QlipError, match="too few labelled prompts"):
        train_t2q(torch.eye(8), pooled, labels, epochs=1, seed=0)
    assert train_t2q(torch.eye(8), *learnable(20), epochs=1, seed=0).held_out == 3


def test_quality_is_that_of_the_stored_network(simulator: Simulator, towers: Path, tmp_path: Path) -> None:
    write_quality(tmp_path, Checkpoint(towers))
    found = predicted(tmp_path, "quality", simulator, PROMPTS)
    with torch.no_grad():
        network = Quality.load(tmp_path, "quality").network
        torch.testing.assert_close(found, network(pooled_embeddings(towers, PROMPTS)), rtol=0, atol=1e-5)
    assert found.std() > 0.01


def test_length_needs_no_prediction(simulator: Simulator, towers: Path, tmp_path: Path) -> None:
    write_quality(tmp_path, Checkpoint(towers), criterion="length", low=1.0, high=5.0)
    found = predicted(tmp_path, "length", simulator, ["", "a", "a red apple", LONG])
    assert found.tolist() == [0, 0, 0.5, 1]
