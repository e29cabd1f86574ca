"""Benchmarks that nobody runs often still fit the code that they measure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import calibration, images
from benchmarks.tables import RENDERERS
from qlip_export.calibrate.trajectories import record
from qlip_export.checkpoint import Checkpoint
from qlip_export.random_weights import assumed_ranges
from qlip_export.runtime import TextToImage
from qlip_export.simulate import Simulator
from tests.tiny import IMAGE_SIZE


def test_a_peer_draws_in_the_place_of_the_chain(bundle: Path) -> None:
    pipeline = TextToImage.load(bundle)
    peer = images.PeerChain(lambda latents, timestep, text: latents / 2, pipeline.chain.blocks)
    pipeline.chain = peer  # type: ignore[assignment]
    (image,) = images._our_image(pipeline, 16)().images
    assert image.size == (IMAGE_SIZE, IMAGE_SIZE)


def test_paces_of_calibration_are_measured(towers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(calibration, "SIZES", replace(calibration.SIZES, bit_batch=2, weight_batch=2))
    monkeypatch.setattr(calibration, "RUNS", 2)
    monkeypatch.setattr(calibration, "EVERY", 20)
    monkeypatch.setattr(calibration, "AT_ONCE", {2: None})
    monkeypatch.setattr(calibration, "ROUNDING", ((2, 1), (6, 1), (2, 3)))
    checkpoint = Checkpoint(towers)
    simulator = Simulator(checkpoint, ranges=assumed_ranges(checkpoint, "unet"), steps=4)
    prompts = ["a red apple", "a blue boat"] * 2
    trajectories = record(simulator, prompts[:2], guidance=4.0, seed=0, batch_size=2)
    rows = [
        stage(simulator, prompts, trajectories, 2, True) | {"at_once": 2}
        for stage in (calibration._draw, calibration._q2b, calibration._weights)
    ]
    assert rows[0]["seconds_per_image"] > 0 and rows[1]["seconds_per_iteration"] > 0
    assert (rows[2]["blocks"], rows[2]["blocks_measured"]) == (44, 3)
    whole = calibration._whole(rows)
    assert set(whole) == {"t2q", "q2b", "weights"}
    shown = [row | {"limit_bytes": None, "gpu_bytes": 10**9, "reserved_bytes": 2 * 10**9} for row in rows]
    table = RENDERERS["calibration"]({"gpu": "none", "steps": 4, "rows": shown, "whole": whole})
    assert "2.0 GB of all" in table
