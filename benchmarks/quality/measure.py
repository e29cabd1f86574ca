"""Draw the prompts of each row from the same noise and write its numbers to a JSON file of its own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.quality.rows import Subject
from qlip_export.calibrate.ranges import read_prompts
from qlip_export.calibrate.trajectories import initial_noise
from qlip_export.features import FeatureExtractor, ReferenceStatistics, joined, text_embeddings
from qlip_export.files import write_json, written_aside
from qlip_export.metrics import Draws, clip_scores, frechet_draws, mean_draws, resample
from qlip_export.zoo import find_model

STEPS = 25
SEED = 1_000_000
"""Noise of the first image; far from the seeds that calibration draws with."""
PICTURES = 24
"""Images of each row that are kept, to look at."""


def measure_rows(
    rows: Sequence[str],
    model: str,
    calibration: Path,
    out: Path,
    *,
    device: str,
    samples: int,
    batch_size: int,
    guidance: float,
) -> None:
    """Measure rows that ``out`` does not hold yet."""
    _, checkpoint = find_model(model)
    subject = Subject(checkpoint, calibration, device, STEPS)
    prompts = read_prompts(calibration / "evaluation.txt")[:samples]
    training = read_prompts(calibration / "prompts.txt")
    reference = ReferenceStatistics.load(calibration / "reference.safetensors")
    extractor = FeatureExtractor(checkpoint.folder, device=device)
    texts = text_embeddings(checkpoint.folder, prompts, device=device)
    shape = subject.simulator("fp32").latents_shape
    noise = np.stack([initial_noise(SEED + i, shape) for i in range(len(prompts))])
    drawn = resample(len(prompts))
    where = f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, torch {torch.__version__}"
    for row in rows:
        path = out / f"{row.replace(':', '.')}.json"
        if path.is_file():
            continue
        started = time.monotonic()
        bits = subject.bits(row, prompts, training)
        ready = time.monotonic()
        found, pictures = [], []
        for images in subject.simulator(row).generate(
            prompts, noise, guidance=guidance, bits=bits, batch_size=batch_size
        ):
            found.append(extractor(images))
            pictures.append(images[: PICTURES - sum(map(len, pictures))])
        features = joined(found)
        sampled = time.monotonic()
        result: dict[str, Any] = {
            "row": row,
            "samples": len(prompts),
            "steps": STEPS,
            "guidance": guidance,
            "machine": where,
            "fid": _as_dict(frechet_draws(features["embedding"], reference.moments["embedding"], drawn)),
            "sfid": _as_dict(frechet_draws(features["spatial"], reference.moments["spatial"], drawn)),
            "clip": _as_dict(mean_draws(clip_scores(features["embedding"], texts), drawn)),
        }
        if bits is not None:
            wide = bits.float()
            result["fab"] = _as_dict(mean_draws(wide.mean((1, 2)).double().numpy(), drawn))
            if bits.stride(0):
                result["fab_of_prompt"] = [round(v, 3) for v in wide.mean((1, 2)).tolist()]
                result["bits_of_step"] = [round(v, 3) for v in wide.mean((0, 2)).tolist()]
                result["share_of_layer"] = {
                    layer: {
                        str(int(b)): round(float((bits[..., i] == b).float().mean()), 4)
                        for b in bits.unique()
                    }
                    for i, layer in enumerate(subject.simulator(row).layers)
                }
        result["seconds"] = {
            "choosing": round(ready - started, 1),
            "drawing": round(sampled - ready, 1),
            "measuring": round(time.monotonic() - sampled, 1),
        }
        write_json(path, result)
        _save_sheet(torch.cat(pictures).numpy(), path.with_suffix(".webp"))
        shown = {key: result[key]["value"] for key in ("fid", "sfid", "clip", "fab") if key in result}
        print(row, json.dumps(shown | result["seconds"]), file=sys.stderr, flush=True)


def _as_dict(draws: Draws) -> dict[str, Any]:
    return {"value": draws.value, "resampled": [float(f"{v:.7g}") for v in draws.resampled]}


def _save_sheet(images: np.ndarray[Any, np.dtype[np.uint8]], path: Path) -> None:
    """Save images in rows of eight."""
    count, height, width, _ = images.shape
    columns = min(8, count)
    rows = -(-count // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height, left : left + width] = image
    with written_aside(path) as aside:
        Image.fromarray(sheet).save(aside, format="WEBP", quality=90, method=6)
