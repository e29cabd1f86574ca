"""Schedulers become tables; what cannot is refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from qlip_export.errors import QlipError
from qlip_export.sampler_probe import SCHEDULERS, probe_scheduler, scheduler_from_config
from qlip_export.spec import SamplerTable

# The scheduler of Stable Diffusion 1.x, as its checkpoints spell it.
NOISE = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def config_for(name: str, **changes: Any) -> dict[str, Any]:
    return (FLOW if name.startswith("flow") else NOISE) | changes


def denoise(x: np.ndarray, t: float) -> np.ndarray:
    """A made-up denoiser, nonlinear in its input and different at every timestep."""
    mix = np.random.default_rng(7).standard_normal((x.size, x.size)) / np.sqrt(x.size)
    return np.tanh(mix @ x.ravel() + t / 500).reshape(x.shape)


def follow(table: SamplerTable, noise: np.ndarray) -> np.ndarray:
    """Run a table in float64, straight from the definition in `SamplerStep`."""
    samples, outputs = [noise * table.init_scale], []
    for i, step in enumerate(table.steps):
        outputs.append(denoise(step.input_scale * samples[i], step.timestep))
        x = sum(c * samples[i - j] for j, c in enumerate(step.sample))
        samples.append(x + sum(c * outputs[i - j] for j, c in enumerate(step.output)))
    return samples[-1]


def reference(scheduler: Any, steps: int, noise: np.ndarray) -> np.ndarray:
    """Run the scheduler the way a diffusers pipeline does."""
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(noise * float(getattr(scheduler, "init_noise_sigma", 1.0)))
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(torch.from_numpy(denoise(scaled.numpy(), float(t))), t, x, return_dict=False)[0]
    return x.numpy()


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("steps", [1, 2, 5, 25])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_table_follows_the_scheduler(name: str, steps: int) -> None:
    scheduler = scheduler_from_config(name, config_for(name))
    table = probe_scheduler(scheduler, steps, name=name)
    noise = np.random.default_rng(0).standard_normal((1, 4, 5, 5))
    assert relative_error(follow(table, noise), reference(scheduler, steps, noise)) < 1e-5


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", ["dpmsolver++", "ddim", "euler"])
def test_other_predictions(name: str, prediction: str) -> None:
    scheduler = scheduler_from_config(name, config_for(name, prediction_type=prediction))
    noise = np.random.default_rng(0).standard_normal((1, 4, 5, 5))
    table = probe_scheduler(scheduler, 5, name=name)
    assert relative_error(follow(table, noise), reference(scheduler, 5, noise)) < 1e-5


def test_one_row_for_each_denoiser_call() -> None:
    def windows(name: str) -> list[tuple[int, int]]:
        table = probe_scheduler(scheduler_from_config(name, config_for(name)), 6, name=name)
        return [(len(step.sample), len(step.output)) for step in table.steps]

    assert windows("euler") == [(1, 1)] * 6
    assert windows("dpmsolver++") == [(1, 1), *[(2, 2)] * 4, (1, 1)]
    # The second call repeats the first step with both outputs; from then on Adams-Bashforth skips its output.
    assert windows("pndm") == [(1, 1), (2, 2), (1, 3), (1, 4), (1, 5), (1, 4), (1, 4)]


def test_ddim_coefficients_are_those_of_the_paper() -> None:
    scheduler = scheduler_from_config("ddim", NOISE)
    table = probe_scheduler(scheduler, 4, name="ddim")
    assert [step.timestep for step in table.steps] == [751, 501, 251, 1]
    alphas = scheduler.alphas_cumprod.double().numpy()
    now, then = alphas[751], alphas[501]
    first = table.steps[0]
    assert first.sample == pytest.approx([np.sqrt(then / now)], rel=1e-6)
    assert first.output == pytest.approx([np.sqrt(1 - then) - np.sqrt(then * (1 - now) / now)], rel=1e-6)


def test_table_survives_json() -> None:
    table = probe_scheduler(scheduler_from_config("pndm", NOISE), 10, name="pndm")
    assert SamplerTable.model_validate_json(table.model_dump_json()) == table


def test_probing_leaves_scheduler_and_random_state_alone() -> None:
    scheduler = scheduler_from_config("euler", NOISE)
    scheduler.set_timesteps(3)
    with torch.random.fork_rng():
        torch.manual_seed(20240229)
        before = torch.get_rng_state()
        probe_scheduler(scheduler, 7, name="euler")
        assert torch.equal(torch.get_rng_state(), before)
    assert len(scheduler.timesteps) == 3


@pytest.mark.parametrize("kind", ["EulerAncestralDiscreteScheduler", "DDPMScheduler", "LCMScheduler"])
def test_noise_is_refused(kind: str) -> None:
    config = {key: value for key, value in NOISE.items() if key != "skip_prk_steps"}
    scheduler = getattr(diffusers, kind).from_config(config)
    with pytest.raises(QlipError, match=f"{kind} draws random noise"):
        probe_scheduler(scheduler, 5, name="x")


def test_stochastic_solver_is_refused() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(NOISE, algorithm_type="sde-dpmsolver++")
    with pytest.raises(QlipError, match="draws random noise"):
        probe_scheduler(scheduler, 5, name="x")


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize(("name", "setting"), [("ddim", "clip_sample"), ("dpmsolver++", "thresholding")])
def test_clipping_is_refused_and_named(name: str, setting: str, steps: int) -> None:
    scheduler = scheduler_from_config(name, config_for(name, **{setting: True}))
    with pytest.raises(QlipError, match=f"not linear .* because of {setting}"):
        probe_scheduler(scheduler, steps, name=name)


def test_a_setting_that_changes_nothing_is_no_reason_to_refuse() -> None:
    """PNDM knows no `clip_sample`, so a configuration that asks for it makes no difference."""
    scheduler = scheduler_from_config("pndm", config_for("pndm", clip_sample=True))
    assert len(probe_scheduler(scheduler, 5, name="pndm").steps) == 6


def test_unlimited_memory_is_refused() -> None:
    """UniPC corrects every sample with the one corrected before."""
    scheduler = diffusers.UniPCMultistepScheduler.from_config(NOISE)
    with pytest.raises(QlipError, match="looks back too far"):
        probe_scheduler(scheduler, 20, name="x")


def test_unknown_signature_is_refused() -> None:
    class Odd:
        config = SimpleNamespace()

        def step(self, sample: Any, sigma: Any) -> None: ...

    with pytest.raises(QlipError, match=r"Odd.step has an unknown signature(.|\n)*step\(sample, sigma\)"):
        probe_scheduler(Odd(), 5, name="x")


class Altered(diffusers.DDIMScheduler):
    """DDIM whose every step goes wrong by a function of its result."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        x = super().step(model_output, timestep, sample, return_dict=False)[0]
        return (self.alter(x),)


