"""Recorded runs are those of the simulator."""

from __future__ import annotations

import numpy as np
import torch

from qlip_export.calibrate.trajectories import Trajectories, record
from qlip_export.noise import seeded_noise
from qlip_export.simulate import Simulator

SHAPE = (4, 8, 8)


def test_noise_is_that_of_the_run_time() -> None:
    philox = np.random.Generator(np.random.Philox(5)).standard_normal(SHAPE, dtype=np.float32)
    assert np.array_equal(seeded_noise(5, SHAPE), philox)


def test_what_is_kept_is_what_the_denoiser_saw_and_said(
    simulator: Simulator, trajectories: Trajectories
) -> None:
    assert trajectories.inputs.shape == trajectories.predictions.shape == (4, 4, *SHAPE)
    assert trajectories.timesteps.tolist() == sorted(trajectories.timesteps.tolist(), reverse=True)
    prompt, step = torch.tensor([3, 1]), torch.tensor([0, 2])
    with torch.no_grad():
        again = simulator.guided(
            trajectories.inputs[prompt, step],
            trajectories.timesteps[step],
            trajectories.both_states(prompt).float(),
            trajectories.guidance,
        )
    # What is kept is FP16, and guidance makes more of its rounding.
    torch.testing.assert_close(again, trajectories.predictions[prompt, step].float(), rtol=0.02, atol=0.02)


def test_a_prompt_starts_from_its_own_seed(simulator: Simulator) -> None:
    alone = record(simulator, ["a cat", "a dog"], guidance=4.0, seed=7, batch_size=1)
    expected = torch.from_numpy(seeded_noise(8, SHAPE))
    ratio = alone.inputs[1, 0].float() / expected
    assert ratio.std() < 1e-2 * ratio.mean().abs()  # but for the scheduler's factor
