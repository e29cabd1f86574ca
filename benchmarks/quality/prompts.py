"""How much of what quantization does depends on the prompt, and how much of that T2Q's q can tell.

Looked at is the squared error of the guided prediction along full-precision runs, at uniform bits.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.quality.rows import Subject
from qlip_export.files import write_json
from qlip_export.prompts import read_prompts
from qlip_export.zoo import find_model

OPTIONS = (6, 8, 16)
PROMPTS = 256
BATCH = 64


def measure_prompts(calibration: Path, out: Path, device: str, prompts: int = PROMPTS) -> None:
    """Write ``prompts.json``."""
    _, checkpoint = find_model("emoji")
    subject = Subject(checkpoint, calibration, device)
    texts = read_prompts(calibration / "evaluation.txt")[:prompts]
    q = subject.qualities("quality", texts).numpy()
    errors = {bits: _errors(subject, texts, bits) for bits in OPTIONS}
    found: dict[str, Any] = {"prompts": len(texts), "device": device, "uniform": {}, "gain": {}}
    for bits, error in errors.items():
        found["uniform"][str(bits)] = _describe(np.log(error), q) | {"mean": float(error.mean())}
    for low, high in pairwise(OPTIONS):
        found["gain"][f"{low} to {high}"] = _describe(np.log(errors[low] / errors[high]), q)
    write_json(out / "prompts.json", found)


@torch.inference_mode()
def _errors(subject: Subject, texts: list[str], bits: int) -> NDArray[np.float64]:
    """Return the mean squared error of every prompt and step, (prompts, steps)."""
    simulator, runs = subject.simulator(f"w4a{bits}"), subject.trajectories(texts)
    simulator.quantizer.set_bits(dict.fromkeys(simulator.layers, bits))
    rows = []
    for start in range(0, len(texts), BATCH):
        part = torch.arange(start, min(start + BATCH, len(texts)), device=simulator.device)
        states, columns = runs.both_states(part).float(), []
        for step, timestep in enumerate(runs.timesteps):
            guided = simulator.guided(runs.inputs[part, step], timestep[None], states, runs.guidance)
            wanted = runs.predictions[part, step].float()
            columns.append((guided - wanted).square().flatten(1).mean(1))
        rows.append(torch.stack(columns, 1))
    simulator.quantizer.set_functions({})
    return torch.cat(rows).double().cpu().numpy()


def _describe(values: NDArray[np.float64], q: NDArray[np.float32]) -> dict[str, float]:
    """Split the variance of (prompts, steps) between the two, and correlate a prompt's mean with its q."""
    total = values.var()
    return {
        "share_of_steps": round(float(values.mean(0).var() / total), 3),
        "share_of_prompts": round(float(values.mean(1).var() / total), 3),
        "spearman_q": round(float(spearmanr(q, values.mean(1)).statistic), 3),
    }
