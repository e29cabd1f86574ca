"""SDXL and FLUX pipelines that fit into a test: random weights in the real classes, tokenizers made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.tiny import SCHEDULER, TEXT_LENGTH, WORDS, liven, make_vae, vocabulary, write_tokenizer
from tests.tiny_families import DENOISERS

SIZE = 32
"""Height and width of the images, pixels."""
POOLED_WIDTH = 24
"""Of the pooled text that the denoisers take."""

EULER = SCHEDULER | {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
"""As Stable Diffusion XL's base model ships it."""

FLOW_MATCH: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
"""As FLUX.1-dev ships it; FLUX.1-schnell does not shift."""


def write_sdxl(folder: Path) -> Path:
    """Write a Stable Diffusion XL pipeline: text encoders 16 and 32 wide, the second with a projection."""
    parts = {
        "unet": lambda: _denoiser("sdxl"),
        "vae": make_vae,
        "text_encoder": lambda: _clip(16),
        "text_encoder_2": lambda: _clip(32, projection=POOLED_WIDTH),
    }
    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2", pad="a")  # as OpenCLIP's, it pads with another token
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    return _write(folder, parts, index, EULER)


def write_flux(folder: Path, family: str = "flux") -> Path:
    """Write a FLUX pipeline; ``family`` may also be ``flux-schnell``. The CLIP encoder has a projection.

    T5 is stored in BF16, as all of FLUX.1 is.
    """
    parts = {
        "transformer": lambda: _denoiser(family),
        "vae": lambda: make_vae(shift_factor=0.1),
        "text_encoder": lambda: _clip(POOLED_WIDTH, projection=POOLED_WIDTH),
        "text_encoder_2": _t5,
    }
    write_tokenizer(folder / "tokenizer")
    write_t5_tokenizer(folder / "tokenizer_2")
    index = {
        "_class_name": "FluxPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
    }
    shifts = family == "flux"
    scheduler = FLOW_MATCH | {"shift": 3.0 if shifts else 1.0, "use_dynamic_shifting": shifts}
    return _write(folder, parts, index, scheduler, bfloat16="text_encoder_2")


def _write(
    folder: Path,
    parts: dict[str, Any],
    index: dict[str, Any],
    scheduler: dict[str, Any],
    bfloat16: str | None = None,
) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, make in parts.items():
            part = make()
            liven(part)
            if name == bfloat16:
                part = part.bfloat16()
            part.save_pretrained(folder / name)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index |= {"scheduler": ["diffusers", scheduler["_class_name"]], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    (folder / "model_index.json").write_text(json.dumps({"_diffusers_version": "0.35.0", **index}))
    return folder


def _denoiser(family: str) -> torch.nn.Module:
    import diffusers

    _, class_name, config = DENOISERS[family]
    made: torch.nn.Module = getattr(diffusers, class_name)(**config)
    return made


def _clip(width: int, projection: int | None = None) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokens = vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=projection or width,
        bos_token_id=tokens["<|startoftext|>"],
        eos_token_id=tokens["<|endoftext|>"],
        pad_token_id=tokens["<|endoftext|>"],
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def _t5() -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=128,
            d_model=40,
            d_kv=10,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def write_t5_tokenizer(folder: Path) -> None:
    """Write a unigram tokenizer that knows the words of the tiny models, and letters."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
    tokenizer.save_pretrained(folder)
