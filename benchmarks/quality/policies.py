"""What shipped policies ask for, from the text alone: over batch sizes, and over the richness of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.quality.rows import Subject
from qlip_export.files import write_json
from qlip_export.policy.store import Policy, names
from qlip_export.prompts import read_prompts
from qlip_export.zoo import find_model

BATCHES = (1, 2, 4, 8, 16)
LEVELS = 5
"""Prompts of one concept in richness.txt, from the plainest to the richest."""


def describe_policies(calibration: Path, out: Path) -> None:
    """Write ``policies.json`` with the numbers of figures S1 and S4 for every policy of the folder."""
    _, checkpoint = find_model("emoji")
    subject = Subject(checkpoint, calibration, "cpu")
    evaluation = read_prompts(calibration / "evaluation.txt")
    rich = read_prompts(calibration / "richness.txt")
    found: dict[str, Any] = {}
    for name in names(calibration):
        policy = Policy.load(calibration, name)
        criterion = policy.recipe.criterion
        q = subject.qualities(criterion, evaluation)
        bits = subject.bits(f"qlip:{name}", evaluation)
        assert bits is not None
        per_level = subject.bits(f"qlip:{name}", rich)
        assert per_level is not None
        fab = per_level.float().mean((1, 2)).view(-1, LEVELS).numpy()
        level_q = subject.qualities(criterion, rich).view(-1, LEVELS).numpy()
        found[name] = {
            "prompts": len(evaluation),
            "q": {str(p): round(float(np.percentile(q.numpy(), p)), 3) for p in (5, 25, 50, 75, 95)},
            "fab_by_batch": {str(size): round(_batch_fab(bits, size), 3) for size in BATCHES},
            "richness": {
                "concepts": len(fab),
                "fab": [round(float(v), 3) for v in fab.mean(0)],
                "q": [round(float(v), 3) for v in level_q.mean(0)],
                "spearman_fab": _rank_correlation(fab),
                "spearman_q": _rank_correlation(level_q),
            },
        }
    write_json(out / "policies.json", found)


def _batch_fab(bits: Tensor, size: int) -> float:
    """Return FAB where every ``size`` random prompts share a batch, each layer at its highest bits."""
    order = torch.randperm(len(bits), generator=torch.Generator().manual_seed(0))
    whole = order[: len(order) // size * size].view(-1, size)
    return float(torch.stack([bits[batch].amax(0).float().mean() for batch in whole]).mean())


def _rank_correlation(values: np.ndarray[Any, Any]) -> float | None:
    """Return Spearman's correlation of richness level and value, over concepts, each around its own mean.

    There is none where every concept has one value at all levels.
    """
    levels = np.tile(np.arange(values.shape[1]), len(values))
    centred = values - values.mean(1, keepdims=True)
    if not np.ptp(values, axis=1).any():
        return None
    return round(float(spearmanr(levels, centred.ravel()).statistic), 3)