class WithOffset(Altered):
    def alter(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.01


class WithCurve(Altered):
    """Linear on everything as small as a unit vector; only larger data show the clipping."""

    def alter(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-15, 15)


@pytest.mark.parametrize("kind", [WithOffset, WithCurve])
def test_hidden_nonlinearity_is_found(kind: type[Altered]) -> None:
    scheduler = kind.from_config({key: value for key, value in NOISE.items() if key != "skip_prk_steps"})
    with pytest.raises(QlipError, match="not linear"):
        probe_scheduler(scheduler, 5, name="x")


def test_unknown_name_lists_the_names() -> None:
    with pytest.raises(QlipError, match=r"dpmsolver.*, ddim, euler, pndm"):
        scheduler_from_config("heun", NOISE)


@pytest.mark.parametrize(("name", "config"), [("ddim", FLOW), ("flow-match-euler", NOISE)])
def test_scheduler_of_the_wrong_kind_is_refused(name: str, config: dict[str, Any]) -> None:
    with pytest.raises(QlipError, match="does not fit this model"):
        scheduler_from_config(name, config)


@pytest.mark.parametrize("steps", [0, -1])
def test_step_count_must_be_positive(steps: int) -> None:
    with pytest.raises(QlipError, match="number of steps is too small"):
        probe_scheduler(scheduler_from_config("ddim", NOISE), steps, name="ddim")


def test_too_many_steps() -> None:
    with pytest.raises(QlipError, match="cannot be set to 5000 steps"):
        probe_scheduler(scheduler_from_config("ddim", NOISE), 5000, name="ddim")
