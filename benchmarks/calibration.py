"""An NVIDIA GPU: what an image, a sample and an iteration of `calibrate` take, in seconds and memory.

Needs torch with CUDA. Not part of `make bench`:

    python -m benchmarks calibration --shape bk-sdm-tiny
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.bundles import Subject
from benchmarks.cuda import gpu_name
from qlip_export.calibrate import weights
from qlip_export.calibrate.bits import Plan, bit_costs, train_q2b
from qlip_export.calibrate.quality import draw
from qlip_export.calibrate.stages import SIZES, WEIGHT_BITS
from qlip_export.calibrate.trajectories import Trajectories, record
from qlip_export.capture import denoiser_family
from qlip_export.random_weights import assumed_ranges
from qlip_export.simulate import Simulator

AT_ONCE = {32: None, 8: 24e9}
"""Images and samples that run together (`--batch-size`), and the bytes of the GPU that PyTorch may take."""
BATCHES, QUICK_BATCHES = 4, 2
"""Of drawing; the first, in which kernels are chosen and recorded, does not count."""
ITERATIONS, QUICK_ITERATIONS = 16, 4
"""Of q2b; the first does not count."""
RUNS = 8
"""Prompts whose sampling runs the training stages read."""
EVERY = 5
"""Of the blocks of `weights`, every fifth."""
ROUNDING = ((32, 20), (192, 20), (32, 120))
"""Samples and iterations: what each of the two costs is what they differ by."""
OPTIONS = (8, 16, 32)
GROUPS, FORCED = 5, 2


def run(of: Subject, *, quick: bool) -> dict[str, Any]:
    """Return seconds and the most bytes that PyTorch had allocated, by stage and `--batch-size`."""
    from qlip_export.zoo import find_model

    checkpoint = find_model(of.shape, random_weights=None if of.trained else 0)[1]
    family = denoiser_family(checkpoint)
    ranges = assumed_ranges(checkpoint, family.denoiser_folder)
    simulator = Simulator(checkpoint, device="cuda", ranges=ranges)
    simulator.pipeline.set_progress_bar_config(disable=True)
    prompts = [f"a picture of {number} things" for number in range(max(AT_ONCE) * BATCHES)]
    guidance = simulator.guidance.scale
    trajectories = record(simulator, prompts[:RUNS], guidance=guidance, seed=0, batch_size=RUNS)
    total = torch.cuda.get_device_properties(0).total_memory
    rows = []
    try:
        for stage in (_draw, _q2b, _weights):
            for at_once, limit in AT_ONCE.items():
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction(min(1.0, (limit or total) / total))
                torch.cuda.reset_peak_memory_stats()
                row = stage(simulator, prompts, trajectories, at_once, quick)
                row |= {
                    "at_once": at_once,
                    "limit_bytes": limit,
                    "gpu_bytes": torch.cuda.max_memory_allocated(),
                    "reserved_bytes": torch.cuda.max_memory_reserved(),
                }
                rows.append(row)
                print(f"  {row}", file=sys.stderr, flush=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {"gpu": gpu_name(), "steps": simulator.steps, "rows": rows, "whole": _whole(rows)}


def _draw(
    simulator: Simulator, prompts: list[str], trajectories: Trajectories, at_once: int, quick: bool
) -> dict[str, Any]:
    ends: list[float] = []
    draw(
        simulator,
        prompts[: at_once * (QUICK_BATCHES if quick else BATCHES)],
        lambda images: torch.empty(len(images), 0),
        guidance=trajectories.guidance,
        seed=0,
        batch_size=at_once,
        on_images=lambda _: ends.append(time.perf_counter()),
    )
    return {"stage": "t2q", "seconds_per_image": _between(ends) / at_once}


def _q2b(
    simulator: Simulator, prompts: list[str], trajectories: Trajectories, at_once: int, quick: bool
) -> dict[str, Any]:
    family = denoiser_family(simulator.checkpoint)
    units, unit_of_layer = family.units_of(simulator.layers, "block", "coarse")
    plan = Plan(
        options=OPTIONS,
        parts=frozenset({"q", "m", "h"}),
        units=units,
        unit_of_layer=unit_of_layer,
        costs=bit_costs(OPTIONS, unit_of_layer, len(units)),
        groups=GROUPS,
        forced_steps=FORCED,
        lambda_bit=None,
        target_fab=None,
        iterations=QUICK_ITERATIONS if quick else ITERATIONS,
        batch=SIZES.bit_batch,
        at_once=at_once,
        seed=0,
    )
    ends: list[float] = []
    started = time.perf_counter()
    qualities = torch.linspace(0, 1, RUNS)
    train_q2b(simulator, trajectories, qualities, plan, lambda *_: ends.append(time.perf_counter()))
    return {
        "stage": "q2b",
        "seconds_per_iteration": _between(ends),
        "seconds_until_the_first": ends[0] - started,
    }


def _weights(
    simulator: Simulator, prompts: list[str], trajectories: Trajectories, at_once: int, quick: bool
) -> dict[str, Any]:
    every: Callable[[Simulator], list[str]] = weights.blocks_of
    blocks = every(simulator)
    seconds = []
    try:
        weights.blocks_of = lambda of: every(of)[::EVERY]
        for samples, iterations in (ROUNDING[0], *ROUNDING):
            started = time.perf_counter()
            weights.learn_rounding(
                simulator,
                trajectories,
                bits=WEIGHT_BITS,
                samples=samples,
                iterations=iterations,
                batch=SIZES.weight_batch,
                at_once=at_once,
                seed=0,
            )
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    finally:
        weights.blocks_of = every
    few, more_samples, more_iterations = seconds[1:]  # before them, a run that compiled kernels
    measured = len(blocks[::EVERY])
    (first, iterations), (samples, _), (_, most) = ROUNDING
    per_sample = (more_samples - few) / (samples - first) / measured
    per_iteration = (more_iterations - few) / (most - iterations) / measured
    return {
        "stage": "weights",
        "blocks": len(blocks),
        "blocks_measured": measured,
        "seconds_per_sample": per_sample,
        "seconds_per_iteration": per_iteration,
        "seconds_per_block": few / measured - first * per_sample - iterations * per_iteration,
        "samples": samples,
    }


def _between(ends: list[float]) -> float:
    """Return the median time between ends."""
    return statistics.median(b - a for a, b in itertools.pairwise(ends))


def _whole(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return seconds of the stages at their own sizes, extrapolated from the fastest row of each."""
    rates = {
        stage: min((row for row in rows if row["stage"] == stage), key=_pace)
        for stage in ("t2q", "q2b", "weights")
    }
    image = rates["t2q"]["seconds_per_image"]
    block = rates["weights"]
    return {
        "t2q": SIZES.label_prompts * image,
        "q2b": SIZES.bit_prompts * image + SIZES.bit_iterations * rates["q2b"]["seconds_per_iteration"],
        "weights": SIZES.weight_prompts * image
        + block["blocks"]
        * (
            block["seconds_per_block"]
            + SIZES.weight_samples * block["seconds_per_sample"]
            + SIZES.weight_iterations * block["seconds_per_iteration"]
        ),
    }


def _pace(row: dict[str, Any]) -> float:
    found: float = row.get("seconds_per_image") or row["seconds_per_iteration"]
    return found
