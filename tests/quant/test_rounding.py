"""Learned rounding on disk: a bit a weight and a scale a channel, and whose they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlip_export.errors import QlipError
from qlip_export.quant.rounding import LearnedRounding, RoundingRecipe, floor_codes
from qlip_export.quant.weights import round_to_nearest
from tests import tamper

RECIPE = RoundingRecipe(
    fingerprint="a" * 64,
    bits=4,
    prompts=2,
    prompts_sha256="0" * 64,
    samples=1,
    steps=3,
    scheduler="dpmsolver++",
    guidance=4.0,
    iterations=1,
    batch=1,
    seed=0,
    flipped=0.5,
    error_nearest=0.1,
    error_learned=0.05,
)
# 3 x 5 and 3 x 5 x 3 x 3 weights: neither is a whole number of bytes.
WEIGHTS = {
    "linear": np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32),
    "conv": np.random.default_rng(1).standard_normal((3, 5, 3, 3)).astype(np.float32),
}
UP = {name: np.random.default_rng(2).random(w.shape) < 0.5 for name, w in WEIGHTS.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    scale = {name: round_to_nearest(name, weight, 4, 0).scale for name, weight in WEIGHTS.items()}
    LearnedRounding.of(RECIPE, UP, scale).save(tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize("name", WEIGHTS)
def test_codes_are_rounded_as_learned(path: Path, name: str) -> None:
    found = LearnedRounding.load(path)(name, WEIGHTS[name], 4, 0)
    expected = floor_codes(WEIGHTS[name], found.scale) + UP[name]
    assert np.array_equal(found.codes, np.clip(expected, -8, 7))
    assert np.array_equal(found.scale, round_to_nearest(name, WEIGHTS[name], 4, 0).scale)
    assert (found.codes != round_to_nearest(name, WEIGHTS[name], 4, 0).codes).any()
    assert found.codes.dtype == np.int8


def test_recipe_comes_back(path: Path) -> None:
    assert LearnedRounding.load(path).recipe == RECIPE
    LearnedRounding.load(path).check("a" * 64, 4, path)


@pytest.mark.parametrize(
    ("fingerprint", "bits", "complaint"), [("b" * 64, 4, "another model"), ("a" * 64, 3, "another number")]
)
def test_rounding_of_something_else_is_refused(
    path: Path, fingerprint: str, bits: int, complaint: str
) -> None:
    with pytest.raises(QlipError, match=f"was learned for {complaint}"):
        LearnedRounding.load(path).check(fingerprint, bits, path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: tamper.truncate(path),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: tamper.truncate_text(path.with_suffix(".json")),
        lambda path: path.with_suffix(".json").write_text("{}"),
    ],
)
def test_damaged_file_is_refused(path: Path, damage: Callable[[Path], Any]) -> None:
    damage(path)
    with pytest.raises(QlipError, match="cannot read learned rounding") as caught:
        LearnedRounding.load(path)
    assert "calibrate --stages weights" in str(caught.value.fix)


def test_layer_that_does_not_fit_is_refused(path: Path) -> None:
    rounding = LearnedRounding.load(path)
    with pytest.raises(QlipError, match="no learned rounding for layer 'other'"):
        rounding("other", WEIGHTS["linear"], 4, 0)
    for weight, axis in ((np.zeros((3, 9), np.float32), 0), (WEIGHTS["linear"].T, 0), (WEIGHTS["linear"], 1)):
        with pytest.raises(QlipError, match="the learned rounding of layer 'linear' has another size"):
            rounding("linear", weight, 4, axis)
