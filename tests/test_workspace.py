"""Builds that are killed, run twice, run at once or run out of disk: nothing whole is lost or made again."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qlip_export.backends.openvino import OpenVINOBackend
from qlip_export.bundle import Bundle
from qlip_export.errors import QlipError
from qlip_export.files import locked
from qlip_export.manifest import Manifest
from qlip_export.workspace import Workspace
from tests import tamper
from tests.conftest import STEPS, Cli, build_tiny
from tests.tiny import BLOCKS

ROOT = Path(__file__).parents[1]


def whole(bundle: Path) -> dict[str, str]:
    """Return the key of every file of a bundle, after checking that it is all there and nothing else is."""
    opened = Bundle.open(bundle)
    for path in opened.manifest.files:
        opened.file(path)
    on_disk = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert on_disk == {"manifest.json", *opened.manifest.files}
    return {path: entry.key for path, entry in opened.manifest.files.items()}


def beside(out: Path) -> list[str]:
    """Return what a build leaves beside its bundle."""
    return sorted(p.name for p in out.parent.iterdir() if p.name != out.name)


def test_a_lock_excludes_others_and_leaves_no_file(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        for _ in range(10):
            with locked(tmp_path / ".lock", on_wait=lambda: None):
                inside.append(number)
                time.sleep(0.001)
                most.append(len(inside))
                inside.remove(number)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert most == [1] * 40
    assert list(tmp_path.iterdir()) == []


# --- the workspace alone, with products that take no time


class Maker:
    """Makes products out of their names, and remembers which."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.made: list[str] = []

    def __call__(self, path: str, key: str = "k") -> None:
        def make(target: Path) -> str:
            self.made.append(path)
            target.write_text(f"{path} {key}")
            return f"facts of {path}"

        target, facts = self.workspace.product(path, key, make)
        assert target.read_text() == f"{path} {key}"
        assert facts == f"facts of {path}"


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return Bundle.open(bundle).manifest


def toy_build(out: Path, manifest: Manifest, keys: dict[str, str], die: str = "") -> list[str]:
    """Build a bundle of toy products; return which were made. `die` names where the power goes off."""

    class PowerCut(BaseException):
        pass

    try:
        with Workspace.open(out, on_wait=lambda: None) as workspace:
            maker = Maker(workspace)
            for path, key in keys.items():
                if path == die:
                    raise PowerCut
                maker(path, key)
            workspace.finish(manifest.model_copy(update={"files": workspace.files}))
    except PowerCut:
        pass
    return maker.made


KEYS = {"a": "1", "folder/b": "1", "c": "1"}


def test_products_are_made_once(tmp_path: Path, manifest: Manifest) -> None:
    out = tmp_path / "out"
    assert toy_build(out, manifest, KEYS) == list(KEYS)
    assert toy_build(out, manifest, KEYS) == []
    assert toy_build(out, manifest, KEYS | {"c": "2"}) == ["c"]
    assert whole(out) == KEYS | {"c": "2"}
    assert beside(out) == []


def test_what_no_build_needs_any_more_is_dropped(tmp_path: Path, manifest: Manifest) -> None:
    out = tmp_path / "out"
    toy_build(out, manifest, KEYS)
    toy_build(out, manifest, {"a": "1"})
    assert whole(out) == {"a": "1"}
    assert not (out / "folder").exists()


def test_interrupted_build_goes_on(tmp_path: Path, manifest: Manifest) -> None:
    out = tmp_path / "out"
    assert toy_build(out, manifest, KEYS, die="c") == ["a", "folder/b"]
    assert not out.exists()
    assert toy_build(out, manifest, KEYS) == ["c"]
    assert whole(out) == KEYS


def test_bundle_stays_until_the_next_is_whole(tmp_path: Path, manifest: Manifest) -> None:
    out = tmp_path / "out"
    toy_build(out, manifest, KEYS)
    toy_build(out, manifest, dict.fromkeys(KEYS, "2"), die="c")
    assert whole(out) == KEYS
    assert toy_build(out, manifest, dict.fromkeys(KEYS, "2")) == ["c"]
    assert whole(out) == dict.fromkeys(KEYS, "2")


