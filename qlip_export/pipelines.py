"""How the diffusers pipeline of each family conditions, samples and decodes: data, and functions of configs.

The torch-free run time reads the outcome from the manifest. Adding a family is adding an entry to
``PIPELINES``, by the name of the family in `qlip_export.families`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qlip_export.conditioning import Constant, Encoded, Guidance, GuidanceScale, Recipe, TextOutput
from qlip_export.errors import QlipError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Size:
    """Height and width of the image in pixels, and of its latents."""

    image: tuple[int, int]
    latents: tuple[int, int]


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a pipeline.

    Attributes:
        name: Its folder in the diffusers layout.
        tokenizer: That of its tokenizer.
        outputs: What its graph computes.
        states: Which states ``text`` are: the last, or those that enter the last layer.
    """

    name: str
    tokenizer: str
    outputs: tuple[TextOutput, ...]
    states: Literal["last", "penultimate"] = "last"


@dataclass(frozen=True)
class Decoding:
    """What turns latents into the VAE's: ``latents / divisor + shift``, one number, or one a channel."""

    divisor: tuple[float, ...]
    shift: tuple[float, ...]


def _given_steps(_: Config, steps: int, __: Size) -> dict[str, Any]:
    return {"num_inference_steps": steps}


def _scaled(vae: Config) -> Decoding:
    # StableDiffusionPipeline ignores shift_factor; what it ignores, parity must ignore as well.
    return Decoding((float(vae["scaling_factor"]),), (0.0,))


def _unpacked(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    return latents


@dataclass(frozen=True)
class Pipeline:
    """How one family is conditioned, sampled and decoded.

    Attributes:
        text_encoders: All of them.
        quality_encoder: The CLIP text encoder whose pooled embedding T2Q reads.
        inputs: Of the denoiser besides latents and timestep: recipes by name, from the size of the image.
        guidance: From `model_index.json`.
        scheduler: Taken where no other is asked for.
        timesteps: Arguments of the scheduler's ``set_timesteps``, from its config, the steps and the size.
        decoding: From the VAE's config.
        longest_text: Argument of the diffusers pipeline for the tokens of the denoiser's text, if it has one.
        pack: Brings latents (N, C, H, W) into the form in which the diffusers pipeline takes them.
    """

    text_encoders: tuple[TextEncoder, ...]
    quality_encoder: str
    inputs: Callable[[Size], dict[str, Recipe]]
    guidance: Callable[[Config], Guidance]
    scheduler: str
    timesteps: Callable[[Config, int, Size], dict[str, Any]] = _given_steps
    decoding: Callable[[Config], Decoding] = _scaled
    longest_text: str | None = None
    pack: Callable[[NDArray[np.float32]], NDArray[np.float32]] = _unpacked

    @property
    def quality(self) -> TextEncoder:
        """The text encoder that `quality_encoder` names."""
        return next(encoder for encoder in self.text_encoders if encoder.name == self.quality_encoder)


def pipeline_of(family: str) -> Pipeline:
    """Return the pipeline of a family.

    Raises:
        QlipError: There is none.
    """
    if family not in PIPELINES:
        raise QlipError(
            f"it is not known how prompts reach a denoiser of the family {family!r}",
            expected=", ".join(PIPELINES),
            found=family,
            fix="add an entry to qlip_export/pipelines.py",
        )
    return PIPELINES[family]


# --- Stable Diffusion 1.x

_SD = Pipeline(
    text_encoders=(TextEncoder("text_encoder", "tokenizer", ("text", "pooled")),),
    quality_encoder="text_encoder",
    inputs=lambda _: {"text": Encoded(output="text", encoders=("text_encoder",))},
    guidance=lambda _: Guidance(kind="classifier-free", scale=4.0),
    scheduler="dpmsolver++",
)


# --- Stable Diffusion XL (Podell et al. 2023)


def _sdxl_inputs(_: Size) -> dict[str, Recipe]:
    return {
        "text": Encoded(output="text", encoders=("text_encoder", "text_encoder_2")),
        "pooled": Encoded(output="projected", encoders=("text_encoder_2",)),
        # Original size, top left corner of the crop, target size: an image as asked for, not cut.
        "time_ids": Constant(row=("height", "width", 0.0, 0.0, "height", "width")),
    }


def _sdxl_decoding(vae: Config) -> Decoding:
    scale, mean, std = float(vae["scaling_factor"]), vae.get("latents_mean"), vae.get("latents_std")
    if mean is None or std is None:
        return Decoding((scale,), (0.0,))
    return Decoding(tuple(scale / float(s) for s in std), tuple(float(m) for m in mean))


_SDXL = Pipeline(
    text_encoders=(
        TextEncoder("text_encoder", "tokenizer", ("text",), "penultimate"),
        TextEncoder("text_encoder_2", "tokenizer_2", ("text", "pooled", "projected"), "penultimate"),
    ),
    quality_encoder="text_encoder_2",
    inputs=_sdxl_inputs,
    guidance=lambda index: Guidance(
        kind="classifier-free", scale=5.0, zeros=bool(index.get("force_zeros_for_empty_prompt", True))
    ),
    scheduler="euler",
    decoding=_sdxl_decoding,
)


# --- FLUX.1


def _flux_inputs(_: Size) -> dict[str, Recipe]:
    return {
        "text": Encoded(output="text", encoders=("text_encoder_2",)),
        "pooled": Encoded(output="pooled", encoders=("text_encoder",)),
    }


def _flux_timesteps(scheduler: Config, steps: int, size: Size) -> dict[str, Any]:
    """Return sigmas, and the shift mu that grows linearly with the number of patches."""
    given: dict[str, Any] = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    if scheduler.get("use_flow_sigmas"):
        given = {"num_inference_steps": steps}
    fewest, most = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    patches = (size.latents[0] // 2) * (size.latents[1] // 2)
    slope = (high - low) / (most - fewest)
    return {**given, "mu": patches * slope + (low - slope * fewest)}


def _flux_pack(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (N, C, H, W) as (N, H/2 * W/2, 4C): each patch of two by two becomes one token."""
    n, c, h, w = latents.shape
    patches = latents.reshape(n, c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3, 5)
    packed: NDArray[np.float32] = patches.reshape(n, h * w // 4, 4 * c)
    return packed


_SCHNELL = Pipeline(
    text_encoders=(
        TextEncoder("text_encoder", "tokenizer", ("pooled",)),
        TextEncoder("text_encoder_2", "tokenizer_2", ("text",)),
    ),
    quality_encoder="text_encoder",
    inputs=_flux_inputs,
    guidance=lambda _: Guidance(kind="none", scale=0.0),
    scheduler="flow-match-euler",
    timesteps=_flux_timesteps,
    decoding=lambda vae: Decoding((float(vae["scaling_factor"]),), (float(vae["shift_factor"]),)),
    longest_text="max_sequence_length",
    pack=_flux_pack,
)

_DEV = replace(
    _SCHNELL,
    inputs=lambda size: {**_flux_inputs(size), "guidance": GuidanceScale()},
    guidance=lambda _: Guidance(kind="embedded", scale=3.5),
)

PIPELINES = {"unet": _SD, "sdxl": _SDXL, "flux": _DEV, "flux-schnell": _SCHNELL}
