"""A text-to-image model that fits into a test: random weights, made in code, in the layout of diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

CHANNELS = (16, 32, 64)
TEXT_WIDTH = 32
TEXT_LENGTH = 16
LATENT_SIZE = 8
IMAGE_SIZE = 32
BLOCKS = (
    "time",
    "stem",
    *(f"down_blocks.{i}" for i in range(3)),
    *(f"up_blocks.{i}" for i in range(3)),
    "out",
)
"""The blocks of a coarse cut, in the order in which they run."""

WORDS = [
    "a",
    "an",
    "the",
    "of",
    "on",
    "red",
    "blue",
    "green",
    "apple",
    "boat",
    "cat",
    "dog",
    "house",
    "sun",
    "tree",
]

SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.35.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def write_model(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    channels: tuple[int, ...] = CHANNELS,
) -> Path:
    """Write the model; the denoiser has the topology of BK-SDM-Tiny, so 151 layers of which 141 quantize.

    With ``channels`` of fewer blocks it is smaller still.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = {"unet": make_denoiser(channels), "vae": make_vae(), "text_encoder": make_text_encoder()}
        for part in parts.values():
            liven(part)
    for name, part in parts.items():
        part.to(dtype).save_pretrained(folder / name)
    write_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_towers(model: Path, folder: Path) -> Path:
    """Copy ``model`` and give the copy the towers of a CLIP model, of random weights."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    shutil.copytree(model, folder)
    config = CLIPTextConfig.from_pretrained(model / "text_encoder", projection_dim=TEXT_WIDTH)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = CLIPTextModelWithProjection(config)
        vision = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=IMAGE_SIZE,
                patch_size=8,
                projection_dim=TEXT_WIDTH,
            )
        )
    text.save_pretrained(folder / "text_encoder")
    vision.save_pretrained(folder / "image_encoder")
    return folder


def make_denoiser(channels: tuple[int, ...] = CHANNELS) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def make_vae(**changes: Any) -> torch.nn.Module:
    """Return a VAE of 4 latent channels that makes 4 x 4 pixels of each latent."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        scaling_factor=0.5,
        **changes,
    )


def make_text_encoder() -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary()),
            hidden_size=TEXT_WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=vocabulary()["<|startoftext|>"],
            eos_token_id=vocabulary()["<|endoftext|>"],
            pad_token_id=vocabulary()["<|endoftext|>"],
        )
    )


def write_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> None:
    """Write a byte-pair tokenizer that knows every letter and a handful of words, and pads with ``pad``."""
    folder.mkdir(parents=True)
    merges = ["#version: 0.2", *(" ".join(pair) for pair in _merges())]
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    specials = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": pad,
        "unk_token": "<|endoftext|>",
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(specials))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_LENGTH, **specials})
    )


def _merges() -> list[tuple[str, str]]:
    """Glue each word together from the left, its last letter marked as CLIP marks the end of a word."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        letters = [*word[:-1], word[-1] + "</w>"]
        while len(letters) > 1:
            merges[letters[0], letters[1]] = None
            letters = [letters[0] + letters[1], *letters[2:]]
    return list(merges)


def vocabulary() -> dict[str, int]:
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in _merges())]
    return {token: i for i, token in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}


def liven(module: torch.nn.Module) -> None:
    """Make norms and biases differ from 1 and 0, so that none of them can get lost unnoticed."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
