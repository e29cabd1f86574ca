"""Compiling an exported bundle: on another machine, for several backends, interrupted, and refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlip_export.backends.onnxruntime import OnnxRuntimeBackend
from qlip_export.backends.openvino import OpenVINOBackend
from qlip_export.bundle import Bundle
from qlip_export.compile import compile_bundle
from qlip_export.compiled import TargetEntry
from qlip_export.errors import QlipError
from qlip_export.manifest import Manifest
from qlip_export.progress import Plain, Silent
from qlip_export.runtime import TextToImage
from qlip_export.workspace import Workspace
from tests import tamper
from tests.conftest import STEPS, Cli, Shared
from tests.runtime.test_without_torch import run
from tests.test_workspace import beside, whole
from tests.tiny import BLOCKS

ENGINES = 3 * len(BLOCKS)
"""Three bit options of every block, text encoder and VAE decoder; the time block is FP32 in all three."""


@pytest.fixture(scope="session")
def exported(shared: Shared, tiny_model: Path, bundle: Path, calibration: Path) -> Path:
    """The tiny model as `qlip-export export` leaves it; its captures are those of `bundle`."""

    def make(out: Path) -> None:
        from qlip_export.build import BuildOptions, export_bundle

        shutil.copytree(bundle, out)
        options = BuildOptions(model=str(tiny_model), steps=STEPS, calibration=calibration)
        export_bundle(options, out, Silent())

    return shared("exported", make)


@pytest.fixture
def mine(exported: Path, tmp_path: Path) -> Path:
    return tamper.copy_of(exported, tmp_path)


def engines_of(bundle: Path, target: str) -> dict[str, str]:
    """Return path and key of every engine."""
    manifest = Bundle.open(bundle).manifest
    return {e.path: manifest.files[e.path].key for e in manifest.targets[target].engines.values()}


def without_memory(target: TargetEntry) -> TargetEntry:
    """Return a target without what its engines took when they were measured: that is never the same twice."""
    engines = {path: e.model_copy(update={"memory": None}) for path, e in target.engines.items()}
    return target.model_copy(update={"engines": engines})


# --- two phases


def test_export_makes_everything_but_engines(exported: Path, bundle: Path) -> None:
    files = whole(exported)
    built = whole(bundle)
    assert files == {path: key for path, key in built.items() if not path.startswith("engines/")}
    assert Bundle.open(exported).manifest.targets == {}


def test_export_and_compile_make_what_build_makes(mine: Path, bundle: Path) -> None:
    report = compile_bundle(mine, "openvino", Silent())
    assert (report.built, report.reused, report.engines) == (ENGINES, 0, ENGINES)
    assert whole(mine) == whole(bundle)
    compiled, built = (Bundle.open(root).manifest.targets["openvino"] for root in (mine, bundle))
    assert {path: e.memory is None for path, e in compiled.engines.items()} == {
        path: e.memory is None for path, e in built.engines.items()
    }
    assert without_memory(compiled) == without_memory(built)
    assert Bundle.open(mine).manifest.targets.keys() == Bundle.open(bundle).manifest.targets.keys()
    assert beside(mine) == []


REFUSED = ("torch", "diffusers", "transformers", "accelerate", "onnxscript", "safetensors")
COMPILE = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {REFUSED!r}:
            raise AssertionError("compiling imports " + name)
sys.meta_path.insert(0, Refuse())
sys.argv[0] = "qlip-export"
from qlip_export.cli import main
main()
"""


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_compiling_imports_no_torch(mine: Path, backend: str) -> None:
    command = [sys.executable, "-c", COMPILE, "compile", str(mine), "--backend", backend, "--json"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["built"] == ENGINES
    assert f"{backend} for " in done.stderr and f"{ENGINES} engines to build, 0 there" in done.stderr
    assert len(engines_of(mine, backend)) == ENGINES


def test_the_block_on_imports_works() -> None:
    code = COMPILE.replace("from qlip_export.cli import main", "import torch")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "compiling imports torch" in done.stderr


def test_exported_bundle_says_how_to_go_on(cli: Cli, exported: Path, tmp_path: Path) -> None:
    done = cli("generate", exported, "a dog", "-o", tmp_path / "x.png", "--json")
    error = json.loads(done.out)["error"]
    assert error["problem"] == f"{exported} holds no engines"
    assert error["fix"] == f"qlip-export compile {exported} --backend openvino"
    assert error["fix"] in cli("inspect", exported).out


# --- side by side


@pytest.fixture(scope="session")
def both(shared: Shared, bundle: Path) -> Path:
    """As `bundle`, with engines of ONNX Runtime beside those of OpenVINO."""

    def make(out: Path) -> None:
        shutil.copytree(bundle, out)
        compile_bundle(out, "onnxruntime", Silent())

    return shared("both", make)


def test_a_second_target_leaves_the_first_alone(both: Path, bundle: Path, ort_bundle: Path) -> None:
    assert list(Bundle.open(both).manifest.targets) == ["openvino", "onnxruntime"]
    assert whole(both) == whole(bundle) | whole(ort_bundle)
    assert engines_of(both, "openvino") == engines_of(bundle, "openvino")


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_each_target_draws_what_it_draws_alone(
    request: pytest.FixtureRequest, both: Path, backend: str
) -> None:
    alone = request.getfixturevalue({"openvino": "bundle", "onnxruntime": "ort_bundle"}[backend])
    expected = TextToImage.load(alone)("a dog", seed=3, bits=16).images[0]
    made = TextToImage.load(both, backend=backend)("a dog", seed=3, bits=16)
    assert made.records[0]["target"] == backend
    assert made.images[0].tobytes() == expected.tobytes()


def test_generate_says_which_engines_ran(cli: Cli, both: Path, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    done = cli("generate", both, "a dog", "-o", out, "--json")
    assert "engines: openvino (--backend chooses)" in done.err
    assert json.loads(done.out)["images"][0]["target"] == "openvino"
    chosen = cli("generate", both, "a dog", "-o", out, "--backend", "onnxruntime", "--json")
    assert "engines:" not in chosen.err
    assert json.loads(chosen.out)["images"][0]["target"] == "onnxruntime"
    assert "engines:" not in cli("generate", bundle, "a dog", "-o", out, "--json").err


def test_validate_compares_the_engines_it_is_told(cli: Cli, both: Path, tmp_path: Path) -> None:
    wrong = tamper.copy_of(both, tmp_path)
    tamper.edit_manifest(wrong, lambda m: m["model"].update(source=str(tmp_path / "gone")))  # no images
    tamper.alter_engine(wrong, "out", 16, lambda bias: bias + 1, target="onnxruntime")
    assert "all openvino engines agree" in cli("validate", wrong).out
    done = cli("validate", wrong, "--backend", "onnxruntime", "--json")
    report = json.loads(done.out)
    assert (done.code, report["target"]) == (1, "onnxruntime")
    assert [(r["block"], r["bits"]) for r in report["rows"] if not r["passed"]] == [("out", 16)]


def test_validate_needs_no_engines_of_other_targets(cli: Cli, both: Path, tmp_path: Path) -> None:
    """A device is given what it runs, and no more."""
    sent = tamper.copy_of(both, tmp_path)
    shutil.rmtree(sent / "engines" / "openvino")
    assert cli("validate", sent, "--backend", "onnxruntime").code == 0
    refused = cli("validate", sent, "--backend", "openvino")
    assert refused.code == 2
    assert "engines/openvino" in refused.err and "is missing" in refused.err


def test_inspect_shows_every_target(cli: Cli, both: Path) -> None:
    shown = cli("inspect", both).out
    assert "engines: openvino " in shown and "engines: onnxruntime " in shown
    account = cli("inspect", both, "--memory").out
    assert "engines of openvino" in account and "engines of onnxruntime" in account


# --- only what changed


def test_compiling_again_makes_nothing(
    both: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tamper.copy_of(both, tmp_path)
    before = (again / "manifest.json").read_bytes()
    report = compile_bundle(again, "onnxruntime", Plain())
    assert f"onnxruntime for CPU: 0 engines to build, {ENGINES} there\n" in capsys.readouterr().err
    assert (report.built, report.reused) == (0, ENGINES)
    assert (again / "manifest.json").read_bytes() == before


def test_only_the_engine_of_another_graph_is_made_again(both: Path, tmp_path: Path) -> None:
    changed = tamper.copy_of(both, tmp_path)
    tamper.edit_manifest(changed, lambda m: m["files"]["onnx/stem.a8.onnx"].update(key="another"))
    report = compile_bundle(changed, "onnxruntime", Silent())
    assert (report.built, report.reused) == (1, ENGINES - 1)
    before, after = engines_of(both, "onnxruntime"), engines_of(changed, "onnxruntime")
    assert {path for path in before if before[path] != after[path]} == {
        "engines/onnxruntime/stem.a8.ort.onnx"
    }
    assert engines_of(changed, "openvino") == engines_of(both, "openvino")


def test_damaged_engine_is_made_again(both: Path, tmp_path: Path) -> None:
    damaged = tamper.copy_of(both, tmp_path)
    tamper.flip_byte(damaged / "engines/onnxruntime/stem.a8.ort.onnx")
    assert compile_bundle(damaged, "onnxruntime", Silent()).built == 1
    assert whole(damaged) == whole(both)


def test_engine_that_nobody_needs_any_more_goes(both: Path, tmp_path: Path) -> None:
    smaller = tamper.copy_of(both, tmp_path)

    def drop(manifest: dict[str, Any]) -> None:
        manifest["bits"] = [8, 16]
        for block in manifest["blocks"]:
            del block["variants"]["a32"]

    tamper.edit_manifest(smaller, drop)
    compile_bundle(smaller, "onnxruntime", Silent())
    left = engines_of(smaller, "onnxruntime")
    assert "engines/onnxruntime/stem.a32.ort.onnx" not in left
    whole(smaller)


# --- interrupted


class PowerCutError(BaseException):
    pass


def test_interrupted_compilation_leaves_the_bundle_and_goes_on(
    mine: Path, exported: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_one, done = OpenVINOBackend.compile, []

    def cut(self: OpenVINOBackend, onnx: Path, engine: Path, container: Any) -> Any:
        if len(done) == 5:
            raise PowerCutError
        done.append(onnx)
        return compile_one(self, onnx, engine, container)

    monkeypatch.setattr(OpenVINOBackend, "compile", cut)
    with pytest.raises(PowerCutError):
        compile_bundle(mine, "openvino", Silent())
    assert whole(mine) == whole(exported)
    monkeypatch.undo()
    report = compile_bundle(mine, "openvino", Silent())
    assert (report.built, report.reused) == (ENGINES - 5, 5)
    assert whole(mine) == whole(bundle)
    assert beside(mine) == []


@pytest.mark.parametrize("writes", [0, 1])
def test_killed_while_engines_are_moved_in(
    both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Before the manifest lets go of what is overwritten, and after the move: it lists only what is true."""
    out = tamper.copy_of(both, tmp_path)
    tamper.edit_manifest(out, lambda m: m["files"]["onnx/stem.a8.onnx"].update(key="another"))
    write, count = Workspace._write_manifest, []

    def cut(self: Workspace, manifest: Manifest) -> None:
        if len(count) == writes:
            raise PowerCutError
        count.append(1)
        write(self, manifest)

    monkeypatch.setattr(Workspace, "_write_manifest", cut)
    with pytest.raises(PowerCutError):
        compile_bundle(out, "onnxruntime", Silent())
    monkeypatch.undo()
    opened = Bundle.open(out)
    for path in opened.manifest.files:
        opened.file(path)
    stem = "engines/onnxruntime/stem.a8.ort.onnx"
    assert (stem in opened.manifest.files) == (writes == 0)
    if writes:
        with pytest.raises(QlipError, match=r"holds no onnxruntime engine of onnx/stem\.a8\.onnx"):
            TextToImage.load(out, backend="onnxruntime")("a dog", seed=0, bits=8)
    report = compile_bundle(out, "onnxruntime", Silent())
    assert report.built == 0
    assert stem in whole(out)
    assert beside(out) == []


def test_engine_of_an_interrupted_run_does_not_replace_a_current_one(both: Path, tmp_path: Path) -> None:
    out = tamper.copy_of(both, tmp_path)
    left = tmp_path / ".bundle.qlip-compiling-onnxruntime" / "engines/onnxruntime/stem.a8.ort.onnx"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of another graph")
    assert compile_bundle(out, "onnxruntime", Silent()).built == 0
    assert whole(out) == whole(both)


# --- refused


@pytest.mark.parametrize("file", ["onnx/stem.a16.onnx", "onnx/denoiser.weights.bin"])
def test_file_altered_after_the_export(cli: Cli, mine: Path, file: str) -> None:
    tamper.flip_byte(mine / file)
    done = cli("compile", mine, "--backend", "onnxruntime", "--json")
    assert done.code == 2
    assert json.loads(done.out)["error"]["problem"] == f"{mine / file} was altered after the build"
    assert Bundle.open(mine).manifest.targets == {}


def test_disk_that_cannot_hold_the_engines(cli: Cli, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000))
    done = cli("compile", mine, "--backend", "onnxruntime", "--json")
    assert done.code == 2
    error = json.loads(done.out)["error"]
    assert error["problem"] == f"the disk cannot hold {ENGINES} engines of onnxruntime"
    assert error["found"] == "0 MB free"
    assert beside(mine) == []


def test_memory_that_cannot_hold_the_largest_engine(
    cli: Cli, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlip_export.compile.available_memory_bytes", lambda: 10_000_000)
    done = cli("compile", mine, "--backend", "onnxruntime", "--json")
    assert done.code == 2
    error = json.loads(done.out)["error"]
    assert error["problem"] == "memory cannot hold the compilation of the largest engine of onnxruntime"
    assert error["found"] == "10 MB available"
    assert beside(mine) == []
    assert Bundle.open(mine).manifest.targets == {}


def test_preflight_is_an_upper_bound_of_the_engines(
    exported: Path, both: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlip_export.compile import check_preflight, preflight

    for backend in (OpenVINOBackend(threads=1), OnnxRuntimeBackend(threads=1)):
        bundle = Bundle.open(exported)
        manifest = bundle.manifest
        found = preflight(manifest, backend, tuple(manifest.containers), both, bundle.file)
        check_preflight(found, Plain())
        assert (
            f"{backend.name} for {backend.capabilities.device}: {ENGINES} engines" in capsys.readouterr().err
        )
        opened = Bundle.open(both).manifest
        size = sum(opened.files[path].size for path in engines_of(both, backend.name))
        # Small blocks are all graph and little weight; the estimate must be of the right order there, too.
        assert size / 4 < found.need < 4 * size


@pytest.mark.parametrize("backend", ["tensorrrt", "Openvino"])
def test_unknown_backend(cli: Cli, both: Path, backend: str) -> None:
    for command in (["compile", both], ["generate", both, "a dog"], ["validate", both]):
        done = cli(*command, "--backend", backend, "--json")
        assert json.loads(done.out)["error"]["problem"] == f"unknown backend {backend!r}"


def test_compiling_what_is_no_bundle(cli: Cli, tmp_path: Path) -> None:
    done = cli("compile", tmp_path / "none", "--backend", "openvino", "--json")
    assert json.loads(done.out)["error"]["problem"] == f"{tmp_path / 'none'} is no bundle"
    assert list(tmp_path.iterdir()) == []


def test_compiling_without_the_onnx_library(exported: Path) -> None:
    """`run` refuses `onnx_ir`, as if it were not installed."""
    code = """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "onnx_ir" else found(name, package)
sys.argv[:] = ["qlip-export", "compile", sys.argv[1], "--backend", "openvino"]
from qlip_export.cli import main
main()
"""
    done = run(code, exported)
    assert done.returncode == 2
    assert 'pip install "qlip-export[compile]"' in done.stderr
