"""The five networks of the emoji model: their configurations, builders and size budget.

The denoiser has the BK-SDM-Tiny topology (https://arxiv.org/abs/2305.15798, section 3.1): three levels, one
residual block and one transformer per down level, two per up level, and no middle block.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

DENOISER_LAYERS = 151
MAX_PARAMETERS = 18_000_000
CONTEXT_LENGTH = 77


@dataclass(frozen=True)
class Sizes:
    """Every width and depth of the model; the defaults are the shipped model."""

    image: int = 128
    latent_channels: int = 4
    vocabulary: int = 2560
    text_width: int = 192
    text_layers: int = 4
    text_heads: int = 6
    text_mlp: int = 768
    vision_width: int = 192
    vision_layers: int = 4
    vision_heads: int = 6
    vision_mlp: int = 512
    patch: int = 16
    projection: int = 192
    vae_channels: tuple[int, ...] = (32, 64, 96)
    unet_channels: tuple[int, ...] = (96, 160, 192)
    # Groups of few channels normalize each channel by itself and lose its mean: the colours of a drawing.
    vae_groups: int = 8
    unet_groups: int = 16

    @property
    def latent(self) -> int:
        """Height and width of the latents, in cells: the autoencoder halves once per level but the last."""
        return int(self.image // 2 ** (len(self.vae_channels) - 1))


SHIPPED = Sizes()
# Small enough that a rehearsal of every stage takes a minute on two CPU cores.
REHEARSAL = Sizes(
    text_width=64, text_layers=1, text_heads=2, text_mlp=64, vision_width=64, vision_layers=1, vision_heads=2,
    vision_mlp=64, projection=64, vae_channels=(8, 8, 16), unet_channels=(32, 32, 64),
)  # fmt: skip
SIZES = {"shipped": SHIPPED, "rehearsal": REHEARSAL}


def text_config(sizes: Sizes, vocabulary: int) -> CLIPTextConfig:
    """Return the CLIP text configuration; the last two of the `vocabulary` entries start and end a text."""
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=sizes.text_width,
        intermediate_size=sizes.text_mlp,
        projection_dim=sizes.projection,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_heads,
        max_position_embeddings=CONTEXT_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        # Stable Diffusion pads with the end token; the text states of the padding are part of the condition.
        pad_token_id=vocabulary - 1,
    )


def vision_config(sizes: Sizes) -> CLIPVisionConfig:
    """Return the CLIP vision configuration for square images of `sizes.image` pixels."""
    return CLIPVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=sizes.vision_mlp,
        projection_dim=sizes.projection,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        image_size=sizes.image,
        patch_size=sizes.patch,
        hidden_act="quick_gelu",
    )


def build_text(sizes: Sizes, vocabulary: int) -> CLIPTextModelWithProjection:
    """Build the text tower with random weights: (batch, 77) int64 token ids to (batch, 77, width) states."""
    return CLIPTextModelWithProjection(text_config(sizes, vocabulary))


def build_vision(sizes: Sizes) -> CLIPVisionModelWithProjection:
    """Build the vision tower with random weights: (batch, 3, image, image) to (batch, projection)."""
    return CLIPVisionModelWithProjection(vision_config(sizes))


def build_vae(sizes: Sizes) -> AutoencoderKL:
    """Build the autoencoder with random weights: (batch, 3, image, image) in [-1, 1] to latents and back.

    `scaling_factor` is 1: training folds the mean and deviation of the latents into the 1x1 convolutions on
    either side of them.
    """
    levels = len(sizes.vae_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.vae_channels,
        layers_per_block=1,
        latent_channels=sizes.latent_channels,
        norm_num_groups=sizes.vae_groups,
        sample_size=sizes.image,
        scaling_factor=1.0,
    )


def build_unet(sizes: Sizes) -> UNet2DConditionModel:
    """Build the denoiser with random weights: latents, timesteps and text states to predicted noise."""
    levels = len(sizes.unet_channels)
    unet = UNet2DConditionModel(
        sample_size=sizes.latent,
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=sizes.unet_channels,
        layers_per_block=1,
        cross_attention_dim=sizes.text_width,
        attention_head_dim=8,
        norm_num_groups=sizes.unet_groups,
    )
    if sizes is SHIPPED:
        found = count_layers(unet)
        if found != DENOISER_LAYERS:
            raise ValueError(
                f"expected {DENOISER_LAYERS} Conv2d and Linear layers in the denoiser, found {found}"
            )
    return unet


def count_layers(model: torch.nn.Module) -> int:
    """Count the Conv2d and Linear modules of `model`, the layers that a compiler may quantize."""
    return sum(isinstance(module, torch.nn.Conv2d | torch.nn.Linear) for module in model.modules())


def count_parameters(model: torch.nn.Module) -> int:
    """Count the scalar parameters of `model`."""
    return sum(parameter.numel() for parameter in model.parameters())


def scheduler_config() -> dict[str, Any]:
    """Return the noise schedule as a scheduler configuration that every diffusers sampler can read.

    The linear schedule ends at a signal-to-noise ratio of 4e-5: sampling may start from pure noise and still
    reach the even white backgrounds of the data.
    """
    return {
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        # Every sampler starts at the last step of the schedule, where the latents are noise and nothing else.
        "timestep_spacing": "linspace",
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
    }
