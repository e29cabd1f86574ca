"""Half of the memory that all engines take: seconds of a run, and its memory, predicted and measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bundles import Subject, prepare, subject
from benchmarks.timing import THREADS, interleave, ratio, summary
from qlip_export.backends.heap import return_free_memory
from qlip_export.backends.memory import private_bytes, sampled_private_bytes
from qlip_export.runtime import TextToImage
from qlip_export.runtime.chain import Pattern
from qlip_export.runtime.schedule import Scheduler

PROMPT = "a red apple"
ROUNDS = {"emoji": 11, "bk-sdm-tiny": 3}
QUICK_ROUNDS = {"emoji": 3, "bk-sdm-tiny": 2}
QUICK_STEPS = 10
TARGET = 1.10
AMPLE = 10**12
FRACTIONS = (1.0, 0.75, 0.5, 0.0)


def run(of: Subject, *, quick: bool) -> dict[str, Any]:
    """Return seconds of runs with all engines and with half the memory, warm and cold, and peaks."""
    emoji = subject("emoji")
    for each in {of.shape: of, "emoji": emoji}.values():
        prepare(each, ("coarse",))
    bundle, chooser = of.bundle("coarse"), emoji.bundle("coarse")
    steps = QUICK_STEPS if quick and of.shape != "emoji" else None
    peaks = peaks_apart(bundle, chooser, steps)
    half = peaks[0]["all_resident"] // 2
    budgets = {"everything stays": None, "half the memory": half}
    warm = {name: _again(load(bundle, chooser, steps), budget) for name, budget in budgets.items()}
    cold = {name: _anew(bundle, chooser, steps, budget) for name, budget in budgets.items()}
    rounds = (QUICK_ROUNDS if quick else ROUNDS)[of.shape]
    rows = []
    for what, sides in (("engines loaded by an earlier run", warm), ("first run of a process", cold)):
        seconds = interleave(sides, rounds=rounds, least_seconds=0, settle=False)
        base, ours = (seconds[name] for name in budgets)
        rows.append(
            {
                "name": what,
                "base": summary(base.wall),
                "half": summary(ours.wall),
                "ratio": ratio(ours.wall, base.wall),
                "cpu_ratio": ratio(ours.cpu, base.cpu),
                "target": TARGET,
            }
        )
    return {"steps": steps or len(_schedule(chooser)), "rows": rows, "peaks": peaks}


def load(bundle: Path, chooser: Path, steps: int | None) -> TextToImage:
    """Load a bundle; one without a policy runs the schedule that ``chooser``'s policy has for the prompt."""
    pipeline = TextToImage.load(bundle, backend="openvino", threads=THREADS)
    if pipeline.bundle.manifest.policy is None:
        patterns = _schedule(chooser)[:steps]
        pipeline._decide = lambda *_: ([None], patterns)  # type: ignore[method-assign]
    return pipeline


def _schedule(chooser: Path) -> list[Pattern]:
    pipeline = TextToImage.load(chooser, backend="openvino", threads=THREADS)
    policy = pipeline.bundle.manifest.policy
    assert policy is not None
    return Scheduler(policy.table, pipeline.chain.blocks)(pipeline.qualities([PROMPT]))


def _again(pipeline: TextToImage, budget: int | None) -> Callable[[], Any]:
    return lambda: pipeline(PROMPT, seed=0, memory_budget=budget)


def _anew(bundle: Path, chooser: Path, steps: int | None, budget: int | None) -> Callable[[], Any]:
    return lambda: load(bundle, chooser, steps)(PROMPT, seed=0, memory_budget=budget)


def peaks_apart(bundle: Path, chooser: Path, steps: int | None) -> list[dict[str, Any]]:
    """Return predicted and measured peaks of a run at several budgets, in bytes; each in its own process."""

    def run(budget: int) -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.residency", str(bundle), str(chooser)]
        command += [str(steps or 0), str(budget)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
        return found

    everything = run(AMPLE)
    budgets = {f: max(int(f * everything["all_resident"]), everything["smallest"]) for f in FRACTIONS}
    return [{**run(budget), "fraction": fraction} for fraction, budget in budgets.items()]


def peak(bundle: Path, chooser: Path, steps: int | None, budget: int) -> dict[str, Any]:
    """Return what a run in this process was predicted to take at a budget, and its measured peak, in bytes.

    Private memory is sampled every millisecond. What there is before, when the smallest engine has come and
    gone (interpreter, library), is subtracted.
    """
    pipeline = load(bundle, chooser, steps)
    _start_library(pipeline)
    return_free_memory()
    base = private_bytes()
    with sampled_private_bytes() as samples:
        used: dict[str, Any] = pipeline(PROMPT, seed=0, memory_budget=budget).records[0]["memory"]
    return {**used, "measured_peak": max(samples) - base}


def _start_library(pipeline: TextToImage) -> None:
    files = pipeline.bundle.manifest.files
    entry = min(pipeline.target.entry.engines.values(), key=lambda entry: files[entry.path].size)
    engine = pipeline.backend.load(pipeline.bundle.file(entry.path), entry)
    for port in (*entry.inputs, *entry.outputs):
        engine.bind(port.name, pipeline.backend.allocate(port.shape, port.dtype))
    engine.run()


if __name__ == "__main__":
    print(json.dumps(peak(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) or None, int(sys.argv[4]))))
