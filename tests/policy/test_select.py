"""A build takes the policy that was made for it, and refuses every other by naming the difference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlip_export.bundle import Bundle
from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError
from qlip_export.policy.select import SelectedPolicy, select_policy
from qlip_export.quant.rounding import LearnedRounding
from qlip_export.reference import quantized_weights
from tests import tamper
from tests.conftest import STEPS, Cli, build_tiny
from tests.tiny_calibration import UNITS, write_policy, write_quality, write_rounding

T2Q = "t2q.quality.safetensors"
DEFAULT = "policies/8-16-32.safetensors"


def select(folder: Path | None, model: Path, bits: tuple[int, ...], wanted: str = "auto") -> Any:
    checkpoint = Checkpoint(model)
    return select_policy(
        folder,
        wanted,
        bits=bits,
        granularity="coarse",
        precision="block",
        denoiser=checkpoint.component("unet").fingerprint,
        text_encoder=checkpoint.component("text_encoder").fingerprint,
    )


@pytest.fixture
def mine(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained calibration, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "calibration"))


# --- which policy


@pytest.mark.parametrize(
    ("bits", "name"),
    [
        ((8, 16, 32), "8-16-32"),
        ((8, 16), "8-16"),
        ((8, 10, 16), "8-16"),
        ((6, 8, 16, 32), "6-8-16-32"),
        ((6, 8, 10, 16), "6-8-16"),
    ],
)
def test_auto_takes_the_policy_with_most_options(
    trained: Path, tiny_model: Path, bits: tuple[int, ...], name: str
) -> None:
    selected = select(trained, tiny_model, bits)
    assert isinstance(selected, SelectedPolicy)
    assert selected.name == name


def test_of_as_many_options_auto_takes_the_higher(mine: Path, tiny_model: Path) -> None:
    for suffix in ("safetensors", "json"):
        (mine / "policies" / f"6-8-16-32.{suffix}").unlink()
    assert select(mine, tiny_model, (6, 8, 16, 32)).name == "8-16-32"


@pytest.mark.parametrize("bits", [(8,), (32,)])
def test_one_option_leaves_nothing_to_choose(trained: Path, tiny_model: Path, bits: tuple[int, ...]) -> None:
    assert select(trained, tiny_model, bits) is None


def test_without_policies_bits_are_uniform(calibration: Path, tiny_model: Path) -> None:
    assert select(calibration, tiny_model, (8, 16, 32)) is None
    assert select(None, tiny_model, (8, 16, 32)) is None


def test_none_means_none(trained: Path, tiny_model: Path) -> None:
    assert select(trained, tiny_model, (8, 16, 32), "none") is None


def test_name_may_choose_fewer_options_than_the_build_has(trained: Path, tiny_model: Path) -> None:
    assert select(trained, tiny_model, (8, 16, 32), "8-16").name == "8-16"
    assert select(trained, tiny_model, (8, 16, 32), "8-16-32-layer").policy.recipe.unit == "layer"


def test_name_without_calibration(tiny_model: Path) -> None:
    with pytest.raises(QlipError, match="there is no policy '8-16': this model brings no calibration"):
        select(None, tiny_model, (8, 16), "8-16")


# --- refusals, on the command line


def _sha256(folder: Path) -> str:
    recipe = json.loads((folder / DEFAULT).with_suffix(".json").read_text())
    return str(recipe["t2q_sha256"])


def _another_denoiser(folder: Path, model: Checkpoint) -> None:
    write_policy(folder, model, (8, 16, 32), t2q_sha256=_sha256(folder), denoiser="f" * 64)


def _another_text_encoder(folder: Path, model: Checkpoint) -> None:
    write_quality(folder, model, text_encoder="e" * 64)


def _another_cut(folder: Path, model: Checkpoint) -> None:
    write_policy(folder, model, (8, 16, 32), t2q_sha256=_sha256(folder), granularity="fine")


def _another_t2q(folder: Path, model: Checkpoint) -> None:
    write_policy(folder, model, (8, 16, 32), t2q_sha256="d" * 64)


def _by_length(folder: Path, model: Checkpoint) -> None:
    write_policy(folder, model, (8, 16, 32), t2q_sha256=_sha256(folder), name="8-16-32", criterion="length")


def _rounding_of_another_model(folder: Path, model: Checkpoint) -> None:
    write_rounding(folder, model, fingerprint="c" * 64)


def _truncate(name: str) -> Callable[[Path, Checkpoint], None]:
    return lambda folder, model: tamper.truncate(folder / name)


def _unlink(name: str) -> Callable[[Path, Checkpoint], None]:
    return lambda folder, model: (folder / name).unlink()


def _garble(name: str) -> Callable[[Path, Checkpoint], None]:
    return lambda folder, model: (folder / name).write_text("{}") and None


def _nothing(folder: Path, model: Checkpoint) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "arguments", "complaint"),
    [
        (_another_denoiser, [], [f"{DEFAULT} was made for another denoiser", "found: ffffffffffffffff…"]),
        (_another_text_encoder, [], [f"{T2Q} was made for another text encoder", "found: eeeeeeeeeeeeeeee…"]),
        (_another_cut, [], [f"{DEFAULT} was trained for other blocks", "expected: coarse", "found: fine"]),
        (_nothing, ["--blocks", "fine"], ["trained for other blocks", "found: coarse", "--policy none"]),
        (_by_length, [], [f"{DEFAULT} chooses by the number of tokens", "--policy none"]),
        (_another_t2q, [], [f"{DEFAULT} was trained with another T2Q network", "expected: SHA-256 dddddddd"]),
        (_truncate(DEFAULT), [], [f"cannot read calibration/{DEFAULT}", "run 'qlip-export calibrate'"]),
        (_truncate(T2Q), [], [f"cannot read calibration/{T2Q}"]),
        (_unlink(T2Q), [], [f"cannot read calibration/{T2Q}", "No such file"]),
        (_unlink("t2q.quality.json"), [], [f"cannot read calibration/{T2Q}", "with its .json beside it"]),
        (_garble("policies/8-16-32.json"), [], [f"cannot read calibration/{DEFAULT}"]),
        (_truncate("weights.safetensors"), [], ["cannot read learned rounding", "weights.safetensors"]),
        (_rounding_of_another_model, [], ["was learned for another model", "found: cccccccccccccccc"]),
        (
            _nothing,
            ["--bits", "10,12"],
            ["chooses among these bit options", "8,16,32", "found: 10,12", "--policy none"],
        ),
        (_nothing, ["--bits", "8,16", "--policy", "8-16-32"], ["found: 8,16,32", "--bits that include 32"]),
        (_nothing, ["--policy", "8-32"], ["holds no policy '8-32'", "6-8-16 or 6-8-16-32 or 8-16 or"]),
        (_nothing, ["--weights", "furthest"], ["--weights", "'auto' or 'nearest'", "found: furthest"]),
    ],
)
def test_what_does_not_fit_is_refused(
    cli: Cli,
    mine: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, Checkpoint], None],
    arguments: list[str],
    complaint: list[str],
) -> None:
    change(mine, Checkpoint(tiny_model))
    monkeypatch.chdir(mine.parent)
    command = ["build", "--model", tiny_model, "--calibration", "calibration", "-o", "out", "--json"]
    done = cli(*command, *arguments)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert json.loads(done.out)["error"]["problem"] in done.err
    for text in complaint:
        assert text in done.err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("units", "complaint"),
    [
        (UNITS[1:], ["expected: 8 blocks, among them stem", "found: 7"]),
        ((*UNITS, "mid_block"), ["expected: 8 blocks", "found: 9, among them mid_block"]),
    ],
)
def test_policy_for_other_units_is_refused(
    cli: Cli,
    mine: Path,
    bundle: Path,
    tiny_model: Path,
    tmp_path: Path,
    units: tuple[str, ...],
    complaint: list[str],
) -> None:
    """Found out when the blocks are known; the bundle that was there is still there."""
    write_policy(mine, Checkpoint(tiny_model), (8, 16, 32), t2q_sha256=_sha256(mine), units=units)
    out = tamper.copy_of(bundle, tmp_path)
    before = (out / "manifest.json").read_bytes()
    done = cli("build", "--model", tiny_model, "--calibration", mine, "-o", out, "--json")
    assert done.code == 2
    assert "8-16-32.safetensors was trained for other blocks" in done.err
    for text in complaint:
        assert text in done.err
    assert (out / "manifest.json").read_bytes() == before


# --- what a build does with it


def test_bundle_says_which_policy_it_holds(adaptive_bundle: Path) -> None:
    manifest = Bundle.open(adaptive_bundle).manifest
    assert manifest.policy is not None
    assert (manifest.policy.name, manifest.policy.unit, manifest.policy.criterion) == (
        "8-16-32",
        "block",
        "quality",
    )
    assert manifest.policy.table.units == UNITS
    assert (len(manifest.policy.table.group_of_step), manifest.policy.table.forced_steps) == (STEPS, 1)
    assert (manifest.policy.fab, manifest.policy.srocc, manifest.policy.plcc) == (12.5, 0.25, 0.5)
    assert {"onnx/policy.onnx", "engines/openvino/policy.blob"} <= set(manifest.files)


@pytest.fixture
def copy(adaptive_bundle: Path, tmp_path: Path) -> Path:
    return tamper.copy_of(adaptive_bundle, tmp_path)


def test_unchanged_build_makes_nothing(copy: Path, trained: Path, tiny_model: Path) -> None:
    report = build_tiny(tiny_model, copy, calibration=trained)
    assert (report.built, report.policy, report.weights) == (0, "8-16-32", "learned rounding")


def test_another_policy_makes_only_its_own_files(copy: Path, trained: Path, tiny_model: Path) -> None:
    report = build_tiny(tiny_model, copy, calibration=trained, policy="8-16-32-layer")
    assert (report.built, report.policy) == (2, "8-16-32-layer")
    again = build_tiny(tiny_model, copy, calibration=trained, policy="none")
    assert (again.built, again.policy) == (0, None)
    assert not list(copy.rglob("policy*"))


def test_another_number_of_steps_makes_only_the_policy_anew(
    copy: Path, trained: Path, tiny_model: Path
) -> None:
    assert build_tiny(tiny_model, copy, calibration=trained, steps=10).built == 2
    policy = Bundle.open(copy).manifest.policy
    assert policy is not None
    assert len(policy.table.group_of_step) == 10


def test_learned_rounding_is_what_the_weight_file_holds(adaptive_bundle: Path, trained: Path) -> None:
    bundle = Bundle.open(adaptive_bundle)
    assert bundle.manifest.quantization.weight_method == "learned rounding"
    rounding = LearnedRounding.load(trained / "weights.safetensors")
    checkpoint = Checkpoint(Path(bundle.manifest.model.source)).component("unet")
    weights = quantized_weights(bundle)
    assert len(weights) == 151
    for name, found in weights.items():
        layer = name.removesuffix(".weight")
        wanted = rounding(layer, checkpoint.get(name).astype(np.float32), 4, 0).dequantize()
        np.testing.assert_array_equal(found, wanted)


def test_rounding_to_nearest_can_be_asked_for(
    copy: Path, bundle: Path, trained: Path, tiny_model: Path
) -> None:
    weights = "onnx/denoiser.weights.bin"
    assert (copy / weights).read_bytes() != (bundle / weights).read_bytes()
    report = build_tiny(tiny_model, copy, calibration=trained, weights="nearest", policy="none")
    assert report.weights == "round to nearest"
    assert (copy / weights).read_bytes() == (bundle / weights).read_bytes()


def test_rounding_for_other_weight_bits_is_not_used(copy: Path, trained: Path, tiny_model: Path) -> None:
    report = build_tiny(tiny_model, copy, calibration=trained, weight_bits=8, bits=(32,))
    assert (report.weights, report.policy) == ("round to nearest", None)
