"""What the benchmarks run on: models and bundles under benchmarks/out/, built when they are missing.

python -m benchmarks.bundles emoji --model FOLDER     # prepare a shape by hand; the benchmarks do it too
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shapes import write_bk_sdm_tiny

OUT = Path(__file__).resolve().parent / "out"
RESULTS = Path(__file__).resolve().parent / "results"
"""What was measured, a file for each benchmark and shape; the tables of the documents are made of them."""
BITS = (8, 16, 32)
SHAPES = ("emoji", "bk-sdm-tiny")


@dataclass(frozen=True)
class Subject:
    """A model under measurement.

    Attributes:
        shape: A name of ``SHAPES``.
        model: Its folder in the diffusers layout, or a name of the zoo.
        trained: Whether its weights mean anything; random ones are as fast.
        reuse: Take bundles that are there as they are, without asking whether they are current.
    """

    shape: str
    model: str
    trained: bool
    reuse: bool = False

    @property
    def folder(self) -> Path:
        """The diffusers folder."""
        from qlip_export.zoo import find_model

        return find_model(self.model)[0].folder

    def bundle(self, granularity: str) -> Path:
        """Return the bundle cut at ``granularity``; `prepare` builds it."""
        return OUT / "bundles" / f"{self.shape}-{granularity}"


def subject(shape: str, model: str | None = None, *, reuse: bool = False) -> Subject:
    """Return the model of ``shape``; ``model`` replaces the embedded one for `emoji`."""
    if shape == "bk-sdm-tiny":
        return Subject(shape, str(OUT / "models" / shape), trained=False, reuse=reuse)
    return Subject("emoji", model or "emoji", trained=model is None, reuse=reuse)


def prepare(
    of: Subject, granularities: tuple[str, ...] = ("coarse", "whole"), *, backend: str = "openvino"
) -> None:
    """Make what is missing of the model and its bundles; each build is a process of its own, measured."""
    if of.reuse and all((of.bundle(g) / "manifest.json").is_file() for g in granularities):
        return
    if of.shape == "bk-sdm-tiny":
        write_bk_sdm_tiny(Path(of.model))
    if not _has_ranges(of):
        command = [sys.executable, "-m", "benchmarks.bundles", of.shape, "--calibrate"]
        run_measured([*command, "--model", of.model])
    for granularity in granularities:
        build_bundle(of, granularity, of.bundle(granularity), backend=backend)


def build_bundle(of: Subject, granularity: str, out: Path, *, backend: str = "openvino") -> dict[str, Any]:
    """Build a bundle in a process of its own; return its report with wall seconds and peak memory (RSS)."""
    command = [sys.executable, "-m", "qlip_export", "build", "--model", of.model]
    command += ["--blocks", granularity, "-o", str(out), "--json"]
    command += ["--bits", ",".join(map(str, BITS)), "--backend", backend]
    if (_calibration(of) / "ranges.json").is_file():
        command += ["--calibration", str(_calibration(of))]
    if granularity != "coarse":
        command += ["--policy", "none"]  # the model's policy decides over coarse blocks
    started = time.monotonic()
    output, peak = run_measured(command)
    report: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return {**report, "wall_seconds": round(time.monotonic() - started, 1), "peak_rss_bytes": peak}


def _calibration(of: Subject) -> Path:
    return OUT / "models" / f"{of.shape}-calibration"


def _has_ranges(of: Subject) -> bool:
    """Say whether the model brings ranges, or a short run has measured some for this very model."""
    from qlip_export.zoo import find_model

    model, checkpoint = find_model(of.model)
    if model.calibration is not None and (model.calibration / "ranges.json").is_file():
        (_calibration(of) / "ranges.json").unlink(missing_ok=True)
        return True
    ranges = _calibration(of) / "ranges.json"
    fingerprint = checkpoint.component("unet").fingerprint
    return ranges.is_file() and json.loads(ranges.read_text())["fingerprint"] == fingerprint


def _calibrate(of: Subject) -> None:
    """Measure ranges on one short run: for speed they only have to be there."""
    from qlip_export.calibrate import measure_ranges
    from qlip_export.checkpoint import Checkpoint

    ranges = measure_ranges(Checkpoint(of.folder), ["a cat"], steps=2)
    folder = _calibration(of)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ranges.json").write_text(ranges.model_dump_json(indent=1), encoding="utf-8")


def run_measured(command: list[str]) -> tuple[str, int]:
    """Run a command; return its stdout and the peak of its resident memory in bytes.

    A build that measures its engines resets the kernel's own peak, so that one is read all along.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        peaks, ended = [0], threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, peaks, ended))
        watcher.start()
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        ended.set()
        watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}: {output}")
    return output, max(*peaks, usage.ru_maxrss * 1024)


def _watch(process: int, peaks: list[int], ended: threading.Event) -> None:
    """Add the kernel's peak of a process, in bytes, to a list until the process has ended."""
    status = Path(f"/proc/{process}/status")
    while not ended.wait(0.02):
        try:
            found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        except OSError:
            return
        if found:
            peaks[:] = [max(*peaks, int(found[1]) * 1024)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prepare the models and bundles of a shape.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--model", help="folder to use instead of the embedded emoji model")
    parser.add_argument("--calibrate", action="store_true", help="only measure the ranges")
    arguments = parser.parse_args()
    chosen = subject(arguments.shape, arguments.model)
    if arguments.calibrate:
        _calibrate(chosen)
    else:
        prepare(chosen)
