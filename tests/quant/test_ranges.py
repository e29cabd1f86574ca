"""Activation ranges: a histogram that grows, and the threshold of least squared error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qlip_export.errors import QlipError
from qlip_export.quant.ranges import BINS, RANGE_BITS, LayerRange, MagnitudeHistogram, Ranges, Recipe

RECIPE = Recipe(prompts_sha256="0", prompts=1, steps=1, scheduler="ddim", guidance=4.0, seed=0)


def histogram_of(*batches: np.ndarray) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram()
    for batch in batches:
        magnitudes = np.abs(batch)
        histogram.prepare(float(magnitudes.max()))
        if histogram.width:
            counts, _ = np.histogram(magnitudes, bins=BINS, range=(0, histogram.width))
            histogram.add(counts.astype(np.float64))
    return histogram


def squared_error(x: np.ndarray, threshold: float, bits: int) -> float:
    levels = 2 ** (bits - 1) - 1
    step = threshold / levels
    return float(((np.clip(np.rint(x / step), -levels, levels) * step - x) ** 2).mean())


def test_histogram_doubles_when_a_larger_value_arrives() -> None:
    histogram = histogram_of(np.array([0.1, 0.9, 1.0]), np.array([3.5]))
    assert histogram.width == 4.0
    assert histogram.maximum == 3.5
    assert histogram.counts.sum() == 4
    edges = np.arange(BINS) * histogram.width / BINS
    # Every value is still in the bin where it would have been counted.
    found = edges[np.repeat(np.arange(BINS), histogram.counts.astype(int))]
    np.testing.assert_allclose(found, [0.1, 0.9, 1.0, 3.5], atol=2 * histogram.width / BINS)


def test_order_of_the_batches_matters_little() -> None:
    rng = np.random.default_rng(0)
    small, large = rng.standard_normal(20_000), 5 * rng.standard_normal(20_000)
    first, second = histogram_of(small, large), histogram_of(large, small)
    assert first.maximum == second.maximum
    assert first.counts.sum() == second.counts.sum() == 40_000
    for bits in (4, 8):
        assert first.threshold(bits) == pytest.approx(second.threshold(bits), rel=0.05)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("shape", ["normal", "laplace", "half normal", "uniform"])
def test_threshold_has_the_least_squared_error(bits: int, shape: str) -> None:
    rng = np.random.default_rng(1)
    x = {
        "normal": rng.standard_normal(60_000),
        "laplace": rng.laplace(size=60_000),
        "half normal": np.abs(rng.standard_normal(60_000)),
        "uniform": rng.uniform(-2, 2, 60_000),
    }[shape]
    found = histogram_of(x).threshold(bits)
    candidates = np.abs(x).max() * np.linspace(0.05, 1, 400)
    best = min(squared_error(x, c, bits) for c in candidates)
    assert squared_error(x, found, bits) <= 1.05 * best
    assert found <= np.abs(x).max()


def test_heavy_tails_are_clipped_and_flat_ones_are_not() -> None:
    rng = np.random.default_rng(2)
    heavy = histogram_of(rng.standard_t(3, 50_000))
    flat = histogram_of(rng.uniform(-1, 1, 50_000))
    assert heavy.threshold(4) < 0.5 * heavy.maximum
    assert flat.threshold(8) > 0.95 * flat.maximum


def test_fewer_bits_clip_more() -> None:
    histogram = histogram_of(np.random.default_rng(3).laplace(size=50_000))
    thresholds = [histogram.threshold(bits) for bits in (4, 6, 8)]
    assert thresholds == sorted(thresholds)
    assert thresholds[0] < 0.7 * thresholds[-1]


def test_dead_layer_has_some_grid() -> None:
    histogram = histogram_of(np.zeros(10))
    assert histogram.range().maximum == 0.0
    assert set(histogram.range().thresholds.values()) == {1.0}


def test_layer_that_wakes_up_late() -> None:
    histogram = histogram_of(np.zeros(10), np.array([2.0, -1.0]))
    assert (histogram.maximum, histogram.width) == (2.0, 2.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_activation_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(QlipError, match="an activation is not finite"):
        MagnitudeHistogram().prepare(value)


def ranges(**layers: float) -> Ranges:
    return Ranges(
        fingerprint="f" * 64,
        recipe=RECIPE,
        layers={n: LayerRange(maximum=v, thresholds=dict.fromkeys(RANGE_BITS, v)) for n, v in layers.items()},
    )


def test_thresholds_by_layer() -> None:
    assert ranges(a=1.0, b=2.0).thresholds(8) == {"a": 1.0, "b": 2.0}
    with pytest.raises(QlipError, match=r"no activation ranges for 3 bits(.|\n)*expected: 4, 5"):
        ranges(a=1.0).thresholds(3)


def test_ranges_of_another_model_are_refused() -> None:
    with pytest.raises(QlipError, match="was measured on another model") as caught:
        ranges(a=1.0).check("0" * 64, {"a"}, Path("ranges.json"))
    assert caught.value.expected == "fingerprint 0000000000000000…"
    assert caught.value.found == "ffffffffffffffff…"


def test_ranges_that_lack_a_layer_are_refused() -> None:
    ranges(a=1.0, b=1.0).check("f" * 64, {"a"}, Path("ranges.json"))
    with pytest.raises(QlipError, match=r"lacks 2 of 3 layers(.|\n)*found: no b"):
        ranges(a=1.0).check("f" * 64, {"a", "b", "c"}, Path("ranges.json"))


def test_ranges_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(ranges(a=1.5).model_dump_json())
    assert Ranges.load(path) == ranges(a=1.5)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"layers": {}}', '{"surprise": 1}'])
def test_file_that_holds_no_ranges_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(text)
    with pytest.raises(QlipError, match=r"cannot read activation ranges from .*ranges\.json"):
        Ranges.load(path)
    with pytest.raises(QlipError, match="cannot read activation ranges"):
        Ranges.load(tmp_path / "none.json")
