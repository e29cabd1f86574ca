"""Distances, scores, bit counts and intervals on numbers whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torchmetrics")

from qlip_export.errors import QlipError
from qlip_export.features import (
    SPATIAL_CHANNELS,
    FeatureExtractor,
    Moments,
    ReferenceStatistics,
    images_of,
    joined,
    text_embeddings,
)
from qlip_export.metrics import (
    Draws,
    bit_operations,
    clip_scores,
    frechet_distance,
    frechet_draws,
    mean_draws,
    median_draws,
    resample,
)

EMOJI = Path(__file__).parents[1] / "qlip_export/zoo/emoji"
SHIPPED = Path(__file__).parents[1] / "calibration/emoji/reference.safetensors"


def normal(count: int, width: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((count, width))
    return (mean + scale * drawn).astype(np.float32)


# --- distances


def test_distance_of_gaussians_is_the_closed_form() -> None:
    """Equal, isotropic covariances: |m1 - m2|^2 + width * (s1 - s2)^2."""
    reference = Moments(np.zeros(4), np.eye(4), 1000)
    features = normal(200_000, 4, seed=0, mean=0.5, scale=2.0)
    assert frechet_distance(features, reference) == pytest.approx(4 * 0.25 + 4 * 1.0, rel=0.02)


def test_distance_to_oneself_is_zero() -> None:
    features = normal(50, 6, seed=1)
    assert frechet_distance(features, Moments.of(features)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("count", "width", "off"), [(60, 5, 1e-9), (20, 50, 1e-6)])
def test_the_bootstrap_computes_the_distance_of_torchmetrics(count: int, width: int, off: float) -> None:
    """A resample that draws every image once is the set itself; fewer images than features change nothing."""
    features, reference = normal(count, width, seed=2, scale=1.3), Moments.of(normal(80, width, seed=3))
    whole = frechet_draws(features, reference, np.stack([np.arange(count)] * 2))
    assert whole.resampled == pytest.approx(whole.value, rel=off)
    twice = np.random.default_rng(0).integers(0, count, (1, count))
    drawn = frechet_draws(features, reference, np.concatenate([twice, twice]))
    assert drawn.resampled[0] == pytest.approx(frechet_distance(features[twice[0]], reference), rel=off)


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(QlipError, match="2 images or more"):
        Moments.of(normal(1, 3, seed=0))


# --- intervals


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        values = np.random.default_rng(seed).standard_normal(100)
        found = mean_draws(values, resample(100, seed=seed)).estimate()
        covered += found.low <= 0 <= found.high
    assert 180 <= covered <= 198


def test_pairing_narrows_the_ratio() -> None:
    """Two configurations whose images differ by little from each other, and much from image to image."""
    rng = np.random.default_rng(0)
    base = 10 + rng.standard_normal(400)
    other = 1.01 * base + 0.01 * rng.standard_normal(400)
    images = resample(400)
    paired = mean_draws(other, images).estimate(mean_draws(base, images))
    unpaired = mean_draws(other, images).estimate(mean_draws(base, resample(400, seed=1)))
    assert paired.ratio == pytest.approx(1.01, abs=1e-3)
    assert paired.ratio_low is not None and paired.ratio_high is not None and unpaired.ratio_high is not None
    assert paired.ratio_low > 1 and paired.ratio_high - paired.ratio < 0.1 * (unpaired.ratio_high - 1.01)


def test_bias_of_resamples_does_not_narrow_the_ratio() -> None:
    """Resamples of Fréchet distances lie far above the distance; only how they scatter counts."""
    noise = np.random.default_rng(0).standard_normal((2, 200))
    mine, theirs = (Draws(4.0, 4.0 + row) for row in noise)
    biased_mine, biased_theirs = (Draws(4.0, 9.0 + row) for row in noise)
    assert biased_mine.estimate(biased_theirs).ratio_high == pytest.approx(mine.estimate(theirs).ratio_high)
    expected = 1 + 1.96 * float((noise[0] - noise[1]).std(ddof=1)) / 4
    assert mine.estimate(theirs).ratio_high == pytest.approx(expected)


def test_there_is_no_ratio_to_nothing() -> None:
    images = resample(5)
    assert mean_draws(np.ones(5), images).estimate(mean_draws(np.zeros(5), images)).ratio is None


def test_the_median_forgets_the_slow_first_image() -> None:
    found = median_draws(np.array([9.0, 1.0, 1.0, 1.0, 1.0]), resample(5)).estimate()
    assert found.value == 1.0


# --- scores and bits


def test_clip_score_is_a_cosine() -> None:
    images = np.array([[1, 0], [2, 2], [0, 3]], dtype=np.float32)
    texts = np.array([[5, 0], [1, 0], [0, -1]], dtype=np.float32)
    assert clip_scores(images, texts) == pytest.approx([1, np.sqrt(0.5), -1])


def test_bit_operations_count_both_halves_and_the_fixed_layers() -> None:
    bits = np.array([[[8, 16]], [[32, 32]]], dtype=np.uint8)
    found = bit_operations(bits, np.array([100, 10]), 1, weight_bits=4)
    assert found == pytest.approx([2 * 4 * (800 + 160 + 16), 2 * 4 * 32 * 111])


# --- features and their statistics


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return FeatureExtractor(EMOJI)


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)


def test_features_do_not_depend_on_the_batch(extractor: FeatureExtractor) -> None:
    images = pictures(5)
    whole, parts = extractor(images), joined(map(extractor, images.split(2)))
    assert whole["embedding"].shape == (5, 192)
    assert whole["spatial"].shape == (5, 64 * SPATIAL_CHANNELS)
    for name, values in whole.items():
        assert parts[name] == pytest.approx(values, abs=1e-4)
        assert np.ptp(values, axis=0).max() > 0.1, "images that look different have different features"


def test_an_image_of_another_size_is_refused(extractor: FeatureExtractor) -> None:
    with pytest.raises(QlipError, match=r"128x128, RGB[\s\S]*64x64x3"):
        extractor(pictures(1)[:, :64, :64])


def test_prompts_lie_near_their_images() -> None:
    """The towers were trained together: texts about the same thing are closer than others."""
    texts = text_embeddings(EMOJI, ["red apple", "an emoji of red apple in noto style", "airplane"])
    same, other = clip_scores(texts[[0, 0]], texts[[1, 2]])
    assert same > other + 0.2


def test_statistics_survive_the_file(tmp_path: Path, extractor: FeatureExtractor) -> None:
    images = pictures(12)
    made = ReferenceStatistics.of_images(images.split(4), extractor, "twelve pictures")
    made.save(tmp_path / "reference.safetensors")
    read = ReferenceStatistics.load(tmp_path / "reference.safetensors")
    read.check(extractor.fingerprints, tmp_path)
    assert read.recipe == made.recipe and read.recipe.images == 12
    for name, moments in made.moments.items():
        assert read.moments[name].mean == pytest.approx(moments.mean, rel=1e-6, abs=1e-6)
        assert read.moments[name].covariance == pytest.approx(moments.covariance, rel=1e-6, abs=1e-6)


def test_a_folder_of_images_has_the_statistics_of_its_images(
    tmp_path: Path, extractor: FeatureExtractor
) -> None:
    images = pictures(4)
    for number, image in enumerate(images):
        Image.fromarray(image.numpy()).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert torch.equal(torch.cat(list(images_of(tmp_path, batch_size=3))), images)


def test_the_shipped_statistics_are_of_the_shipped_tower(extractor: FeatureExtractor) -> None:
    shipped = ReferenceStatistics.load(SHIPPED)
    shipped.check(extractor.fingerprints, SHIPPED)
    assert shipped.recipe.images == 6222 and SHIPPED.stat().st_size < 500_000
    for moments in shipped.moments.values():
        assert np.linalg.eigvalsh(moments.covariance).min() > -1e-5


def test_broken_statistics_are_refused(tmp_path: Path, extractor: FeatureExtractor) -> None:
    path = tmp_path / "reference.safetensors"
    whole = SHIPPED.read_bytes()
    recipe = SHIPPED.with_suffix(".json").read_text()
    path.with_suffix(".json").write_text(recipe)
    for broken in (whole[:1000], b"", whole[:-4]):
        path.write_bytes(broken)
        with pytest.raises(QlipError, match="cannot read reference statistics"):
            ReferenceStatistics.load(path)
    path.write_bytes(whole)
    changed = json.loads(recipe)
    changed["fingerprints"]["spatial"] = "0" * 64
    path.with_suffix(".json").write_text(json.dumps(changed))
    with pytest.raises(QlipError, match="holds no spatial features of this network"):
        ReferenceStatistics.load(path).check(extractor.fingerprints, path)


def test_a_model_without_a_vision_tower_is_refused(tiny_model: Path) -> None:
    with pytest.raises(QlipError, match="no vision tower"):
        FeatureExtractor(tiny_model)
