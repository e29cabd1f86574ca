"""Process-wide settings of the test suite, and a tiny model with bundles that all tests and workers share."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# One CPU for each xdist worker. Not every engine library reads OMP_NUM_THREADS (OpenVINO goes by TBB), but
# all of them respect the affinity of the process. Without it every worker starts a thread for every CPU.
_worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if _worker.startswith("gw") and hasattr(os, "sched_setaffinity"):
    _cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cpus[int(_worker.removeprefix("gw")) % len(_cpus)]})

# A deadline for each example measures how busy the machine is; the timeout of the whole test is enough.
settings.register_profile("qlip", deadline=None)
settings.load_profile("qlip")

STEPS = 4
"""Sampling steps of every shared bundle."""
SIZES = ("32x32", "48x32", "32x32:2")
"""Sizes of the bundle that has several."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shared",
        type=Path,
        help="keep what tests share in this folder and take what is there: for a machine that cannot export",
    )


Shared = Callable[[str, Callable[[Path], Any]], Path]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Shared:
    """Make a folder once for all workers: `shared(name, make)` calls `make(path)` if nobody has yet.

    What it returns belongs to everyone: copy it before changing it.
    """
    from qlip_export.files import locked

    base = tmp_path_factory.getbasetemp()
    root = pytestconfig.getoption("shared") or (base.parent if _worker else base) / "shared"

    def get(name: str, make: Callable[[Path], Any]) -> Path:
        done = root / f"{name}.done"
        with locked(root / f"{name}.lock", on_wait=lambda: None):
            if not done.exists():
                shutil.rmtree(root / name, ignore_errors=True)
                make(root / name)
                done.touch()
        return root / name

    return get


@pytest.fixture(scope="session")
def tiny_model(shared: Shared) -> Path:
    """A text-to-image model with random weights in the diffusers layout, FP32."""

    def make(folder: Path) -> None:
        from tests.tiny import write_model

        write_model(folder)

    return shared("tiny", make)


@pytest.fixture(scope="session")
def towers(shared: Shared, tiny_model: Path) -> Path:
    """The tiny model with the vision tower and the text projection of a CLIP model."""
    from tests.tiny import write_towers

    return shared("towers", lambda folder: write_towers(tiny_model, folder))


@pytest.fixture(scope="session")
def calibration(shared: Shared, tiny_model: Path) -> Path:
    """Activation ranges of the tiny model, as `qlip-export calibrate` writes them."""

    def measure(folder: Path) -> None:
        from qlip_export.calibrate import measure_ranges
        from qlip_export.checkpoint import Checkpoint

        ranges = measure_ranges(Checkpoint(tiny_model), ["a red apple", "the blue boat"], steps=3)
        folder.mkdir()
        (folder / "ranges.json").write_text(ranges.model_dump_json(), encoding="utf-8")

    return shared("calibration", measure)


@pytest.fixture(scope="session")
def bundle(shared: Shared, tiny_model: Path, calibration: Path) -> Path:
    """The tiny model at 8, 16 and 32 bits with 4-bit weights, compiled by OpenVINO."""
    return shared("bundle", lambda out: build_tiny(tiny_model, out, calibration=calibration))


@pytest.fixture(scope="session")
def trained(shared: Shared, tiny_model: Path, calibration: Path) -> Path:
    """As `calibration`, with learned rounding, T2Q and policies: untrained, but of many minds."""

    def make(folder: Path) -> None:
        from tests.tiny_calibration import write_calibration

        shutil.copytree(calibration, folder)
        write_calibration(folder, tiny_model)

    return shared("trained", make)


@pytest.fixture(scope="session")
def adaptive_bundle(shared: Shared, tiny_model: Path, bundle: Path, trained: Path) -> Path:
    """As `bundle`, with the default policy of `trained` and its learned rounding."""

    def make(out: Path) -> None:
        shutil.copytree(bundle, out)
        build_tiny(tiny_model, out, calibration=trained)

    return shared("adaptive", make)


@pytest.fixture(scope="session")
def sized(shared: Shared, tiny_model: Path, trained: Path, adaptive_bundle: Path) -> Path:
    """The tiny model with a policy, in two sizes, and in batches of two in the first."""

    def make(out: Path) -> None:
        shutil.copytree(adaptive_bundle, out)
        build_tiny(tiny_model, out, bits=(8, 16, 32), sizes=SIZES, calibration=trained)

    return shared("sized", make)


@pytest.fixture(scope="session")
def plain_bundle(shared: Shared, tiny_model: Path, bundle: Path) -> Path:
    """The tiny model in FP32 with its weights as they are, compiled by OpenVINO."""

    def make(out: Path) -> None:
        shutil.copytree(bundle, out)  # its captures are good for any number of bits
        build_tiny(tiny_model, out, bits=(32,), weight_bits=32)

    return shared("plain", make)


@pytest.fixture(scope="session")
def ort_bundle(shared: Shared, tiny_model: Path, bundle: Path, calibration: Path) -> Path:
    """As `bundle`, but compiled by ONNX Runtime."""

    def make(out: Path) -> None:
        shutil.copytree(bundle, out)
        build_tiny(tiny_model, out, backend="onnxruntime", calibration=calibration)

    return shared("ort", make)


def build_tiny(model: Path, out: Path, **options: Any) -> Any:
    """Build in this process and return the report."""
    from qlip_export.build import BuildOptions, build
    from qlip_export.progress import Silent

    options = {"backend": "openvino", "steps": STEPS} | options
    return build(BuildOptions(model=str(model), **options), out, Silent())


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


Cli = Callable[..., Done]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process, as its entry point does."""

    def run(*arguments: object) -> Done:
        from qlip_export.cli import main

        monkeypatch.setattr(sys, "argv", ["qlip-export", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            main()
        out, err = capfd.readouterr()
        return Done(int(exited.value.code or 0), out, err)

    return run
