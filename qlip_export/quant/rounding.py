"""Weights whose rounding was learned: one bit a weight says up or down, beside the scale of each channel.

With the checkpoint at hand this is all there is to store: 1 bit a weight instead of 4.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from safetensors.numpy import load_file, save_file

from qlip_export.errors import QlipError
from qlip_export.files import written_aside
from qlip_export.quant.weights import QuantizedWeight, code_range
from qlip_export.spec import Frozen


class RoundingRecipe(Frozen):
    """How the rounding was learned, and what it gained."""

    fingerprint: str = Field(description="of the denoiser's config and weights")
    bits: int = Field(ge=2, le=8)
    prompts: int
    prompts_sha256: str
    samples: int = Field(description="inputs of each block, spread over prompts and timesteps")
    steps: int
    scheduler: str
    guidance: float
    iterations: int
    batch: int
    seed: int
    size: tuple[int, int] | None = Field(
        default=None, description="height and width of the images, pixels; none: the model's own"
    )
    random_weights: int | None = Field(
        default=None,
        description="seed of random weights that stood in for the model's: speed and memory, no quality",
    )
    flipped: float = Field(description="share of weights not rounded to the nearest code")
    error_nearest: float = Field(description="relative squared error of block outputs, round to nearest")
    error_learned: float = Field(description="the same with learned rounding")


class LearnedRounding:
    """Learned rounding of all layers: a `WeightQuantizer`."""

    def __init__(self, recipe: RoundingRecipe, tensors: dict[str, NDArray[Any]]) -> None:
        """Take ``LAYER.up`` (bits, packed, uint8) and ``LAYER.scale`` (C,) float16 for every layer."""
        self.recipe, self._tensors = recipe, tensors

    @classmethod
    def of(
        cls, recipe: RoundingRecipe, up: dict[str, NDArray[np.bool_]], scale: dict[str, NDArray[np.float32]]
    ) -> LearnedRounding:
        """Pack what training made: for every layer the weights to round up, and the scales."""
        tensors: dict[str, NDArray[Any]] = {}
        for name in up:
            tensors[f"{name}.up"] = np.packbits(up[name].ravel())
            tensors[f"{name}.scale"] = scale[name].astype(np.float16)
        return cls(recipe, tensors)

    def save(self, path: Path) -> None:
        """Write ``path`` (safetensors) and its recipe beside it."""
        with written_aside(path) as aside:
            save_file(self._tensors, aside)
        with written_aside(path.with_suffix(".json")) as aside:
            aside.write_text(self.recipe.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> LearnedRounding:
        """Read what `save` wrote.

        Raises:
            QlipError: Missing, truncated, or something else.
        """
        try:
            recipe = RoundingRecipe.model_validate(
                json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            )
            return cls(recipe, load_file(path))
        except (OSError, ValueError, ValidationError, safetensors.SafetensorError) as error:
            raise QlipError(
                f"cannot read learned rounding from {path}",
                expected="what 'qlip-export calibrate --stages weights' wrote, with its .json beside it",
                found=str(error).splitlines()[0],
                fix="run 'qlip-export calibrate --stages weights' again",
            ) from error

    def check(self, fingerprint: str, bits: int, path: Path) -> None:
        """Refuse rounding that was learned for another model or another number of bits.

        Raises:
            QlipError: Naming the difference.
        """
        for what, expected, found in (
            ("model", fingerprint, self.recipe.fingerprint),
            ("number of bits", str(bits), str(self.recipe.bits)),
        ):
            if expected != found:
                raise QlipError(
                    f"{path} was learned for another {what}",
                    expected=expected[:16],
                    found=found[:16],
                    fix="run 'qlip-export calibrate --stages weights' for it",
                )

    def __call__(self, name: str, weight: NDArray[Any], bits: int, axis: int) -> QuantizedWeight:
        """Quantize ``weight`` (C, ...), float32, with the stored scales and rounding; ``axis`` must be 0.

        Raises:
            QlipError: No such layer, or a weight of another size.
        """
        if f"{name}.up" not in self._tensors:
            raise QlipError(f"no learned rounding for layer {name!r}", fix="calibrate again")
        packed, scale = self._tensors[f"{name}.up"], self._tensors[f"{name}.scale"].astype(np.float32)
        if len(packed) != -(-weight.size // 8) or scale.shape != weight.shape[:1] or axis != 0:
            raise QlipError(
                f"the learned rounding of layer {name!r} has another size",
                expected=f"{weight.size} weights, {weight.shape[0]} scales",
                found=f"{len(packed) * 8} weights, {scale.size} scales",
                fix="calibrate again",
            )
        up = np.unpackbits(packed, count=weight.size).reshape(weight.shape)
        low, high = code_range(bits)
        codes = floor_codes(weight, scale) + up
        return QuantizedWeight(np.clip(codes, low, high).astype(np.int8), scale, 0, bits)


def floor_codes(weight: NDArray[Any], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the whole number of steps below each weight; ``scale`` (C,) lies along the first axis."""
    steps: NDArray[np.float32] = np.floor(
        weight.astype(np.float32) / scale.reshape(-1, *[1] * (weight.ndim - 1))
    )
    return steps
