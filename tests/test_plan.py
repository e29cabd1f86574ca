"""Plans of the zoo: the published numbers, from configs alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlip_export.bundle import Bundle
from qlip_export.memory import mebibytes
from qlip_export.plan import Plan, plan
from qlip_export.zoo import HUB, find_configs, find_model
from tests.conftest import Cli

PARAMETERS = {
    "bk-sdm-tiny": 323_384_964,
    "sd-v1-4": 859_520_964,
    "sdxl": 2_567_463_684,
    "flux-dev": 11_901_408_320,
}
LAYERS = {"bk-sdm-tiny": 151, "sd-v1-4": 282, "sdxl": 794, "flux-dev": 504}
BLOCKS = {"bk-sdm-tiny": 9, "sd-v1-4": 12, "sdxl": 10, "flux-dev": 60}


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {name: plan(*find_configs(name)) for name in PARAMETERS}


@pytest.mark.parametrize("name", PARAMETERS)
def test_counts_are_the_published_ones(plans: dict[str, Plan], name: str) -> None:
    found = plans[name]
    assert found.parameters == PARAMETERS[name]
    assert found.layers == LAYERS[name]
    assert len(found.blocks) == BLOCKS[name]
    assert sum(b.layers for b in found.blocks) == found.layers
    assert sum(b.macs for b in found.blocks) == found.macs_per_step


def test_bk_sdm_tiny_is_as_the_paper_counts_it(plans: dict[str, Plan]) -> None:
    found = plans["bk-sdm-tiny"]
    assert found.quantized_layers == 141
    assert round(found.macs_per_step / 1e9, 1) == 205.0
    assert (found.height, found.width) == (512, 512)
    assert round(mebibytes(found.denoiser_bytes[4]), 1) == 154.2


def test_larger_images_cost_more_macs_and_no_more_weights(plans: dict[str, Plan]) -> None:
    native, small = plans["sdxl"], plan(*find_configs("sdxl"), height=768, width=768)
    assert small.parameters == native.parameters
    assert small.weight_file_bytes == native.weight_file_bytes
    assert (
        0.5 < small.macs_per_step / native.macs_per_step < 0.6
    )  # of 0.5625, less what depends on text alone


def test_plan_of_a_model_tells_what_its_bundle_became(tiny_model: Path, bundle: Path) -> None:
    found = plan(*find_model(str(tiny_model)))
    manifest = Bundle.open(bundle).manifest
    layers = [layer for block in manifest.blocks for layer in block.layers]
    assert [b.name for b in found.blocks] == [b.name for b in manifest.blocks]
    assert found.parameters == manifest.model.parameters
    assert found.layers == len(layers)
    assert found.quantized_layers == sum(layer.quantized for layer in layers)
    assert 2 * found.macs_per_step == sum(layer.macs for layer in layers)  # engines run both halves
    assert found.engines == sum(path.startswith("engines/") for path in manifest.files)


def test_weight_file_has_the_size_that_was_planned(shared_weights: tuple[int, int]) -> None:
    planned, written = shared_weights
    assert 0 <= written - planned < 64 * 1000  # each tensor starts at a multiple of 64 bytes


@pytest.fixture
def shared_weights(tiny_model: Path, bundle: Path) -> tuple[int, int]:
    found = plan(*find_model(str(tiny_model)))
    entry = Bundle.open(bundle).manifest.files["onnx/denoiser.weights.bin"]
    # The tiny model's file is FP32, so what is not on a grid is stored in FP32 and in FP16.
    quantized = sum(layer.weights for block in Bundle.open(bundle).manifest.blocks for layer in block.layers)
    return found.weight_file_bytes + 4 * (found.parameters - quantized), entry.size


def test_engines_by_layer_are_bounded_by_what_a_policy_can_ask_for() -> None:
    found = plan(*find_configs("bk-sdm-tiny"), bits=(8, 16), precision="layer")
    # 141 layers in eight blocks, five groups: each layer changes its bits once in each.
    assert found.engines == 5 * (141 + 8) + 1 + 2


def test_json_holds_plain_integers(cli: Cli) -> None:
    done = cli("plan", "--model", "bk-sdm-tiny", "--bits", "8,16", "--blocks", "fine", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["parameters"] == PARAMETERS["bk-sdm-tiny"]
    assert result["bits"] == [8, 16]
    assert len(result["blocks"]) > 20
    integers = ["macs_per_step", "engines", "weight_file_bytes", "build_memory_bytes", "build_seconds"]
    assert all(type(result[name]) is int for name in integers)
    assert all(type(n) is int for name in ("engine_bytes", "run_memory_bytes") for n in result[name].values())


def test_text_tells_the_same(cli: Cli) -> None:
    done = cli("plan", "--model", "bk-sdm-tiny")
    assert "323,384,964 parameters, 151 layers, 141 of them" in done.out
    assert "205.0 GMACs" in done.out
    assert "154.2 MiB at 4 bits" in done.out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--width", "500"], "a multiple of 8"),
        (["--bits", "8,24"], "24-bit"),
        (["--bits", "eight"], "--bits"),
        (["--blocks", "huge"], "--blocks"),
        (["--weight-bits", "5"], "--weight-bits"),
    ],
)
def test_bad_input_is_one_error(cli: Cli, arguments: list[str], complaint: str) -> None:
    done = cli("plan", "--model", "bk-sdm-tiny", *arguments)
    assert done.code == 2
    assert complaint in done.err


@pytest.mark.slow
@pytest.mark.parametrize("name", HUB)
def test_every_plan_takes_less_than_two_gigabytes(name: str) -> None:
    code = (
        "import resource, sys; sys.argv = ['qlip-export', 'plan', '--model', sys.argv[1], '--json']\n"
        "from qlip_export.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 2e9