def test_a_build_that_made_nothing_leaves_nothing(tmp_path: Path, manifest: Manifest) -> None:
    out = tmp_path / "out"
    toy_build(out, manifest, KEYS, die="a")
    assert beside(out) == []


@pytest.mark.parametrize("journal", [b"", b"{", b'{"a": 1}', b"\xff", b'{"../a": {}}'])
def test_torn_journal_only_costs_time(tmp_path: Path, manifest: Manifest, journal: bytes) -> None:
    out = tmp_path / "out"
    toy_build(out, manifest, KEYS, die="c")
    (tmp_path / ".out.qlip-building" / "journal.json").write_bytes(journal)
    assert toy_build(out, manifest, KEYS) == list(KEYS)
    assert whole(out) == KEYS


@pytest.mark.parametrize("damage", [tamper.truncate, tamper.flip_byte, Path.unlink])
def test_damaged_product_is_made_again(
    tmp_path: Path, manifest: Manifest, damage: Callable[[Path], None]
) -> None:
    out = tmp_path / "out"
    toy_build(out, manifest, KEYS, die="c")
    damage(tmp_path / ".out.qlip-building" / "folder" / "b")
    assert toy_build(out, manifest, KEYS) == ["folder/b", "c"]
    assert whole(out) == KEYS


def test_file_of_a_damaged_bundle_is_made_again(tmp_path: Path, manifest: Manifest) -> None:
    out = tmp_path / "out"
    toy_build(out, manifest, KEYS)
    tamper.flip_byte(out / "a")
    assert toy_build(out, manifest, KEYS) == ["a"]
    assert whole(out) == KEYS


def test_bundle_of_another_schema_lends_its_files(tmp_path: Path, manifest: Manifest) -> None:
    out = tmp_path / "out"
    toy_build(out, manifest, KEYS)
    tamper.edit_manifest(out, lambda m: m.update(schema_version=1, surprise="yes"))
    assert toy_build(out, manifest, KEYS | {"c": "2"}) == ["c"]
    assert whole(out) == KEYS | {"c": "2"}


def test_half_written_file_of_a_killed_build_is_swept_up(tmp_path: Path, manifest: Manifest) -> None:
    out = tmp_path / "out"
    toy_build(out, manifest, KEYS, die="c")
    (tmp_path / ".out.qlip-building" / ".c.x1.part").write_text("half")
    toy_build(out, manifest, KEYS)
    assert whole(out) == KEYS


def finished_but_not_swapped(out: Path, manifest: Manifest) -> dict[str, str]:
    """Leave `out` with an old bundle and `.out.qlip-building` with a new one, killed just before the swap."""
    new = KEYS | {"c": "2", "d": "1"}
    toy_build(out, manifest, new)
    out.rename(out.with_name(".out.qlip-building"))
    toy_build(tmp := out.with_name("old"), manifest, KEYS)
    tmp.rename(out)
    return new


def test_killed_before_the_swap(tmp_path: Path, manifest: Manifest) -> None:
    out = tmp_path / "out"
    new = finished_but_not_swapped(out, manifest)
    assert whole(out) == KEYS
    assert toy_build(out, manifest, new) == []
    assert whole(out) == new
    assert beside(out) == []


def test_killed_between_the_two_renames(tmp_path: Path, manifest: Manifest) -> None:
    out = tmp_path / "out"
    new = finished_but_not_swapped(out, manifest)
    out.rename(tmp_path / ".out.qlip-previous")
    assert toy_build(out, manifest, new) == []
    assert whole(out) == new
    assert beside(out) == []


def test_old_bundle_is_back_even_if_the_next_build_fails(tmp_path: Path, manifest: Manifest) -> None:
    out = tmp_path / "out"
    finished_but_not_swapped(out, manifest)
    out.rename(tmp_path / ".out.qlip-previous")
    toy_build(out, manifest, KEYS, die="a")
    assert whole(out) == KEYS


