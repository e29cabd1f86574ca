"""The NumPy sampler, against the diffusers schedulers it replaces and against hand-made tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qlip_export.errors import QlipError
from qlip_export.runtime.sampler import Sampler, guided
from qlip_export.sampler_probe import probe_scheduler, scheduler_from_config
from qlip_export.spec import SamplerStep, SamplerTable

CONFIG = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}
SHAPE = (2, 4, 6, 6)
MIX = np.random.default_rng(3).standard_normal((144, 144)).astype(np.float32) / 12


def denoise(x: np.ndarray, t: float) -> np.ndarray:
    return np.tanh(x.reshape(2, 144) @ MIX + np.float32(t / 500)).reshape(SHAPE)


def diffusers_latents(scheduler: Any, steps: int, noise: np.ndarray) -> np.ndarray:
    """A pipeline's loop, in float32."""
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(noise) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = denoise(scheduler.scale_model_input(x, t).numpy(), float(t))
        x = scheduler.step(torch.from_numpy(output), t, x, return_dict=False)[0]
    return x.numpy()


@pytest.mark.parametrize("steps", [1, 2, 5, 25])
@pytest.mark.parametrize("name", ["dpmsolver++", "ddim", "euler", "pndm"])
def test_sampler_follows_diffusers(name: str, steps: int) -> None:
    scheduler = scheduler_from_config(name, CONFIG)
    sampler = Sampler(probe_scheduler(scheduler, steps, name=name))
    noise = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    sampler.start(noise)
    while not sampler.done:
        sampler.step(denoise(sampler.denoiser_input(), sampler.timestep))
    expected = diffusers_latents(scheduler, steps, noise)
    assert sampler.latents.dtype == np.float32
    assert np.abs(sampler.latents - expected).max() / np.abs(expected).max() < 1e-5


@pytest.mark.parametrize("name", ["ddim", "euler", "flow-match-euler"])
def test_foreseen_is_the_predicted_clean_sample(name: str) -> None:
    """As diffusers predicts it (Song et al. 2021, DDIM, equation 9)."""
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler"} if name.startswith("flow") else CONFIG
    # A last step to alpha 1 instead of the alpha of timestep 0, so that the run ends at the clean sample.
    scheduler = scheduler_from_config(name, {**config, "set_alpha_to_one": True})
    sampler = Sampler(probe_scheduler(scheduler, 5, name=name))
    sampler.start(np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32))
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        before, output = sampler.latents, denoise(sampler.denoiser_input(), sampler.timestep)
        sampler.step(output)
        if name.startswith("flow"):
            expected = before - float(t) / 1000 * output
        else:
            arrays = torch.from_numpy(output), t, torch.from_numpy(before)
            expected = scheduler.step(*arrays).pred_original_sample.numpy()
        foreseen = sampler.foreseen()
        assert np.abs(foreseen - expected).max() / np.abs(expected).max() < 1e-4
    np.testing.assert_array_equal(foreseen, sampler.latents)


@pytest.mark.parametrize("name", ["dpmsolver++", "pndm"])
def test_foreseen_by_samplers_that_look_back(name: str) -> None:
    """A denoiser that says the same at every step is foreseen from the first step on."""
    sampler = Sampler(probe_scheduler(scheduler_from_config(name, CONFIG), 10, name=name))
    noise, output = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    sampler.start(noise)
    sampler.step(output)
    foreseen = sampler.foreseen()
    state = sampler.index, sampler.latents.copy()
    sampler.foreseen()
    assert sampler.index == state[0] and (sampler.latents == state[1]).all(), "foreseeing changed the run"
    while not sampler.done:
        sampler.step(output)
    np.testing.assert_array_equal(foreseen, sampler.latents)


def table(*steps: SamplerStep, init_scale: float = 1.0) -> SamplerTable:
    return SamplerTable(
        scheduler="x", scheduler_class="X", init_scale=init_scale, requested_steps=1, steps=steps
    )


def step(sample: tuple[float, ...], output: tuple[float, ...], t: float = 0, scale: float = 1) -> SamplerStep:
    return SamplerStep(timestep=t, input_scale=scale, sample=sample, output=output)


def test_arithmetic_by_hand() -> None:
    sampler = Sampler(
        table(step((1,), (-1,), t=9, scale=0.5), step((1, 10), (100, 1000), t=3), init_scale=2.0),
    )
    sampler.start(np.array([1.0]))
    assert sampler.latents == [2]
    assert (sampler.timestep, sampler.denoiser_input()) == (9, [1])
    sampler.step(np.array([5.0]))
    assert sampler.latents == [-3]
    assert (sampler.timestep, sampler.denoiser_input()) == (3, [-3])
    sampler.step(np.array([7.0]))
    assert sampler.latents == [-3 + 10 * 2 + 100 * 7 + 1000 * 5]
    assert sampler.done


def test_start_forgets_the_run_before() -> None:
    # A first step that would look back, were anything left there.
    sampler = Sampler(table(step((1, 1), (1, 1)), step((1, 1), (1, 1))))
    results = []
    for _ in range(2):
        sampler.start(np.ones(3))
        while not sampler.done:
            sampler.step(np.ones(3, np.float16))
        results.append(sampler.latents)
    np.testing.assert_array_equal(*results)


def test_inputs_are_copied() -> None:
    sampler = Sampler(table(step((1,), (1,)), step((1,), (1, 1))))
    noise, output = np.ones(2, np.float32), np.ones(2, np.float32)
    sampler.start(noise)
    noise[:] = 99
    sampler.step(output)
    output[:] = 99
    sampler.step(np.zeros(2, np.float32))
    assert sampler.latents.tolist() == [3, 3]


def test_misuse_is_refused() -> None:
    sampler = Sampler(table(step((1,), (1,))))
    with pytest.raises(RuntimeError, match="start"):
        sampler.step(np.ones(2))
    sampler.start(np.ones(2))
    with pytest.raises(QlipError, match=r"expected: \(2,\)\n  found: \(1, 2\)"):
        sampler.step(np.ones((1, 2)))
    with pytest.raises(QlipError, match=r"not finite at step 0(.|\n)*1 NaN or infinite values of 2"):
        sampler.step(np.array([1.0, np.nan]))
    sampler.step(np.ones(2))
    with pytest.raises(RuntimeError, match="all 1 steps"):
        sampler.step(np.ones(2))


def test_guidance() -> None:
    uncond, cond = np.array([1.0, 2.0], np.float16), np.array([3.0, 2.0], np.float16)
    assert guided(uncond, cond, 7.5).tolist() == [16, 2]
    assert guided(uncond, cond, 7.5).dtype == np.float32
    np.testing.assert_array_equal(guided(uncond, cond, 1.0), cond)
