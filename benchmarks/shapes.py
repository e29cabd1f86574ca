"""Models of a given shape with random weights, in the diffusers layout: only their speed is of interest.

The denoiser has the real shape. Text encoder and VAE decoder are tiny stand-ins of the right widths, so that
a bundle can be built; nothing they compute is timed. The scales keep activations finite and of order one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SEED = 0

BK_SDM_TINY_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "mid_block_type": None,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 1,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
BK_SDM_TINY_PARAMETERS = 323_384_964
"""What the published checkpoint has."""

TEXT_LENGTH = 77


def write_bk_sdm_tiny(folder: Path) -> None:
    """Write a denoiser of BK-SDM-Tiny's shape with random weights to ``folder``, unless it is there.

    512x512 images, latents (4, 64, 64), text (77, 768), weights stored in FP16 as the published ones are.
    """
    if (folder / "model_index.json").is_file():
        return
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel

    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(**BK_SDM_TINY_UNET)
    found = sum(p.numel() for p in unet.parameters())
    if found != BK_SDM_TINY_PARAMETERS:
        raise AssertionError(f"expected {BK_SDM_TINY_PARAMETERS} parameters, found {found}")
    # torch's own initialisation; what closes a residual branch is small in a trained network as well.
    for name, parameter in unet.named_parameters():
        if name.endswith(("conv2.weight", "proj_out.weight", "to_out.0.weight", "ff.net.2.weight")):
            parameter.data.mul_(0.3)
    unet.half().save_pretrained(folder / "unet", safe_serialization=True)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    )
    vae.half().save_pretrained(folder / "vae", safe_serialization=True)
    _write_text_encoder(folder, width=BK_SDM_TINY_UNET["cross_attention_dim"])
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    DPMSolverMultistepScheduler(**betas, steps_offset=1).save_config(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    # Last, because its presence says that the folder is whole.
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_text_encoder(folder: Path, *, width: int) -> None:
    """Write a one-layer CLIP text encoder and a tokenizer whose vocabulary is the alphabet."""
    from transformers import CLIPTextConfig, CLIPTextModel

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    start, end = len(tokens) - 2, len(tokens) - 1
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=12,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    CLIPTextModel(config).half().save_pretrained(folder / "text_encoder", safe_serialization=True)
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (tokenizer / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tokenizer / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TEXT_LENGTH,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