def test_killed_after_the_swap(tmp_path: Path, manifest: Manifest) -> None:
    out = tmp_path / "out"
    toy_build(out, manifest, KEYS)
    shutil.copytree(out, tmp_path / ".out.qlip-previous")
    assert toy_build(out, manifest, KEYS) == []
    assert whole(out) == KEYS
    assert beside(out) == []


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json.bak", "sub/file"])
def test_foreign_folder_is_refused_and_left_alone(tmp_path: Path, manifest: Manifest, name: str) -> None:
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    with pytest.raises(QlipError, match="is not empty and is no bundle") as caught:
        toy_build(out, manifest, KEYS)
    assert caught.value.found == Path(name).parts[0]
    assert (out / name).read_text() == "mine"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [out / name]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_error_and_keeps_what_is_whole(
    tmp_path: Path, manifest: Manifest, code: int
) -> None:
    out = tmp_path / "out"
    toy_build(out, manifest, KEYS)

    def fill(path: Path) -> None:
        path.write_text("half")
        raise OSError(code, os.strerror(code))

    with (
        pytest.raises(QlipError, match="the disk is full while writing") as caught,
        Workspace.open(out, on_wait=lambda: None) as workspace,
    ):
        Maker(workspace)("a", "2")
        workspace.product("folder/b", "2", fill)
    assert caught.value.fix is not None and "free space" in caught.value.fix
    assert whole(out) == KEYS
    assert not list(tmp_path.rglob("*.part"))
    assert toy_build(out, manifest, dict.fromkeys(KEYS, "2")) == ["folder/b", "c"]


# --- real builds


