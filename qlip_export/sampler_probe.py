"""Reduce a diffusers scheduler to a table of coefficients by driving it with basis vectors.

A deterministic scheduler step is linear in the samples and model outputs it has been given so far. So the
probe feeds unit vectors: sample i is basis vector i and model output i is basis vector n + i, and what the
scheduler returns at step i spells out, coordinate by coordinate, the coefficients of that step. Feeding fresh
unit vectors instead of the scheduler's own results keeps the coefficients exact (several schedulers round the
sample to float32) and unique. Random data then show whether the table reproduces the scheduler.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from qlip_export.errors import QlipError
from qlip_export.spec import SamplerStep, SamplerTable

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

SCHEDULERS: dict[str, str] = {
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "flow-match-euler": "FlowMatchEulerDiscreteScheduler",
}
"""Names on the command line and the diffusers classes they stand for."""

SETTINGS: dict[str, dict[str, Any]] = {
    "dpmsolver++": {"algorithm_type": "dpmsolver++", "solver_order": 2},
    "pndm": {"skip_prk_steps": True},
}
"""What a name fixes in the scheduler's configuration; all else comes from the model."""

MAX_WINDOW = 8
"""How many samples and outputs a step may look back on; PNDM, the longest of the table, needs 5 outputs."""

# Coefficients are float32 numbers inside the schedulers, so what lies below this share of the largest one is
# the rounding of terms that cancel.
NEGLIGIBLE = 1e-7
# A table that reproduces a scheduler is off by float32 rounding, 1e-7 to 1e-6. Clipping and thresholding
# change random data by more than a hundredth.
TOLERANCE = 1e-5
MAGNITUDES = (0.1, 1.0, 10.0)

Array = NDArray[np.float64]
Feed = Callable[[int, Array], Array]


