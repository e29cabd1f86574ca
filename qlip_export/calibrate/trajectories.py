"""Sampling runs of the full-precision model, kept for training: what the denoiser saw and what it said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlip_export.calibrate.batching import Stack, slices
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
    inputs, predictions = Stack(len(prompts)), Stack(len(prompts))
    timesteps: list[Tensor] = []
    for part in slices(len(prompts), batch_size):
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        states = encoded.states[part]
        seeds = range(seed + part.start, seed + part.stop)
        noise = torch.from_numpy(np.stack([seeded_noise(own, simulator.latents_shape) for own in seeds]))

        def keep(
            x: Tensor, timestep: Tensor, prediction: Tensor, seen: list[tuple[Tensor, ...]] = seen
        ) -> None:
            seen.append((x.half(), timestep.float(), prediction.half()))

        simulator.sample(paired(empty, states), noise, guidance, on_step=keep)
        inputs.add(torch.stack([x for x, _, _ in seen], 1))
        predictions.add(torch.stack([p for _, _, p in seen], 1))
        timesteps = [t for _, t, _ in seen]
        on_batch()
    return Trajectories(
        inputs=inputs.values,
        predictions=predictions.values,
        timesteps=torch.stack(timesteps),
        states=encoded.states.half(),
        empty=None if empty is None else empty.half(),
        guidance=guidance,
    )
