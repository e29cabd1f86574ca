"""Sampling without a scheduler: multiply-adds with the coefficients of a `SamplerTable`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from qlip_export.errors import NotFiniteError, QlipError
from qlip_export.spec import SamplerStep, SamplerTable

Latents = NDArray[np.float32]


class Sampler:
    """One pass through a sampler table, in float32.

    Attributes:
        table: The coefficients.
        index: The step that comes next, 0 to ``len(table.steps)``.
    """

    def __init__(self, table: SamplerTable) -> None:
        """Allocate nothing yet; ``start`` decides the shape."""
        self.table = table
        self.index = 0
        # Most recent first, as long as the widest step looks back.
        self._samples: deque[Latents] = deque(maxlen=max(len(step.sample) for step in table.steps))
        self._outputs: deque[Latents] = deque(maxlen=max(len(step.output) for step in table.steps))

    def start(self, noise: NDArray[np.floating]) -> None:
        """Begin anew from unit-variance ``noise`` of any shape; it is copied."""
        self.index = 0
        self._samples.clear()
        self._outputs.clear()
        self._samples.appendleft(np.float32(self.table.init_scale) * noise.astype(np.float32))

    @property
    def latents(self) -> Latents:
        """The current sample, float32, in the shape of the noise; not to be written to."""
        if not self._samples:
            raise RuntimeError("Sampler.start has not been called")
        return self._samples[0]

    @property
    def done(self) -> bool:
        """Whether the last step has been taken."""
        return self.index == len(self.table.steps)

    @property
    def timestep(self) -> float:
        """What the denoiser is told about the time of the next step."""
        return self.table.steps[self.index].timestep

    def foreseen(self) -> Latents:
        """Return what ``latents`` would be after the last step if the denoiser went on to say the same.

        For models that predict noise, and velocity in flow matching, this is the clean image predicted from
        the current step (exactly so where a step looks back at nothing before it), without knowing
        more of the scheduler than the table. No denoiser runs.
        """
        ahead = Sampler(self.table)
        ahead._samples, ahead._outputs = self._samples.copy(), self._outputs.copy()
        for row in self.table.steps[self.index :]:
            ahead._take(row, self._outputs[0])
        return ahead.latents

    def denoiser_input(self) -> Latents:
        """Return the current sample as the denoiser wants it at the next step, float32."""
        scale = self.table.steps[self.index].input_scale
        return self.latents if scale == 1.0 else np.float32(scale) * self.latents

    def step(self, model_output: NDArray[np.floating]) -> None:
        """Take one step.

        Args:
            model_output: The denoiser's (guided) output at ``timestep``, in the shape of the latents. Its
                dtype may be any float; it is copied as float32.

        Raises:
            QlipError: The output's shape is not that of the latents, or it holds NaN or infinity.
            RuntimeError: All steps have been taken.
        """
        if self.done:
            raise RuntimeError(f"all {len(self.table.steps)} steps have been taken")
        output = model_output.astype(np.float32)
        if output.shape != self.latents.shape:
            raise QlipError(
                "the denoiser's output does not have the shape of the latents",
                expected=str(self.latents.shape),
                found=str(output.shape),
            )
        if not np.isfinite(output).all():
            raise NotFiniteError(
                f"the denoiser's output is not finite at step {self.index} (timestep {self.timestep:g})",
                expected="finite numbers",
                found=f"{np.count_nonzero(~np.isfinite(output))} NaN or infinite values of {output.size}",
                fix="run with 32-bit activations to see whether a narrower variant overflows",
            )
        self._take(self.table.steps[self.index], output)
        self.index += 1

    def _take(self, row: SamplerStep, output: Latents) -> None:
        self._outputs.appendleft(output)
        total = np.zeros_like(output)
        _accumulate(total, row.sample, self._samples)
        _accumulate(total, row.output, self._outputs)
        self._samples.appendleft(total)


def _accumulate(total: Latents, coefficients: Iterable[float], values: Iterable[Latents]) -> None:
    for coefficient, value in zip(coefficients, values, strict=False):
        if coefficient != 0.0:
            total += np.float32(coefficient) * value


def guided(
    noise_uncond: NDArray[np.floating], noise_cond: NDArray[np.floating], guidance: float
) -> NDArray[np.float32]:
    """Return ``uncond + guidance * (cond - uncond)`` in float32 (Ho & Salimans 2022, equation 6)."""
    uncond: Latents = noise_uncond.astype(np.float32)
    cond: Latents = noise_cond.astype(np.float32)
    scaled: Latents = np.float32(guidance) * (cond - uncond)
    return uncond + scaled
