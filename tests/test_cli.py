"""The command line: one clear error for bad input, one JSON document on stdout, a verdict as exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import tamper
from tests.conftest import STEPS, Cli
from tests.tiny import BLOCKS, IMAGE_SIZE

COMMANDS = ("build", "export", "compile", "generate", "inspect", "validate", "calibrate", "evaluate")


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with nothing in it."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- help


def test_help_answers_at_once_and_lists_the_commands() -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "qlip_export", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)
    # 0.2 s on a quiet machine; importing torch alone would take longer than this bound.
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(cli: Cli, command: str) -> None:
    done = cli(command, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"qlip-export {command} [OPTIONS]" in done.out
    assert "--json" in done.out


def test_version(cli: Cli) -> None:
    from qlip_export import __version__

    assert cli("--version").out.strip() == __version__


# --- bad input


def one_error(done: Any) -> dict[str, Any]:
    """Return the error of a command that was given --json, after checking how it was told."""
    assert done.code == 2
    assert "Traceback" not in done.err
    assert done.err.count("error: ") == 1
    error: dict[str, Any] = json.loads(done.out)["error"]
    assert f"error: {error['problem']}" in done.err
    return error


def told(error: dict[str, Any]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in error.items() if value)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["--backend", "tensorrrt"],
            [
                "unknown backend 'tensorrrt'",
                "auto, tensorrt, tensorrt-rtx, onnxruntime-cuda, openvino, onnxruntime",
            ],
        ),
        (["--scheduler", "heun"], ["heun", "dpmsolver++, ddim, euler, pndm"]),
        (["--bits", "16,8"], ["the bit options must increase", "found: 16,8"]),
        (["--bits", "8,8"], ["the bit options must increase", "found: 8,8"]),
        (["--bits", "33"], ["no hardware format holds 33-bit activations", "2 to 16, or 32"]),
        (["--bits", "8,17"], ["no hardware format holds 17-bit activations"]),
        (["--bits", "1"], ["no hardware format holds 1-bit activations"]),
        (["--bits", "8,many"], ["--bits is no list of numbers", "e.g. 8,16,32", "found: 8,many"]),
        (["--bits", ""], ["--bits is no list of numbers"]),
        (["--bits", "3"], ["no activation ranges for 3 bits", "4, 5, 6, 7, 8"]),
        (["--weight-bits", "5"], ["--weight-bits", "4, 8 or 32", "found: 5"]),
        (["--steps", "0"], ["--steps", "greater than or equal to 1", "found: 0"]),
        (["--steps", "1001"], ["--steps", "found: 1001"]),
        (["--batch-size", "0"], ["--batch-size", "found: 0"]),
    ],
)
def test_build_refuses_an_option(
    cli: Cli, empty: Path, tiny_model: Path, arguments: list[str], complaint: list[str]
) -> None:
    error = one_error(cli("build", "--model", tiny_model, "-o", "out/mine", "--json", *arguments))
    for text in complaint:
        assert text in told(error)
    assert tree(empty) == []


def test_build_refuses_an_unknown_cut(cli: Cli, empty: Path, tiny_model: Path) -> None:
    done = cli("build", "--model", tiny_model, "--blocks", "medium")
    assert done.code == 2
    assert "'medium' is not one of 'coarse', 'fine', 'whole'" in done.err
    assert tree(empty) == []


def test_unknown_model(cli: Cli, empty: Path) -> None:
    error = one_error(cli("build", "--model", "smiley", "--json"))
    assert error["problem"] == "unknown model 'smiley'"
    assert "emoji" in error["expected"]
    assert one_error(cli("build", "--model", "bk-sdm-tyni", "--json"))["fix"] == "--model bk-sdm-tiny"
    assert tree(empty) == []


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "an empty folder"),
        (lambda folder: shutil.copytree(Path(__file__).parent / "runtime", folder), "test_sampler.py"),
    ],
)
def test_folder_that_is_no_model(cli: Cli, tmp_path: Path, make: Callable[[Path], Any], found: str) -> None:
    folder = tmp_path / "model"
    make(folder)
    before = tree(tmp_path)
    error = one_error(cli("build", "--model", folder, "-o", tmp_path / "out", "--json"))
    assert error["problem"] == f"{folder} is no diffusers model"
    assert "model_index.json" in error["expected"]
    assert found in error["found"]
    assert tree(tmp_path) == before


@pytest.mark.parametrize("bits", ["32", "8,16"])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_weights_are_never_read(
    cli: Cli, empty: Path, tiny_model: Path, part: str, bits: str
) -> None:
    model = Path(shutil.copytree(tiny_model, empty / "model"))
    (weights,) = (model / part).glob("*.safetensors")
    weights.rename(model / part / "pytorch_model.bin")
    before = tree(empty)
    error = one_error(cli("build", "--model", model, "--bits", bits, "-o", empty / "out", "--json"))
    assert error["problem"] == f"no safetensors weights in {model / part}"
    assert error["found"] == "pytorch_model.bin"
    assert "convert the model to safetensors" in error["fix"]
    assert tree(empty) == before


def test_truncated_weights_are_refused(cli: Cli, empty: Path, tiny_model: Path) -> None:
    model = Path(shutil.copytree(tiny_model, empty / "model"))
    (weights,) = (model / "unet").glob("*.safetensors")
    tamper.truncate(weights)
    before = tree(empty)
    error = one_error(cli("build", "--model", model, "-o", empty / "out", "--json"))
    assert error["problem"] == f"cannot read {weights}"
    assert tree(empty) == before


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_broken_config_is_refused(cli: Cli, empty: Path, tiny_model: Path, file: str) -> None:
    model = Path(shutil.copytree(tiny_model, empty / "model"))
    tamper.truncate(model / file)
    (model / file).write_text((model / file).read_text()[:-20])
    before = tree(empty)
    error = one_error(cli("build", "--model", model, "-o", empty / "out", "--json"))
    assert error["problem"] == f"cannot read {model / file}"
    assert tree(empty) == before


def test_denoiser_of_no_family_is_refused(cli: Cli, empty: Path, tiny_model: Path) -> None:
    model = Path(shutil.copytree(tiny_model, empty / "model"))
    index = json.loads((model / "model_index.json").read_text())
    index["unet"][1] = "UNet3DConditionModel"
    (model / "model_index.json").write_text(json.dumps(index))
    before = tree(empty)
    error = one_error(cli("build", "--model", model, "-o", empty / "out", "--json"))
    assert error["problem"] == "no family knows the denoiser class 'UNet3DConditionModel'"
    assert tree(empty) == before


def _of_another_model(text: str) -> str:
    return json.dumps(json.loads(text) | {"fingerprint": "0" * 64})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_of_another_model, "was measured on another model"),
        (lambda text: text[:-10], "cannot read activation ranges"),
        (lambda text: "", "cannot read activation ranges"),
        (lambda text: "[]", "cannot read activation ranges"),
    ],
)
def test_calibration_that_does_not_fit(
    cli: Cli,
    empty: Path,
    tiny_model: Path,
    calibration: Path,
    change: Callable[[str], str],
    complaint: str,
) -> None:
    folder = empty / "calibration"
    folder.mkdir()
    (folder / "ranges.json").write_text(change((calibration / "ranges.json").read_text()))
    before = tree(empty)
    error = one_error(
        cli("build", "--model", tiny_model, "--calibration", folder, "-o", empty / "out", "--json")
    )
    assert complaint in error["problem"]
    assert str(folder / "ranges.json") in error["problem"]
    assert tree(empty) == before


def test_calibration_that_lacks_a_layer(
    cli: Cli, empty: Path, tiny_model: Path, calibration: Path, bundle: Path
) -> None:
    """Found out only after the capture; the bundle that was there is still there."""
    ranges = json.loads((calibration / "ranges.json").read_text())
    del ranges["layers"]["conv_out"]
    (empty / "ranges.json").write_text(json.dumps(ranges))
    shutil.copytree(bundle, empty / "out")
    before = tree(empty / "out")
    error = one_error(
        cli("build", "--model", tiny_model, "--calibration", ".", "--bits", "8", "-o", "out", "--json")
    )
    assert error["problem"] == "the activation ranges lack 1 layers of out"
    assert error["found"] == "no conv_out"
    assert tree(empty / "out") == before


def test_empty_calibration_folder(cli: Cli, empty: Path, tiny_model: Path) -> None:
    (empty / "calibration").mkdir()
    error = one_error(
        cli("build", "--model", tiny_model, "--calibration", "calibration", "-o", "out", "--json")
    )
    assert error["problem"] == "calibration holds no calibration"
    assert error["fix"].startswith("qlip-export calibrate --model")
    assert tree(empty) == ["calibration"]


def test_build_into_a_file_or_below_one(cli: Cli, empty: Path, tiny_model: Path) -> None:
    (empty / "file").write_text("mine")
    for out in ("file", "file/bundle"):
        error = one_error(cli("build", "--model", tiny_model, "-o", out, "--json"))
        assert "file" in error["problem"]
        assert error["fix"] == "choose another -o"
    assert tree(empty) == ["file"]
    assert (empty / "file").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_build_into_a_folder_without_permission(cli: Cli, empty: Path, tiny_model: Path) -> None:
    empty.chmod(0o555)
    error = one_error(cli("build", "--model", tiny_model, "-o", "out", "--json"))
    assert error["fix"] == "choose another -o"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([""], "a prompt is empty"),
        (["a dog", " "], "a prompt is empty"),
        (["a dog", "--bits", "6"], "the bundle has no 6-bit engines"),
        (["a dog", "--seed", "-1"], "the seed is negative"),
        (["a dog", "--guidance", "nan"], "the guidance scale is not finite"),
        (["a dog", "-o", "image.txt"], "image.txt is no image file"),
        (["a dog", "-o", "image"], "image is no image file"),
        (["a dog", "--bits", "6", "-o", "new/folder/dog.png"], "the bundle has no 6-bit engines"),
        (["a dog", "a cat", "--bits", "6"], "the bundle has no 6-bit engines"),
    ],
)
def test_generate_refuses(cli: Cli, empty: Path, bundle: Path, arguments: list[str], complaint: str) -> None:
    error = one_error(cli("generate", bundle, *arguments, "--json"))
    assert error["problem"] == complaint
    assert tree(empty) == []


def test_generate_without_prompt(cli: Cli, empty: Path, bundle: Path) -> None:
    done = cli("generate", bundle)
    assert done.code == 2
    assert "missing argument 'prompt" in done.err.lower()
    assert tree(empty) == []


@pytest.mark.parametrize("prompts", [["a dog"], ["a dog", "a cat"]])
def test_generate_below_a_file(cli: Cli, empty: Path, bundle: Path, prompts: list[str]) -> None:
    (empty / "file").write_text("mine")
    error = one_error(cli("generate", bundle, *prompts, "-o", "file/x.png", "--json"))
    assert error["problem"].startswith("cannot write file")
    assert (empty / "file").read_text() == "mine"
    assert tree(empty) == ["file"]


@pytest.mark.parametrize(
    "command", [["generate", "none", "a dog"], ["inspect", "none"], ["validate", "none"]]
)
def test_no_bundle_there(cli: Cli, empty: Path, command: list[str]) -> None:
    error = one_error(cli(*command, "--json"))
    assert (error["problem"], error["found"]) == ("none is no bundle", "no such folder")
    assert tree(empty) == []


# --- what the commands print and write


def test_json_and_nothing_else_on_stdout(cli: Cli, empty: Path, bundle: Path, tiny_model: Path) -> None:
    out = Path(shutil.copytree(bundle, empty / "bundle"))
    report = json.loads(
        cli("build", "--model", tiny_model, "--bits", "32", "--steps", 4, "-o", out, "--json").out
    )
    assert report["bundle"] == str(out)
    assert report["bits"] == [32]
    assert report["engines"] == len(BLOCKS) + 2
    made = json.loads(cli("generate", out, "a dog", "--seed", 1, "--json").out)["images"]
    assert [record["file"] for record in made] == ["image.png"]
    assert json.loads(cli("inspect", out, "--json").out)["bits"] == [32]
    checked = cli("validate", out, "--json")
    assert json.loads(checked.out)["passed"] is True
    assert "compare" in checked.err  # the progress goes elsewhere


def test_error_in_json_without_being_asked_is_none(cli: Cli, empty: Path) -> None:
    done = cli("inspect", "none")
    assert done.out == ""
    assert "error: none is no bundle\n  expected: a folder with manifest.json" in done.err


def test_build_says_what_it_did(cli: Cli, empty: Path, bundle: Path, tiny_model: Path) -> None:
    shutil.copytree(bundle, empty / "mine")
    done = cli("build", "--model", tiny_model, "--bits", "16", "--steps", STEPS, "-o", "mine")
    assert done.code == 0
    assert f"mine: {len(BLOCKS)} blocks at 16 bits" in done.out
    assert "0 files made" in done.out
    assert "qlip-export generate" in done.out


def test_several_prompts_fill_a_folder(cli: Cli, empty: Path, bundle: Path) -> None:
    done = cli("generate", bundle, "a dog", "a cat", "a boat", "--seed", 7, "-o", "new/folder", "--json")
    assert done.code == 0, done.err
    files = [f"new/folder/{i:04d}.png" for i in range(3)]
    records = json.loads(done.out)["images"]
    assert [r["file"] for r in records] == files
    assert [r["seed"] for r in records] == [7, 8, 9]
    images = []
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.size) == ("PNG", (IMAGE_SIZE, IMAGE_SIZE))
            images.append(np.asarray(image))
    assert not (images[0] == images[1]).all()
    # The second image of a folder can be made again alone, from its own record.
    assert cli("generate", bundle, "a cat", "--seed", 8, "-o", "again.png").code == 0
    with Image.open("again.png") as again:
        assert (np.asarray(again) == images[1]).all()


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.webp", "WEBP")])
def test_file_name_chooses_the_format(cli: Cli, empty: Path, bundle: Path, name: str, kind: str) -> None:
    assert cli("generate", bundle, "a dog", "--bits", "8", "-o", name).code == 0
    with Image.open(name) as image:
        assert image.format == kind
    assert tree(empty) == [name]


def test_one_prompt_into_an_existing_folder(cli: Cli, empty: Path, bundle: Path) -> None:
    (empty / "images").mkdir()
    assert cli("generate", bundle, "a dog", "--bits", "8", "-o", "images").code == 0
    assert tree(empty) == ["images", "images/0000.png"]


def test_cut_prompt_is_warned_of(cli: Cli, empty: Path, bundle: Path) -> None:
    done = cli("generate", bundle, "a dog " * 12, "--bits", "8", "--json")
    assert done.code == 0
    assert "warning: the prompt is longer than the text encoder takes (16 tokens)" in done.err
    assert len(json.loads(done.out)["warnings"]) == 1


def test_inspect_shows_blocks_layers_and_precisions(cli: Cli, bundle: Path) -> None:
    done = cli("inspect", bundle)
    assert done.code == 0
    assert "151 layers, 141 with activations at 8/16/32 bits; weights 4 bits" in done.out
    for text in ("stem", "down_blocks.0", "up_blocks.2", "out"):
        assert text in done.out


# --- validate judges


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_validate_names_the_block_that_computes_something_else(
    cli: Cli, bundle: Path, tmp_path: Path, bits: int
) -> None:
    wrong = tamper.copy_of(bundle, tmp_path)
    tamper.alter_engine(wrong, "down_blocks.1", bits, lambda bias: bias + 1)
    done = cli("validate", wrong, "--json")
    assert done.code == 1
    report = json.loads(done.out)
    assert report["passed"] is False
    assert [(r["block"], r["bits"]) for r in report["rows"] if not r["passed"]] == [("down_blocks.1", bits)]
    spoken = cli("validate", wrong)
    assert spoken.code == 1
    assert f"off: down_blocks.1 at {bits} bits" in spoken.out


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_validate_names_the_block_that_overflows(cli: Cli, bundle: Path, tmp_path: Path, bits: int) -> None:
    wrong = tamper.copy_of(bundle, tmp_path)
    tamper.alter_engine(wrong, "up_blocks.1", bits, lambda bias: bias * np.inf)
    done = cli("validate", wrong, "--json")
    assert done.code == 1, done.err
    rows = [r for r in json.loads(done.out)["rows"] if not r["passed"]]
    assert [(r["block"], r["bits"], r["finite"]) for r in rows] == [("up_blocks.1", bits, False)]
    assert f"up_blocks.1 at {bits} bits" in cli("validate", wrong).out


def test_validate_says_when_images_were_not_compared(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    lost = tamper.copy_of(bundle, tmp_path)
    tamper.edit_manifest(lost, lambda m: m["model"].update(source=str(tmp_path / "gone")))
    done = cli("validate", lost, "--json")
    assert done.code == 0
    report = json.loads(done.out)
    assert report["images"] == []
    assert "images were NOT compared" in report["notes"][0]
    error = one_error(cli("validate", lost, "--model", tmp_path / "gone", "--json"))
    assert "is no diffusers model" in error["problem"]


# --- calibrate


def test_calibrate_and_build_with_it(cli: Cli, empty: Path, tiny_model: Path, bundle: Path) -> None:
    (empty / "prompts.txt").write_text("a red apple\n\nthe blue boat\n", encoding="utf-8")
    done = cli(
        *(
            "calibrate",
            "--model",
            tiny_model,
            "--prompts",
            "prompts.txt",
            "--stages",
            "ranges",
            "--steps",
            2,
            "-o",
            "mine",
            "--json",
        )
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found.pop("seconds").keys() == {"ranges"}
    assert found == {
        "folder": "mine",
        "random_weights": None,
        "files": {"ranges": "mine/ranges.json"},
        "reused": [],
        "gpu_bytes": {},
        "measured": {},
    }
    assert json.loads((empty / "mine" / "ranges.json").read_text())["recipe"]["prompts"] == 2
    shutil.copytree(bundle, empty / "bundle")
    built = cli(
        *("build", "--model", tiny_model, "--calibration", "mine", "--bits", "8"),
        *("--steps", STEPS, "-o", "bundle", "--json"),
    )
    assert built.code == 0, built.err
    ranges = (empty / "bundle" / "calibration" / "ranges.json").read_bytes()
    assert ranges == (empty / "mine" / "ranges.json").read_bytes()


@pytest.mark.parametrize("text", [b"", b"\n \n", b"\xff\xfe\x00"])
def test_calibrate_without_prompts(cli: Cli, empty: Path, tiny_model: Path, text: bytes) -> None:
    (empty / "prompts.txt").write_bytes(text)
    error = one_error(
        cli("calibrate", "--model", tiny_model, "--prompts", "prompts.txt", "-o", "x", "--json")
    )
    assert "prompts.txt" in error["problem"]
    assert tree(empty) == ["prompts.txt"]


def test_inspect_of_a_folder_that_is_no_bundle(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "is no bundle" in one_error(cli("inspect", ".", "--json"))["problem"]


def test_calibrate_does_not_go_over_what_a_model_brings(cli: Cli) -> None:
    done = cli("calibrate", "--model", "emoji", "--stages", "ranges")
    assert done.code == 2
    assert "emoji brings its calibration" in done.err and "-o calibration/my-emoji" in done.err
