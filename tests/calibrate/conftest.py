"""The tiny model in the simulator, and a few of its runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlip_export.calibrate.trajectories import Trajectories, record
from qlip_export.checkpoint import Checkpoint
from qlip_export.simulate import Simulator

PROMPTS = ["a red apple", "the blue boat", "a dog", "the house on a tree"]


@pytest.fixture(scope="module")
def simulator(towers: Path) -> Simulator:
    """At full precision."""
    return Simulator(Checkpoint(towers), steps=4)


@pytest.fixture(scope="module")
def trajectories(simulator: Simulator) -> Trajectories:
    return record(simulator, PROMPTS, guidance=4.0, seed=0, batch_size=3)
