"""Draw the prompts of each row from the same noise and write its numbers to a JSON file of its own."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.quality.rows import GUIDANCE, STEPS, Subject
from qlip_export.features import FeatureExtractor, Features, ReferenceStatistics, joined, text_embeddings
from qlip_export.files import write_json, written_aside
from qlip_export.metrics import Draws, clip_scores, frechet_draws, mean_draws, resample
from qlip_export.noise import seeded_noise
from qlip_export.prompts import read_prompts

SEED = 1_000_000
"""Noise of the first image; far from the seeds that calibration draws with."""
PICTURES = 24
"""Images of each row that are kept, to look at."""


class Measurement:
    """Measures rows of one subject on the same prompts, noise and resamples."""

    def __init__(self, subject: Subject, out: Path, *, samples: int, batch_size: int) -> None:
        """Prepare what all rows share.

        Args:
            subject: The model and its calibration.
            out: Folder of the results.
            samples: Prompts of ``evaluation.txt``.
            batch_size: Images at a time.
        """
        self._subject, self._out, self._batch_size = subject, out, batch_size
        self._prompts = read_prompts(subject.calibration / "evaluation.txt")[:samples]
        self._reference = ReferenceStatistics.load(subject.calibration / "reference.safetensors").moments
        model = subject.checkpoint.folder
        self._extractor = FeatureExtractor(model, device=subject.device)
        self._texts = text_embeddings(model, self._prompts, device=subject.device)
        shape = subject.simulator("fp32").latents_shape
        self._noise = np.stack([seeded_noise(SEED + i, shape) for i in range(len(self._prompts))])
        self._drawn = resample(len(self._prompts))

    def path(self, row: str) -> Path:
        """Return where the numbers of ``row`` go."""
        return self._out / f"{file_name(row)}.json"

    def row(self, row: str) -> None:
        """Draw the images of ``row`` and write its numbers."""
        started = time.monotonic()
        bits = self._subject.bits(row, self._prompts)
        ready = time.monotonic()
        found, pictures, kept = [], [], PICTURES
        for images in self._subject.simulator(row).generate(
            self._prompts, self._noise, guidance=GUIDANCE, bits=bits, batch_size=self._batch_size
        ):
            found.append(self._extractor(images))
            pictures.append(images[:kept])
            kept -= len(pictures[-1])
        seconds = {"choosing": round(ready - started, 1), "drawing": round(time.monotonic() - ready, 1)}
        _save_sheet(torch.cat(pictures).numpy(), self.path(row).with_suffix(".webp"))
        self._measure(row, joined(found), bits, seconds)

    def _measure(self, row: str, features: Features, bits: Tensor | None, seconds: dict[str, float]) -> None:
        reference, drawn = self._reference, self._drawn
        device = self._subject.device
        result: dict[str, Any] = {
            "row": row,
            "policy_sha256": self._subject.policy_sha256(row),
            "samples": len(self._prompts),
            "steps": STEPS,
            "guidance": GUIDANCE,
            "machine": (
                f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, torch {torch.__version__}"
            ),
            "fid": _as_dict(frechet_draws(features["embedding"], reference["embedding"], drawn)),
            "sfid": _as_dict(frechet_draws(features["spatial"], reference["spatial"], drawn)),
            "clip": _as_dict(mean_draws(clip_scores(features["embedding"], self._texts), drawn)),
        }
        if bits is not None:
            per_layer = bits.float().mean(1)
            result["fab"] = _as_dict(mean_draws(per_layer.mean(1).double().numpy(), drawn))
            if ":" in row:
                result["bits_of_step"] = [round(v, 3) for v in bits.float().mean((0, 2)).tolist()]
                result["share_of_layer"] = {
                    layer: {
                        str(int(b)): round(float((bits[..., i] == b).float().mean()), 4)
                        for b in bits.unique()
                    }
                    for i, layer in enumerate(self._subject.simulator("fp32").layers)
                }
        result["seconds"] = seconds
        write_json(self.path(row), result)
        shown = {key: result[key]["value"] for key in ("fid", "sfid", "clip", "fab") if key in result}
        print(row, json.dumps(shown | seconds), file=sys.stderr, flush=True)


def file_name(row: str) -> str:
    """Return a row's name as a file may be called."""
    return re.sub(r"[^A-Za-z0-9-]+", "_", row)


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
