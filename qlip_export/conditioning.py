"""What a denoiser is given besides latents and time, and how: where the manifests of families differ."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qlip_export.spec import Frozen

TextOutput = Literal["text", "pooled", "projected"]
"""Outputs of a text encoder: states (N, L, D), pooled embedding (N, D) before and after projection."""


class Encoded(Frozen):
    """An output of text encoders, joined along the last axis where there are several."""

    kind: Literal["encoded"] = "encoded"
    output: TextOutput
    encoders: tuple[str, ...] = Field(min_length=1, description="by name, in order")


class Constant(Frozen):
    """The same numbers for every sample and every run, in pixels where they are sizes."""

    kind: Literal["constant"] = "constant"
    row: tuple[float | Literal["height", "width"], ...] = Field(
        min_length=1, description="numbers, or the name of what the image has"
    )

    def at(self, image: tuple[int, int]) -> list[float]:
        """Return the numbers for images of this height and width."""
        named = {"height": float(image[0]), "width": float(image[1])}
        return [named[n] if isinstance(n, str) else n for n in self.row]


class GuidanceScale(Frozen):
    """The guidance scale of the run."""

    kind: Literal["guidance scale"] = "guidance scale"


Recipe = Annotated[Encoded | Constant | GuidanceScale, Field(discriminator="kind")]
"""How an input of the denoiser comes about."""


class Guidance(Frozen):
    """How a model is steered.

    ``classifier-free``: the denoiser runs on the negative and the positive prompt as one batch, the negative
    half first (Ho & Salimans 2022). ``embedded``: the scale is an input of the denoiser, which was distilled
    from a guided one, and there is no negative prompt. ``none``: neither.
    """

    kind: Literal["classifier-free", "embedded", "none"]
    scale: float = Field(description="where no other is asked for")
    zeros: bool = Field(
        default=False, description="whether zeros stand for the negative prompt where none is given"
    )

    @property
    def rows(self) -> int:
        """Rows of the denoiser's batch for each image."""
        return 2 if self.kind == "classifier-free" else 1
