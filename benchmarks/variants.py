"""Engines by layer against engines by block, for one policy by layer: sizes, build times, seconds per image.

Seconds are added up: every engine of every bundle is timed in turn, and a prompt's run is the sum of the
medians of the engines that its schedule runs, step by step. What lies between engines (casts, the sampler) is
left out. A build finds captures, weights and the graphs of uniform bits there: what it takes is the rest.
"""

from __future__ import annotations

import json
import os
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
from benchmarks.schedules import EVALUATION
from benchmarks.timing import THREADS
from qlip_export.runtime import TextToImage
from qlip_export.runtime.schedule import Scheduler, layer_bits

POLICY = "8-16-32-layer"
COUNTS: tuple[int | None, ...] = (1, 2, 3, 5, 9, None)
PROMPTS = 200
ROUNDS = 9
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
    loaded = {name: TextToImage.load(folder / name, threads=THREADS) for name in builds}
    seconds = _time_engines(loaded, QUICK_ROUNDS if quick else ROUNDS)
    prompts = EVALUATION.read_text(encoding="utf-8").splitlines()[:PROMPTS]
    qualities = loaded["block"].qualities(prompts)
    return {
        "policy": POLICY,
        "prompts": len(prompts),
        "rows": [
            {"name": name, **builds[name], **_expected(pipeline, qualities, seconds[name])}
            for name, pipeline in loaded.items()
        ],
    }


def _name(count: int | None) -> str:
    return "exact" if count is None else f"at-most-{count}"


def _export(of: Subject, out: Path) -> None:
    if not out.is_dir():
        command = [sys.executable, "-m", "qlip_export", "export", "--model", of.model, "-o", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _build(of: Subject, out: Path, options: Sequence[str]) -> dict[str, Any]:
    """Build in a process of its own; return what it took and what lies on the disk."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(out.with_name("captured"), out)
    command = [sys.executable, "-m", "qlip_export", "build", "--model", of.model, "--policy", POLICY]
    command += ["--backend", "openvino", "-o", str(out), "--json", *options]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        report = json.loads(process.stdout.read().strip().splitlines()[-1])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    print(f"  {out.name}: built in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return {
        "build_seconds": round(time.monotonic() - started, 1),
        "build_cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "blocks": report["blocks"],
        "unfused": report["unfused"],
        "expected_fab": report["chosen"]["fab"] if report["chosen"] else None,
        "onnx_bytes": report["bytes"]["onnx"],
        "weight_bytes": report["bytes"]["weights"],
    }


def _time_engines(loaded: dict[str, TextToImage], rounds: int) -> dict[str, dict[tuple[str, str], float]]:
    """Return the median seconds of every engine; each round visits all engines of all bundles."""
    times: dict[str, dict[tuple[str, str], list[float]]] = {name: {} for name in loaded}
    for round_ in range(rounds):
        names = list(loaded) if round_ % 2 == 0 else list(reversed(loaded))
        for name in names:
            for block, of_variants in loaded[name].chain.time_blocks(1).items():
                for variant, seconds in of_variants.items():
                    times[name].setdefault((block, variant), []).append(seconds)
    return {name: {key: median(found) for key, found in of.items()} for name, of in times.items()}


def _expected(
    pipeline: TextToImage, qualities: Sequence[float], seconds: dict[tuple[str, str], float]
) -> dict[str, Any]:
    """Return FAB and denoiser seconds of an image, averaged over prompts, and what the engines take."""
    manifest, blocks = pipeline.bundle.manifest, pipeline.chain.blocks
    assert manifest.policy is not None
    schedule = Scheduler(manifest.policy.table, blocks)
    fab, taken = [], []
    used: set[str] = set()
    for q in qualities:
        patterns = schedule([q])
        fab.append(float(layer_bits(blocks, patterns).mean()))
        run = [(b.name, v) for pattern in patterns for b, v in zip(blocks, pattern, strict=True)]
        taken.append(sum(seconds[key] for key in run))
        used |= {blocks_of.variants[v].onnx for p in patterns for blocks_of, v in zip(blocks, p, strict=True)}
    engines = pipeline.target.entry.engines
    onnx = {variant.onnx for block in blocks for variant in block.variants.values()}
    return {
        "fab": round(float(np.mean(fab)), 4),
        "seconds": round(float(np.mean(taken)), 4),
        "engines": len(onnx),
        "engines_used": len(used),
        "engine_bytes": sum(manifest.files[engines[path].path].size for path in onnx),
    }