def scheduler_from_config(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """Build the scheduler ``name`` from a model's own ``scheduler_config.json``.

    Args:
        name: A key of `SCHEDULERS`.
        config: The model's scheduler configuration, of whatever class: betas, prediction type and the like
            carry over as in ``Cls.from_config(pipe.scheduler.config)``.

    Raises:
        QlipError: The name is unknown, or the scheduler integrates another kind of model than the
            configuration describes (flow matching against noise prediction).
    """
    if name not in SCHEDULERS:
        raise QlipError(
            "unknown scheduler", expected=", ".join(SCHEDULERS), found=name, fix="choose one of these names"
        )
    own = str(config.get("_class_name", "no class name"))
    is_flow = own.startswith("FlowMatch")
    if is_flow != SCHEDULERS[name].startswith("FlowMatch"):
        raise QlipError(
            f"scheduler {name!r} does not fit this model",
            expected="a flow-matching scheduler" if is_flow else "a scheduler for noise-predicting models",
            found=f"{SCHEDULERS[name]} for a model that comes with {own}",
            fix="choose flow-match-euler" if is_flow else "choose dpmsolver++, ddim, euler or pndm",
        )
    import diffusers

    scheduler_class = getattr(diffusers, SCHEDULERS[name])
    return scheduler_class.from_config(dict(config), **SETTINGS.get(name, {}))


def probe_scheduler(
    scheduler: SchedulerMixin, steps: int, *, name: str, timesteps: Mapping[str, Any] | None = None
) -> SamplerTable:
    """Return the table that reproduces ``scheduler`` at ``steps`` inference steps.

    The scheduler itself is left untouched; copies made from its configuration are driven. The table has one
    row for each denoiser call, ``len(scheduler.timesteps)``, which for PNDM is one more than ``steps``.

    Args:
        scheduler: Any diffusers scheduler whose ``step`` is deterministic and linear.
        steps: Inference steps.
        name: What the table is called in manifests and on the command line.
        timesteps: Arguments of ``set_timesteps`` where these are more than the steps, e.g. sigmas and shift.

    Raises:
        QlipError: The scheduler has an unknown interface, draws noise, is not linear (thresholding, sample
            clipping), or looks back on more than `MAX_WINDOW` samples or outputs.
    """
    if steps < 1:
        raise QlipError("the number of steps is too small", expected="1 or more", found=str(steps))
    _check_interface(scheduler)
    arguments = {"num_inference_steps": steps} if timesteps is None else timesteps
    fresh, times, init_scale = _prepare(scheduler, arguments)
    calls = len(times)

    def unit_sample(i: int, _: Array) -> Array:
        return _unit(i, 2 * calls)

    def unit_output(i: int) -> Array:
        return _unit(calls + i, 2 * calls)

    scales, rows = _drive(fresh, unit_sample, unit_output, seed=0)
    _, again = _drive(_prepare(scheduler, arguments)[0], unit_sample, unit_output, seed=1)
    if not np.array_equal(rows, again):
        raise QlipError(
            f"{type(scheduler).__name__} draws random noise at every step",
            expected="a deterministic scheduler",
            found="two runs with the same inputs differ",
            fix=f"choose one of {', '.join(SCHEDULERS)}",
        )
    table = SamplerTable(
        scheduler=name,
        scheduler_class=type(scheduler).__name__,
        init_scale=init_scale,
        requested_steps=steps,
        steps=tuple(
            SamplerStep(
                timestep=times[i],
                input_scale=scales[i],
                sample=_window(scheduler, rows[i], rows[i, :calls], i),
                output=_window(scheduler, rows[i], rows[i, calls:], i),
            )
            for i in range(calls)
        ),
    )
    for seed, magnitude in enumerate(MAGNITUDES):
        _verify(scheduler, arguments, table, magnitude, seed)
    return table


def _check_interface(scheduler: SchedulerMixin) -> None:
    parameters = list(inspect.signature(scheduler.step).parameters.values())
    names = [parameter.name for parameter in parameters]
    required = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    wanted = ["model_output", "timestep", "sample"]
    if names[:3] != wanted or required != wanted:
        raise QlipError(
            f"{type(scheduler).__name__}.step has an unknown signature",
            expected=f"step({', '.join(wanted)}, ...) with defaults for the rest",
            found=f"step({', '.join(names)}), of which {', '.join(required)} are required",
            fix=f"choose one of {', '.join(SCHEDULERS)}",
        )


def _prepare(
    scheduler: SchedulerMixin, timesteps: Mapping[str, Any]
) -> tuple[SchedulerMixin, list[float], float]:
    """Return a fresh copy with its timesteps set, these, and the scale of the first sample."""
    fresh = type(scheduler).from_config(scheduler.config)
    try:
        fresh.set_timesteps(**timesteps, device="cpu")
    except (ValueError, TypeError, IndexError) as error:
        steps = timesteps.get("num_inference_steps") or len(timesteps["sigmas"])
        raise QlipError(
            f"{type(scheduler).__name__} cannot be set to {steps} steps",
            found=str(error),
            fix="choose another number of steps or another scheduler",
        ) from error
    # Flow-matching schedulers have no such scale: their pipelines start from the noise as it is.
    return fresh, [float(t) for t in fresh.timesteps], float(getattr(fresh, "init_noise_sigma", 1.0))


def _drive(
    fresh: SchedulerMixin, sample_of: Feed, output_of: Callable[[int], Array], seed: int
) -> tuple[list[float], Array]:
    """Run all steps of a prepared scheduler the way a pipeline does, on arrays of shape (n,).

    ``sample_of(i, x)`` is the sample given to step i; ``x`` is what step i-1 returned, zeros for i = 0.
    Returns the scale of the denoiser's input at every step and what every step returned, float64 (calls, n).
    """
    result = np.zeros_like(output_of(0))
    scales, rows = [], []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for i, t in enumerate(fresh.timesteps):
            sample = torch.from_numpy(sample_of(i, result)).reshape(1, 1, 1, -1)
            scaled = fresh.scale_model_input(sample, t) if hasattr(fresh, "scale_model_input") else sample
            scales.append(_ratio(fresh, scaled.double().numpy().ravel(), sample.numpy().ravel()))
            output = torch.from_numpy(output_of(i).copy()).reshape(1, 1, 1, -1)
            result = fresh.step(output, t, sample, return_dict=False)[0].double().numpy().ravel()
            rows.append(result)
    return scales, np.stack(rows)


def _unit(index: int, size: int) -> Array:
    vector = np.zeros(size)
    vector[index] = 1.0
    return vector


def _ratio(scheduler: SchedulerMixin, scaled: Array, sample: Array) -> float:
    scale = float(scaled @ sample / (sample @ sample))
    if np.abs(scaled - scale * sample).max() > TOLERANCE * np.abs(scaled).max():
        raise _not_linear(scheduler, "scale_model_input is not a multiplication")
    return scale


def _window(scheduler: SchedulerMixin, row: Array, part: Array, step: int) -> tuple[float, ...]:
    """Return the coefficients of this step's sample (or output), the one before, ... as far as any counts."""
    if not np.isfinite(row).all():
        raise _not_linear(scheduler, f"step {step} returns NaN or infinity for a unit vector")
    recent = part[step::-1]
    counts = np.abs(recent) > NEGLIGIBLE * np.abs(row).max()
    length = int(np.flatnonzero(counts).max(initial=0)) + 1
    if length > MAX_WINDOW:
        raise QlipError(
            f"{type(scheduler).__name__} looks back too far",
            expected=f"steps that depend on at most {MAX_WINDOW} samples and outputs",
            found=f"step {step} depends on the last {length}",
            fix=f"choose one of {', '.join(SCHEDULERS)}",
        )
    return tuple(float(value) if used else 0.0 for value, used in zip(recent, counts, strict=True))[:length]


def _verify(
    scheduler: SchedulerMixin, timesteps: Mapping[str, Any], table: SamplerTable, magnitude: float, seed: int
) -> None:
    """Compare the table with the scheduler on random data, in float64, at every step."""
    random = np.random.default_rng(seed)
    noise = magnitude * random.standard_normal(64)
    outputs = magnitude * random.standard_normal((len(table.steps), 64))
    fresh, _, _ = _prepare(scheduler, timesteps)
    start = noise * table.init_scale
    _, expected = _drive(fresh, lambda i, x: x if i else start, lambda i: outputs[i], seed)
    samples = [start]
    for i, step in enumerate(table.steps):
        x = sum(c * samples[i - j] for j, c in enumerate(step.sample))
        x = x + sum(c * outputs[i - j] for j, c in enumerate(step.output))
        samples.append(np.asarray(x))
        # Cancellation between large terms is the scheduler's own; measure against what went into the sum.
        size = max(np.abs(expected[i]).max(), np.abs(samples[i]).max(), magnitude)
        error = float(np.abs(samples[-1] - expected[i]).max() / size)
        if not error <= TOLERANCE:
            raise _not_linear(
                scheduler,
                f"random data of size {magnitude:g} differ by {error:.1e} at step {i} of {len(table.steps)}",
            )


def _not_linear(scheduler: SchedulerMixin, found: str) -> QlipError:
    """Name the likely cause from the configuration; whether there is a problem was found by trying."""
    causes = [key for key in ("thresholding", "clip_sample") if scheduler.config.get(key)]
    return QlipError(
        f"{type(scheduler).__name__} is not linear in samples and model outputs"
        + (f" because of {' and '.join(causes)}" if causes else ""),
        expected="steps that are linear combinations of samples and outputs",
        found=found,
        fix=f"set {' and '.join(causes)} to false in scheduler_config.json if the model allows it"
        if causes
        else f"choose one of {', '.join(SCHEDULERS)}",
    )
