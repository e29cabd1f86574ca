"""Reading a diffusers folder: parameters by the names the graph uses, in the precision they are stored in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qlip_export.capture import capture_denoiser, shapes_of
from qlip_export.checkpoint import Checkpoint, Component
from qlip_export.errors import QlipError
from qlip_export.families.unet import UNET
from qlip_export.graph.layers import find_layers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def component(folder: Path, **tensors: torch.Tensor) -> Component:
    save_file({k.replace("__", "."): v for k, v in tensors.items()}, folder / "model.safetensors")
    return Component(folder)


def test_precision_is_kept_and_bfloat16_widened(folder: Path) -> None:
    values = torch.tensor([1.0, -2.5, 3.140625])
    part = component(folder, a=values, b=values.half(), c=values.bfloat16())
    assert part.get("a").dtype == np.float32
    assert part.get("b").dtype == np.float16
    assert part.get("c").dtype == np.float32
    assert part.get("c", bfloat16=True).dtype.name == "bfloat16"
    assert part.get("a", bfloat16=True).dtype == np.float32
    for name in "abc":
        np.testing.assert_array_equal(part.get(name, bfloat16=True).astype(np.float32), values.numpy())
        np.testing.assert_array_equal(part.get(name).astype(np.float32), values.numpy())


def test_old_attention_names_are_found(folder: Path) -> None:
    part = component(folder, mid__attentions__0__query__weight=torch.full((2, 2), 3.0))
    np.testing.assert_array_equal(part.get("mid.attentions.0.to_q.weight"), np.full((2, 2), 3.0))


def test_dropped_prefix_is_found_when_only_one_name_fits(folder: Path) -> None:
    part = component(folder, text_model__norm__bias=torch.ones(2))
    np.testing.assert_array_equal(part.get("norm.bias"), np.ones(2))
    part = component(folder, a__norm__bias=torch.ones(2), b__norm__bias=torch.ones(2))
    with pytest.raises(QlipError, match=r"no parameter 'norm\.bias'"):
        part.get("norm.bias")


def test_values_that_are_not_finite_are_refused_by_name(folder: Path) -> None:
    part = component(folder, w=torch.tensor([1.0, float("nan")]))
    with pytest.raises(QlipError, match="'w'"):
        part.get("w")


def test_fingerprint_follows_config_and_weights(folder: Path) -> None:
    first = component(folder, w=torch.ones(3)).fingerprint
    assert component(folder, w=torch.ones(3)).fingerprint == first
    assert component(folder, w=torch.zeros(3)).fingerprint != first
    (folder / "config.json").write_text('{"a": 1}')
    assert component(folder, w=torch.ones(3)).fingerprint != first


@pytest.mark.slow
def test_denoiser_of_stable_diffusion_1_4_is_captured_without_weights(tmp_path: Path) -> None:
    """282 layers, 338.6 GMACs an image and step at 512x512, a mid block and blocks without attention."""
    parts = {
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": 8,
            "block_out_channels": [320, 640, 1280, 1280],
            "cross_attention_dim": 768,
            "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
            "in_channels": 4,
            "layers_per_block": 2,
            "sample_size": 64,
            "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        },
        "vae": {"block_out_channels": [128, 256, 512, 512]},
        "text_encoder": {"max_position_embeddings": 77},
    }
    index = {"unet": ["diffusers", "UNet2DConditionModel"]}
    for name, config in parts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        index.setdefault(name, ["library", "Class"])
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(tmp_path)
    model = capture_denoiser(checkpoint, shapes_of(checkpoint, batch_size=1))
    layers = find_layers(model.graph)
    assert len(layers) == 282
    assert sum(UNET.quantizes(layer.name) for layer in layers) == 266
    assert round(sum(layer.macs for layer in layers) / 2e9, 1) == 338.6
    blocks = {UNET.block_of(layer.name, "coarse") for layer in layers}
    assert {"mid_block", "down_blocks.3", "up_blocks.0"} <= blocks


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("in_channels", 9),
        ("addition_embed_type", "text_image"),
        ("sample_size", [64, 96]),
        ("class_embed_type", "timestep"),
    ],
)
def test_unets_with_other_inputs_are_refused_before_any_work(
    tiny_model: Path, tmp_path: Path, key: str, value: object
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    config = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(QlipError, match=key):
        shapes_of(Checkpoint(copy), batch_size=1)
