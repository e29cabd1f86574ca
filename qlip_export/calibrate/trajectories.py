"""Sampling runs of the full-precision model, kept for training: what the denoiser saw and what it said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlip_export.noise import seeded_noise
from qlip_export.simulate import Simulator, paired


@dataclass(frozen=True)
class Trajectories:
    """Guided runs over P prompts and S denoiser calls.

    Attributes:
        inputs: (P, S, C, H, W) float16, the denoiser's inputs.
        predictions: (P, S, C, H, W) float16, the guided full-precision predictions.
        timesteps: (S,) float32.
        states: (P, ...) float16, what the denoiser is given of the prompts.
        empty: (1, ...) float16, the same of no prompt; ``None`` where guidance is not classifier-free.
        guidance: Guidance scale.
    """

    inputs: Tensor
    predictions: Tensor
    timesteps: Tensor
    states: Tensor
    empty: Tensor | None
    guidance: float

    def both_states(self, prompts: Tensor) -> Tensor:
        """Return the states of prompts for a guided prediction, see `paired`."""
        return paired(self.empty, self.states[prompts])


def record(
    simulator: Simulator,
    prompts: Sequence[str],
    *,
    guidance: float,
    seed: int,
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> Trajectories:
    """Sample every prompt once at full precision and keep all steps.

    Args:
        simulator: With the full-precision weights.
        prompts: One run each.
        guidance: Guidance scale.
        seed: Of the initial noise; prompt i uses ``seed + i``.
        batch_size: Prompts at a time.
        on_batch: Called after each batch.
    """
    encoded, empty = simulator.encode(prompts), simulator.empty
    kept: list[Tensor] = []
    timesteps: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        part = slice(start, start + batch_size)
        states = encoded.states[part]
        noise = torch.from_numpy(
            np.stack([seeded_noise(seed + start + i, simulator.latents_shape) for i in range(len(states))])
        )

        def keep(
            x: Tensor, timestep: Tensor, prediction: Tensor, seen: list[tuple[Tensor, ...]] = seen
        ) -> None:
            seen.append((x.half(), timestep.float(), prediction.half()))

        simulator.sample(paired(empty, states), noise, guidance, on_step=keep)
        # Inputs and predictions of all prompts have their place from the first batch on.
        found = [torch.stack([run[which] for run in seen], 1) for which in (0, 2)]
        kept = kept or [steps.new_empty(len(prompts), *steps.shape[1:]) for steps in found]
        for whole, steps in zip(kept, found, strict=True):
            whole[part] = steps
        timesteps = [t for _, t, _ in seen]
        on_batch()
    return Trajectories(
        inputs=kept[0],
        predictions=kept[1],
        timesteps=torch.stack(timesteps),
        states=encoded.states.half(),
        empty=None if empty is None else empty.half(),
        guidance=guidance,
    )
