"""The account of bytes: the paper's four numbers on BK-SDM-Tiny's shapes, and every file of a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import BK_SDM_TINY_UNET
from qlip_export.bundle import Bundle
from qlip_export.families.unet import UNET
from qlip_export.memory import (
    account,
    activation_grid_bytes,
    kibibytes,
    mebibytes,
    q2b_bytes,
    t2q_bytes,
    weight_bytes,
)
from qlip_export.policy.q2b import QualityToBits
from qlip_export.policy.t2q import TextToQuality
from tests.conftest import Cli

GROUPS = 10


@pytest.fixture(scope="module")
def bk_sdm_tiny() -> torch.nn.Module:
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    with init_empty_weights():
        return UNet2DConditionModel(**BK_SDM_TINY_UNET)


@pytest.fixture(scope="module")
def quantized_layers(bk_sdm_tiny: torch.nn.Module) -> int:
    layers = [
        name
        for name, module in bk_sdm_tiny.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    ]
    assert len(layers) == 151
    return sum(map(UNET.quantizes, layers))


def test_t2q_takes_1_5_mb() -> None:
    network = TextToQuality(torch.zeros(768, 768))
    assert t2q_bytes(768) == 4 * sum(p.numel() for p in network.parameters()) == 4 * 394_241
    assert round(mebibytes(t2q_bytes(768)), 1) == 1.5


def test_q2b_takes_12_1_kb(quantized_layers: int) -> None:
    module = QualityToBits((8, 16, 32), quantized_layers, GROUPS, frozenset("qmh"))
    found = q2b_bytes(quantized_layers, GROUPS, 2)
    assert found == 4 * sum(p.numel() for p in module.parameters()) == 4 * 3_102
    assert round(kibibytes(found), 1) == 12.1


@pytest.mark.parametrize(("options", "parts"), [((8, 16), "q"), ((8, 16, 32), "qh"), ((8, 16, 32), "qm")])
def test_q2b_without_some_parts_is_smaller(options: tuple[int, ...], parts: str) -> None:
    module = QualityToBits(options, 7, 3, frozenset(parts))
    assert q2b_bytes(7, 3, len(parts) - 1) == 4 * sum(p.numel() for p in module.parameters())


def test_scales_and_zero_points_take_2_2_kb(quantized_layers: int) -> None:
    assert activation_grid_bytes(quantized_layers, 2) == 4 * 564
    assert round(kibibytes(activation_grid_bytes(quantized_layers, 2)), 1) == 2.2


def test_weights_take_154_2_mb(bk_sdm_tiny: torch.nn.Module) -> None:
    parameters = sum(p.numel() for p in bk_sdm_tiny.parameters())
    assert parameters == 323_384_964
    assert round(mebibytes(weight_bytes(parameters, 4)), 1) == 154.2


def test_account_of_a_bundle(adaptive_bundle: Path, tiny_model: Path) -> None:
    from diffusers import UNet2DConditionModel

    manifest = Bundle.open(adaptive_bundle).manifest
    rows = {row.part: row for row in account(manifest)}
    assert rows["Q2B"].bytes == q2b_bytes(8, 2, 2)  # eight blocks, two timestep groups
    assert rows["T2Q"].bytes == t2q_bytes(32)
    assert rows["activation scales and zero points"].bytes == 4 * 564
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    assert manifest.model.parameters == sum(p.numel() for p in unet.parameters())
    assert rows["denoiser"].bytes == manifest.model.parameters / 2
    files = [row.bytes for row in rows.values() if row.group == "files"]
    assert sum(files) == sum(entry.size for entry in manifest.files.values())
    engines = sum(path.stat().st_size for path in (adaptive_bundle / "engines").rglob("*.blob"))
    assert rows["engines of openvino"].bytes == engines


def test_account_without_a_policy(bundle: Path) -> None:
    rows = {row.part for row in account(Bundle.open(bundle).manifest)}
    assert not rows & {"T2Q", "Q2B", "T2Q's projection"}
    assert {"activation scales and zero points", "denoiser"} <= rows


def test_inspect_prints_the_account(cli: Cli, adaptive_bundle: Path) -> None:
    done = cli("inspect", adaptive_bundle, "--memory")
    assert done.code == 0
    assert "activation scales" in done.out
    assert "engines of openvino" in done.out
    rows = json.loads(cli("inspect", adaptive_bundle, "--memory", "--json").out)["memory"]
    assert rows == [row.model_dump() for row in account(Bundle.open(adaptive_bundle).manifest)]
