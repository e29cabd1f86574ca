"""Denoisers of the families beyond Stable Diffusion 1.x that fit into a test: configs of the real classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT_LENGTH = 16

SDXL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 48,
    "use_linear_projection": True,
    "norm_num_groups": 8,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 24,
}
"""The parts of Stable Diffusion XL: a pooled text of 24 numbers, text states of 48."""

FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 40,
    "pooled_projection_dim": 24,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 6, 6],
}
"""FLUX.1-dev with two double and three single blocks, 4 latent channels."""

DENOISERS = {
    "sdxl": ("unet", "UNet2DConditionModel", SDXL),
    "flux": ("transformer", "FluxTransformer2DModel", FLUX),
    "flux-schnell": ("transformer", "FluxTransformer2DModel", FLUX | {"guidance_embeds": False}),
}
"""Folder, class and config of each family's denoiser."""


def write_configs(folder: Path, family: str) -> Path:
    """Write what a capture of the denoiser reads: configs and an index, no weights."""
    part, class_name, config = DENOISERS[family]
    configs = {
        part: {"_class_name": class_name, **config},
        "vae": {"block_out_channels": [8, 8, 8], "latent_channels": 4},
        "text_encoder": {"max_position_embeddings": TEXT_LENGTH},
    }
    index = {"vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"]}
    for name, values in configs.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(values))
    (folder / "model_index.json").write_text(json.dumps(index | {part: ["diffusers", class_name]}))
    return folder
