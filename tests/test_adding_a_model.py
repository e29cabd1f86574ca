"""What docs/adding-a-model.md says, done: models that no list of ours names."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlip_export import families
from qlip_export.bundle import Bundle
from qlip_export.capture import capture_denoiser, denoiser_family, shapes_of
from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError
from qlip_export.graph.split import split
from qlip_export.runtime import TextToImage
from qlip_export.zoo import CONFIGS
from tests.conftest import Cli, build_tiny
from tests.graph.conftest import relative, run
from tests.tiny import TEXT_WIDTH

PAGE = (Path(__file__).parents[1] / "docs" / "adding-a-model.md").read_text(encoding="utf-8")

TINY_SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 12,
}


def block(language: str) -> str:
    """Return the one code block of the page in this language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return str(found)


def test_plan_of_tiny_sd_is_what_the_page_shows(cli: Cli, tmp_path: Path) -> None:
    model = tmp_path / "tiny-sd"
    shutil.copytree(CONFIGS / "sd-v1-4", model)
    (model / "unet" / "config.json").write_text(block("json"))
    done = cli("plan", "--model", model)
    assert done.code == 0, done.err
    shown = re.search(r"    tiny-sd \(unet\).*?guidance\n", PAGE, flags=re.DOTALL)
    assert shown is not None
    for line in shown[0].splitlines():
        assert line.strip() in done.out


def test_unet_with_plain_down_blocks_and_a_middle_runs_from_its_config(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "unet" / "config.json").read_text())
    config |= {
        "block_out_channels": [16, 32],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": TEXT_WIDTH,
    }
    (model / "unet" / "config.json").write_text(json.dumps(config))
    build_tiny(model, tmp_path / "bundle", bits=(8,), random_weights=True)
    blocks = [b.name for b in Bundle.open(tmp_path / "bundle").manifest.blocks]
    assert blocks == [
        "time", "stem", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1", "out",
    ]  # fmt: skip
    (image,) = TextToImage.load(tmp_path / "bundle")("a red apple", seed=0).images
    assert np.asarray(image).std() > 1


@pytest.fixture
def sd3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Checkpoint:
    """A tiny Stable Diffusion 3 by its configs, its family as the page writes it."""
    scope: dict[str, Any] = {}
    exec(compile(block("python"), "adding-a-model.md", "exec"), scope)
    known = families.families()
    monkeypatch.setattr(families, "families", lambda: (*known, scope["SD3"]))
    configs = {
        "transformer": TINY_SD3,
        "vae": {"block_out_channels": [8, 8], "latent_channels": 4},
    }
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    index = {"transformer": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return Checkpoint(tmp_path)


def test_family_of_the_page_captures_and_cuts_a_new_class(sd3: Checkpoint) -> None:
    from diffusers import SD3Transformer2DModel

    family, shapes = denoiser_family(sd3), shapes_of(sd3, batch_size=1)
    rng = np.random.default_rng(0)
    feeds = {i.name: rng.standard_normal(shapes.of(i), dtype=np.float32) for i in family.inputs}
    feeds["timestep"] = np.array([601], dtype=np.float32)
    module = SD3Transformer2DModel(**TINY_SD3).eval().requires_grad_(False)
    with torch.no_grad():
        expected = module(
            *(torch.from_numpy(feeds[name]) for name in ("latents", "text", "pooled", "timestep")),
            return_dict=False,
        )[0].numpy()
    graph = capture_denoiser(sd3, shapes)
    feeds |= {name: value.numpy() for name, value in module.state_dict().items()}
    assert relative(run(graph, feeds)["noise"], expected) < 1e-5
    blocks = split(graph, family.input_names, lambda scope: family.block_of(scope, "coarse"))
    values = dict(feeds)
    for piece in blocks:
        values |= run(piece.model, values)
    assert relative(values["noise"], expected) < 1e-5
    assert sorted(b.name for b in blocks) == [
        "out", "stem", "time", "transformer_blocks.0", "transformer_blocks.1"
    ]  # fmt: skip
    with pytest.raises(QlipError, match="not cut at 'fine'"):
        family.block_of("pos_embed", "fine")