def start_build(model: Path, calibration: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "qlip_export", "build", "--model", str(model), "--json"]
    command += ["--calibration", str(calibration), "--backend", "openvino", "--steps", str(STEPS)]
    return subprocess.Popen(
        [*command, "-o", str(out), *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def journal_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.qlip-building") / "journal.json"


def products(out: Path) -> int:
    journal = journal_of(out)
    return len(json.loads(journal.read_text())) if journal.is_file() else 0


def kill_after(build: subprocess.Popen[str], out: Path, count: int) -> None:
    """Send SIGKILL as soon as the journal lists `count` products."""
    deadline = time.monotonic() + 120
    while products(out) < count:
        assert build.poll() is None, build.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    build.send_signal(signal.SIGKILL)
    build.communicate()
    assert build.returncode == -signal.SIGKILL


def captured_only(bundle: Path, out: Path) -> None:
    """Leave what a build leaves that was killed after the capture, which takes most of the time."""
    entries = json.loads((bundle / "manifest.json").read_text())["files"]
    kept = {path: entry for path, entry in entries.items() if path.startswith("capture/")}
    for path in kept:
        target = journal_of(out).parent / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle / path, target)
    journal_of(out).write_text(json.dumps(kept))


def kill_and_go_on(bundle: Path, model: Path, calibration: Path, out: Path, counts: Sequence[int]) -> None:
    for count in counts:
        kill_after(start_build(model, calibration, out), out, count)
        assert not out.exists()
        assert products(out) >= count
    kept = products(out)
    last = start_build(model, calibration, out)
    stdout, stderr = last.communicate(timeout=120)
    assert last.returncode == 0, stderr
    report = json.loads(stdout)
    expected = whole(bundle)
    assert whole(out) == expected
    # Every product that the journal listed was taken over, and nothing was made twice.
    assert (report["reused"] >= kept, report["built"] + kept) == (True, len(expected))
    assert beside(out) == []


def test_killed_build_goes_on_from_what_is_whole(
    bundle: Path, tiny_model: Path, calibration: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    captured_only(bundle, out)
    kill_and_go_on(bundle, tiny_model, calibration, out, [45])


@pytest.mark.slow
def test_build_killed_at_many_moments(
    bundle: Path, tiny_model: Path, calibration: Path, tmp_path: Path
) -> None:
    """From nothing, through capture, weights, ONNX files and engines."""
    counts = [1, 3, 7, 8, 12, 30, 40, 50, 60, len(whole(bundle)) - 2]
    kill_and_go_on(bundle, tiny_model, calibration, tmp_path / "out", counts)


def test_two_builds_into_one_folder(
    bundle: Path, tiny_model: Path, calibration: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    captured_only(bundle, out)
    builds = [start_build(tiny_model, calibration, out) for _ in range(2)]
    ends = [build.communicate(timeout=200) for build in builds]
    assert [build.returncode for build in builds] == [0, 0], ends
    reports = [json.loads(stdout) for stdout, _ in ends]
    expected = whole(bundle)
    assert whole(out) == expected
    # One of them did the work, the other waited and took it over.
    first, second = sorted(reports, key=lambda report: -report["built"])
    assert (first["built"] > 50, second["built"]) == (True, 0)
    assert sum("another build is writing" in stderr for _, stderr in ends) == 1
    assert beside(out) == []


@pytest.fixture
def mine(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the shared bundle to build upon."""
    return tamper.copy_of(bundle, tmp_path)


def test_unchanged_build_makes_nothing(bundle: Path, mine: Path, tiny_model: Path, calibration: Path) -> None:
    report = build_tiny(tiny_model, mine, calibration=calibration)
    assert (report.built, report.reused) == (0, len(whole(bundle)))
    assert whole(mine) == whole(bundle)


def test_another_scheduler_needs_no_new_file(
    bundle: Path, mine: Path, tiny_model: Path, calibration: Path
) -> None:
    report = build_tiny(tiny_model, mine, calibration=calibration, scheduler="euler", steps=7)
    assert report.built == 0
    sampler = Bundle.open(mine).manifest.sampler
    assert (sampler.scheduler, len(sampler.steps)) == ("euler", 7)
    assert whole(mine) == whole(bundle)


def test_another_bit_option_adds_its_variants_only(
    bundle: Path, mine: Path, tiny_model: Path, calibration: Path
) -> None:
    report = build_tiny(tiny_model, mine, calibration=calibration, bits=(6, 8, 16, 32))
    before, after = whole(bundle), whole(mine)
    blocks = [name for name in BLOCKS if name != "time"]  # the time block is FP32 at every option
    added = {f"onnx/{b}.a6.onnx" for b in blocks} | {f"engines/openvino/{b}.a6.blob" for b in blocks}
    assert after.keys() - before.keys() == added
    assert report.built == len(added)
    assert {path: after[path] for path in before} == before


def test_another_weight_width_captures_nothing_anew(mine: Path, bundle: Path, tiny_model: Path) -> None:
    build_tiny(tiny_model, mine, bits=(32,), weight_bits=8)
    before, after = whole(bundle), whole(mine)
    same = {path for path in after if before.get(path) == after[path]}
    assert {path for path in after if path.startswith("capture/")} <= same
    assert {"onnx/vae_decoder.weights.bin", "engines/openvino/text_encoder.blob"} <= same
    assert not same & {"onnx/denoiser.weights.bin", "engines/openvino/stem.a32.blob"}


def test_disk_full_in_the_middle_of_compiling(
    bundle: Path,
    mine: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    cli: Cli,
) -> None:
    compile_one = OpenVINOBackend.compile
    engines: list[Path] = []

    def fill(self: OpenVINOBackend, onnx: Path, engine: Path, container: object) -> object:
        engines.append(onnx)
        if len(engines) == 4:
            engine.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return compile_one(self, onnx, engine, container)  # type: ignore[arg-type]

    monkeypatch.setattr(OpenVINOBackend, "compile", fill)
    command = ["build", "--model", tiny_model, "--bits", "32", "--weight-bits", "8", "--steps", STEPS]
    done = cli(*command, "-o", mine, "--json")
    assert done.code == 2
    assert json.loads(done.out)["error"]["problem"].startswith("the disk is full while writing ")
    assert "Traceback" not in done.err
    assert whole(mine) == whole(bundle)
    monkeypatch.undo()
    # What was finished is kept: three engines of the denoiser, and all that came before them.
    again = build_tiny(tiny_model, mine, bits=(32,), weight_bits=8)
    assert again.built == len(BLOCKS) - 3


def test_output_behind_a_symbolic_link_stays_there(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    with Workspace.open(tmp_path / "link", on_wait=lambda: None) as workspace:
        assert workspace.out == tmp_path / "disk" / "out"
        assert workspace.root.parent == tmp_path / "disk"
