"""A damaged bundle is found out, and the message says which file, what was expected, and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlip_export.bundle import Bundle
from qlip_export.errors import QlipError
from qlip_export.manifest import SCHEMA_VERSION
from qlip_export.progress import Silent
from qlip_export.runtime import TextToImage
from qlip_export.validate import validate
from tests import tamper
from tests.conftest import Cli

WEIGHTS = "onnx/denoiser.weights.bin"
ENGINE = "engines/openvino/up_blocks.1.a16.blob"


@pytest.fixture
def damaged(bundle: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return tamper.copy_of(bundle, tmp_path)


@pytest.mark.parametrize("file", [ENGINE, "engines/openvino/text_encoder.blob", "tokenizer.json"])
@pytest.mark.parametrize(
    ("damage", "complaint", "told"),
    [
        (tamper.truncate, "has the wrong size", True),
        (tamper.flip_byte, "was altered after the build", True),
        (Path.unlink, "is missing", False),
    ],
)
def test_generating_finds_a_damaged_file(
    damaged: Path, file: str, damage: Callable[[Path], None], complaint: str, told: bool
) -> None:
    damage(damaged / file)
    with pytest.raises(QlipError) as caught:
        TextToImage.load(damaged)("a red apple", seed=0, bits=16)
    error = caught.value
    assert error.problem == f"{damaged / file} {complaint}"
    assert error.fix == "build the bundle again"
    if told:
        assert error.expected and error.found and error.expected != error.found


@pytest.mark.parametrize("damage", [tamper.truncate, tamper.flip_byte, Path.unlink])
@pytest.mark.parametrize("file", [WEIGHTS, "onnx/stem.a8.onnx", "calibration/ranges.json"])
def test_validating_finds_files_that_generating_never_opens(
    damaged: Path, file: str, damage: Callable[[Path], None]
) -> None:
    damage(damaged / file)
    TextToImage.load(damaged)("a red apple", seed=0, bits=16)
    with pytest.raises(QlipError, match=str(damaged / file)):
        validate(damaged, prompt="a red apple", seed=0, model=None, progress=Silent())


def test_only_the_engines_that_run_are_read(damaged: Path) -> None:
    """Loading one precision must not cost reading and hashing the others."""
    tamper.truncate(damaged / ENGINE)
    assert len(TextToImage.load(damaged)("a red apple", seed=0, bits=8).images) == 1


def test_another_schema_version(damaged: Path) -> None:
    tamper.edit_manifest(damaged, lambda m: m.update(schema_version=SCHEMA_VERSION + 1, blocks="unheard of"))
    with pytest.raises(QlipError) as caught:
        Bundle.open(damaged)
    error = caught.value
    assert error.problem == f"{damaged / 'manifest.json'} has another schema version"
    assert (error.expected, error.found) == (str(SCHEMA_VERSION), str(SCHEMA_VERSION + 1))
    assert error.fix is not None and "again" in error.fix


def _outside(path: str) -> Callable[[dict[str, Any]], None]:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["files"][path] = manifest["files"]["tokenizer.json"]
        manifest["text_encoders"][0]["tokenizer"]["path"] = path

    return edit


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda m: m.update(surprise=1), "surprise: Extra inputs are not permitted"),
        (lambda m: m["blocks"][0].update(surprise=1), "blocks.0.surprise: Extra inputs"),
        (lambda m: m.pop("sampler"), "sampler: Field required"),
        (lambda m: m["files"]["tokenizer.json"].update(sha256="0"), "sha256: String should match"),
        (_outside("../tokenizer.json"), "'../tokenizer.json' leaves the bundle"),
        (_outside("a/../../tokenizer.json"), "'a/../../tokenizer.json' leaves the bundle"),
        (_outside("/etc/passwd"), "'/etc/passwd' leaves the bundle"),
        (_outside("..\\tokenizer.json"), "leaves the bundle"),
        (_outside(""), "leaves the bundle"),
        (lambda m: m["conditioning"].pop("text"), "the denoiser takes ['text'], not []"),
        (lambda m: m.update(quality_encoder="clip"), "there is no text encoder 'clip'"),
    ],
)
def test_manifest_that_cannot_be(
    damaged: Path, edit: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    tamper.edit_manifest(damaged, edit)
    with pytest.raises(QlipError) as caught:
        Bundle.open(damaged)
    error = caught.value
    assert error.problem == f"{damaged / 'manifest.json'} is not a valid manifest"
    assert error.found is not None and complaint in error.found
    assert error.fix == "build the bundle again"


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema_version": "x"}'])
def test_manifest_that_is_no_manifest(damaged: Path, text: bytes) -> None:
    (damaged / "manifest.json").write_bytes(text)
    with pytest.raises(QlipError, match="is not a valid manifest"):
        Bundle.open(damaged)


@pytest.mark.parametrize("link_folder", [False, True])
def test_symlink_out_of_the_bundle(damaged: Path, tmp_path: Path, link_folder: bool) -> None:
    """The content is right; the place is not."""
    inside = (damaged / ENGINE).parent if link_folder else damaged / ENGINE
    outside = tmp_path / "outside"
    shutil.move(inside, outside)
    inside.symlink_to(outside)
    with pytest.raises(QlipError, match=f"leaves the bundle(.|\n)*found: {outside}"):
        TextToImage.load(damaged)("a red apple", seed=0, bits=16)


def test_file_that_the_manifest_does_not_list(bundle: Path) -> None:
    with pytest.raises(QlipError, match=r"lists no file 'manifest\.json'"):
        Bundle.open(bundle).file("manifest.json")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.mkdir(), "no manifest.json in it"),
        (lambda path: path.write_text("x"), "no manifest.json in it"),
    ],
)
def test_no_bundle_there(tmp_path: Path, make: Callable[[Path], Any], found: str) -> None:
    path = tmp_path / "mine"
    make(path)
    with pytest.raises(QlipError) as caught:
        Bundle.open(path)
    assert caught.value.found == found
    assert caught.value.problem == f"{path} is no bundle"


def test_interrupted_build_is_told_from_no_build(tmp_path: Path) -> None:
    (tmp_path / ".mine.qlip-building").mkdir()
    with pytest.raises(QlipError, match="mine is no bundle; its build was interrupted"):
        Bundle.open(tmp_path / "mine")


@pytest.mark.parametrize(("requested", "given"), [(None, 16), (8, 8), (32, 32)])
def test_bits_default_to_the_largest_that_is_fast(bundle: Path, requested: int | None, given: int) -> None:
    assert Bundle.open(bundle).bits(requested) == given


def test_bundle_of_one_precision_runs_at_that(plain_bundle: Path) -> None:
    assert Bundle.open(plain_bundle).bits() == 32


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (("generate", "a red apple", "--seed", "0", "-o", "x.png"), ENGINE),
        (("validate",), WEIGHTS),
    ],
)
def test_command_line_prints_one_error(
    damaged: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: tuple[str, ...],
    file: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    tamper.flip_byte(damaged / file)
    done = cli(command[0], damaged, *command[1:], "--json")
    assert done.code == 2
    error = json.loads(done.out)["error"]
    assert error["problem"] == f"{damaged / file} was altered after the build"
    assert error["expected"].startswith("SHA-256 ")
    assert done.err.count("error: ") == 1
    assert "Traceback" not in done.err
    assert not (tmp_path / "x.png").exists()
