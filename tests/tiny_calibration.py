"""Calibration of the tiny model that nobody trained: random, and such that prompts get different bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from qlip_export.checkpoint import Checkpoint
from qlip_export.files import sha256_of
from qlip_export.policy.q2b import QualityToBits
from qlip_export.policy.store import Policy, PolicyRecipe, Quality, QualityRecipe, policy_name
from qlip_export.policy.t2q import TextToQuality
from qlip_export.quant.ranges import Ranges
from qlip_export.quant.rounding import LearnedRounding, RoundingRecipe, floor_codes
from qlip_export.quant.weights import round_to_nearest
from tests.tiny import BLOCKS, TEXT_LENGTH, TEXT_WIDTH, WORDS

UNITS = BLOCKS[1:]
"""The blocks that hold a quantized layer: all but the timestep embedding."""
GROUPS = 2


def write_calibration(folder: Path, model: Path) -> None:
    """Write learned rounding, T2Q, and policies for several sets of bit options."""
    checkpoint = Checkpoint(model)
    layers = sorted(Ranges.load(folder / "ranges.json").layers)
    write_rounding(folder, checkpoint)
    sha256 = write_quality(folder, checkpoint)
    for options in ((8, 16), (8, 16, 32), (6, 8, 16), (6, 8, 16, 32)):
        write_policy(folder, checkpoint, options, t2q_sha256=sha256)
    write_policy(folder, checkpoint, (8, 16, 32), t2q_sha256=sha256, unit="layer", units=layers)


def pooled_embeddings(model: Path, prompts: Sequence[str]) -> torch.Tensor:
    """Return what transformers pools from ``prompts``, (N, C_clip) float32."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer", local_files_only=True)
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder", local_files_only=True).eval()
    ids = tokenizer(
        list(prompts), padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        pooled: torch.Tensor = encoder(ids).pooler_output
    return pooled


def write_quality(folder: Path, checkpoint: Checkpoint, **changes: Any) -> str:
    """Write a T2Q network whose qualities spread over the words of the model; return its SHA-256."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = TextToQuality(torch.randn(TEXT_WIDTH, TEXT_WIDTH))
        pooled = pooled_embeddings(checkpoint.folder, WORDS)
        logits = network.output(torch.relu(network.hidden(torch.relu(pooled @ network.projection.T))))
        network.output.bias -= logits.mean()
        for parameter in network.output.parameters():
            parameter *= 1.5 / logits.std()
    recipe: dict[str, Any] = {
        "text_encoder": checkpoint.component("text_encoder").fingerprint,
        "denoiser": checkpoint.component("unet").fingerprint,
        "criterion": "quality",
        "prompts": 2,
        "prompts_sha256": "0" * 64,
        "steps": 3,
        "scheduler": "dpmsolver++",
        "guidance": 4.0,
        "seed": 0,
        "low": 0.0,
        "high": 1.0,
        "mixture": 1,
        "epochs": 0,
        "held_out": 2,
        "srocc": 0.25,
        "plcc": 0.5,
    }
    return sha256_of(Quality(network, QualityRecipe.model_validate(recipe | changes)).save(folder))


def write_policy(
    folder: Path,
    checkpoint: Checkpoint,
    options: tuple[int, ...],
    *,
    t2q_sha256: str,
    units: Sequence[str] = UNITS,
    name: str | None = None,
    always: int | None = None,
    **changes: Any,
) -> None:
    """Write a policy whose units change their bits at other qualities in each of its groups.

    Args:
        folder: Calibration folder.
        checkpoint: The model it is for.
        options: Bit options.
        t2q_sha256: Of the T2Q network.
        units: What it decides over.
        name: Under which it is kept; the regular one by default.
        always: An option that it chooses whatever the quality; only the lowest and the highest can be.
        changes: Fields of the recipe.
    """
    parts = ("q", "m", "h") if len(options) > 2 else ("q",)
    recipe: dict[str, Any] = {
        "denoiser": checkpoint.component("unet").fingerprint,
        "options": options,
        "unit": "block",
        "granularity": "coarse",
        "units": tuple(units),
        "parts": parts,
        "criterion": "quality",
        "t2q_sha256": t2q_sha256,
        "cost": "bits",
        "steps": 8,
        "groups": GROUPS,
        "forced_steps": 2,
        "scheduler": "dpmsolver++",
        "guidance": 4.0,
        "prompts": 2,
        "prompts_sha256": "0" * 64,
        "iterations": 0,
        "batch": 1,
        "learning_rate": 0.0,
        "seed": 0,
        "lambda_bit": 0.0,
        "target_fab": None,
        "fab": 12.5,
        "error": 0.0,
    }
    made = PolicyRecipe.model_validate(recipe | changes)
    q2b = QualityToBits(options, len(units), made.groups, frozenset(parts))
    generator = torch.Generator().manual_seed(len(options))
    for parameter, spread in zip(q2b.parameters(), (12.0, 1.0, 2.0, 2.0), strict=False):
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread
    if always is not None:
        sign = 1.0 if always == options[-1] else -1.0
        for parameter in q2b.parameters():
            parameter.data = torch.full_like(parameter, 20.0 * sign)
        q2b.slope.data.zero_()
    regular = policy_name(options, made.unit, made.criterion, made.parts, made.cost)
    Policy(q2b, made).save(folder, name or regular)


def write_few_patterns(folder: Path, checkpoint: Checkpoint, *, t2q_sha256: str, name: str) -> None:
    """Write a policy by layer that mixes 8, 16 and 32 bits in two blocks and leaves the others alone."""
    layers = sorted(Ranges.load(folder / "ranges.json").layers)
    write_policy(
        folder, checkpoint, (8, 16, 32), t2q_sha256=t2q_sha256, unit="layer", units=layers, name=name
    )
    policy = Policy.load(folder, name)
    q2b = policy.q2b
    assert q2b.middle is not None and q2b.high is not None
    for k, layer in enumerate(layers):
        mixed = layer.startswith(("down_blocks.1.", "up_blocks.1."))
        # Rising from 8 to 16; falling from 16 to 8; rising from 8 to 32; always 8.
        kind = k % 3 if mixed else 3
        q2b.slope.data[k] = (24.0, -24.0, 16.0, 0.0)[kind]
        q2b.offset.data[k] = (0.0, 2.0, 1.0, -6.0)[kind]
        q2b.middle.data[:, k] = -4.0
        q2b.high.data[:, k] = torch.tensor((2.0, 4.0)) if kind == 2 else -4.0
    policy.save(folder, name)


def write_rounding(folder: Path, checkpoint: Checkpoint, **changes: Any) -> None:
    """Write rounding that differs from the nearest codes in one weight of ten."""
    component, generator = checkpoint.component("unet"), np.random.default_rng(0)
    up, scale = {}, {}
    for parameter, weight in load_file(component.folder / "diffusion_pytorch_model.safetensors").items():
        if weight.ndim == 1:
            continue
        name = parameter.removesuffix(".weight")
        nearest = round_to_nearest(name, weight, 4, 0)
        up[name] = nearest.codes > floor_codes(weight, nearest.scale)
        up[name] ^= generator.random(weight.shape) < 0.1
        scale[name] = nearest.scale
    recipe: dict[str, Any] = {
        "fingerprint": component.fingerprint,
        "bits": 4,
        "prompts": 2,
        "prompts_sha256": "0" * 64,
        "samples": 1,
        "steps": 3,
        "scheduler": "dpmsolver++",
        "guidance": 4.0,
        "iterations": 0,
        "batch": 1,
        "seed": 0,
        "flipped": 0.1,
        "error_nearest": 0.0,
        "error_learned": 0.0,
    }
    LearnedRounding.of(RoundingRecipe.model_validate(recipe | changes), up, scale).save(
        folder / "weights.safetensors"
    )
