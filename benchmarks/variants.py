"""Engines by layer against engines by block, for one policy by layer: sizes, build times, seconds per image.

Seconds are added up: every engine of every bundle is timed in turn, and a prompt's run is the sum of the
medians of the engines that its schedule runs, step by step. What lies between engines (casts, the sampler) is
left out. A build finds captures, weights and the graphs of uniform bits there: what it takes is the rest.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.bundles import OUT, Subject
from benchmarks.schedules import CALIBRATION
from benchmarks.timing import THREADS
from qlip_export.bundle import Bundle
from qlip_export.files import write_json
from qlip_export.runtime import TextToImage
from qlip_export.runtime.schedule import Scheduler, layer_bits

POLICY = "8-16-32-layer"
COUNTS: tuple[int | None, ...] = (1, 2, 3, 5, 9, None)
PROMPTS = 200
ROUNDS = 5
QUICK_ROUNDS = 2


def run(of: Subject, *, quick: bool) -> dict[str, Any]:
    """Build a bundle for each number of variants, and one by block; time them in turn."""
    folder = OUT / "bundles" / f"{of.shape}-variants"
    _export(of, folder / "captured")
    builds = {"block": _build(of, folder / "block", ["--granularity", "block"])}
    for count in COUNTS:
        limit = [] if count is None else ["--max-variants", str(count)]
        builds[_name(count)] = _build(of, folder / _name(count), ["--granularity", "layer", *limit])
    builds["fused"] = _build(
        of, folder / "fused", ["--granularity", "layer", "--max-variants", "1", "--fuse"]
    )
    seconds = _time_engines({name: folder / name for name in builds}, QUICK_ROUNDS if quick else ROUNDS)
    prompts = (CALIBRATION / "evaluation.txt").read_text(encoding="utf-8").splitlines()[:PROMPTS]
    qualities = TextToImage.load(folder / "block", threads=THREADS).qualities(prompts)
    return {
        "policy": POLICY,
        "prompts": len(prompts),
        "rows": [
            {"name": name, **built, **_expected(folder / name, qualities, seconds[name])}
            for name, built in builds.items()
        ],
    }


def _name(count: int | None) -> str:
    return "exact" if count is None else f"at-most-{count}"


def _export(of: Subject, out: Path) -> None:
    if not out.is_dir():
        command = [sys.executable, "-m", "qlip_export", "export", "--model", of.model, "-o", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _build(of: Subject, out: Path, options: Sequence[str]) -> dict[str, Any]:
    """Build in a process of its own; return what it took and what lies on the disk.

    With ``--reuse``, what an earlier run built and noted stays.
    """
    noted = out.with_name(f"{out.name}.json")
    if of.reuse and noted.is_file():
        kept: dict[str, Any] = json.loads(noted.read_text())
        return kept
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(out.with_name("captured"), out)
    command = [sys.executable, "-m", "qlip_export", "build", "--model", of.model, "--policy", POLICY]
    command += ["--backend", "openvino", "-o", str(out), "--json", *options]
    started = time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    took = time.monotonic() - started
    print(f"  {out.name}: built in {took:.0f} s", file=sys.stderr, flush=True)
    report = json.loads(done.stdout.strip().splitlines()[-1])
    built = {
        "build_seconds": round(took, 1),
        "blocks": report["blocks"],
        "unfused": report["unfused"],
        "expected_seconds": report["chosen"]["seconds"] if report["chosen"] else None,
    }
    write_json(noted, built)
    return built


def _time_engines(bundles: dict[str, Path], rounds: int) -> dict[str, dict[tuple[str, str], float]]:
    """Return the median seconds of every engine; each round visits all bundles, one loaded at a time."""
    times: dict[str, dict[tuple[str, str], list[float]]] = {name: {} for name in bundles}
    for round_ in range(rounds):
        for name in list(bundles) if round_ % 2 == 0 else list(reversed(bundles)):
            chain = TextToImage.load(bundles[name], threads=THREADS).chain
            for block, of_variants in chain.time_blocks(1).items():
                for variant, seconds in of_variants.items():
                    times[name].setdefault((block, variant), []).append(seconds)
            print(f"  round {round_ + 1}: {name}", file=sys.stderr, flush=True)
    return {name: {key: median(found) for key, found in of.items()} for name, of in times.items()}


def _expected(
    bundle: Path, qualities: Sequence[float], seconds: dict[tuple[str, str], float]
) -> dict[str, Any]:
    """Return FAB and denoiser seconds of an image, averaged over prompts, and what the files take."""
    manifest = Bundle.open(bundle).manifest
    blocks = manifest.blocks
    assert manifest.policy is not None
    schedule = Scheduler(manifest.policy.table, blocks)
    fab, taken = [], []
    for q in qualities:
        patterns = schedule([q])
        fab.append(float(layer_bits(blocks, patterns).mean()))
        run = [(b.name, v) for pattern in patterns for b, v in zip(blocks, pattern, strict=True)]
        taken.append(sum(seconds[key] for key in run))
    engines = manifest.targets["openvino"].engines
    onnx = {variant.onnx for block in blocks for variant in block.variants.values()}
    return {
        "fab": round(float(np.mean(fab)), 4),
        "seconds": round(float(np.mean(taken)), 4),
        "engines": len(onnx),
        "engine_bytes": sum(manifest.files[engines[path].path].size for path in onnx),
        "onnx_bytes": sum(manifest.files[path].size for path in onnx),
        "weight_bytes": manifest.files["onnx/denoiser.weights.bin"].size,
    }
