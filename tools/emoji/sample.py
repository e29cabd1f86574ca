"""Batched sampling with classifier-free guidance, exactly as the shipped scheduler configuration does it."""

from collections.abc import Sequence

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from tools.emoji import augment
from tools.emoji.architecture import scheduler_config
from tools.emoji.export import Networks

STEPS = 25
GUIDANCE = 4.0


@torch.no_grad()
def sample(
    networks: Networks,
    ids: Tensor,
    empty_ids: Tensor,
    guidance: float,
    seed: int,
    batch: int,
    steps: int = STEPS,
) -> Tensor:
    """Generate one image for each row of `ids` (images, 77) and return (images, side, side, 3) uint8 pixels.

    The noise of image k is drawn on the CPU from `seed` + k, whatever the batch size.
    """
    device = ids.device
    config = networks.unet.config
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    empty = networks.text(input_ids=empty_ids.view(1, -1).to(device)).last_hidden_state
    images = []
    for first in range(0, ids.shape[0], batch):
        part = ids[first : first + batch]
        states = networks.text(input_ids=part).last_hidden_state
        both = torch.cat([empty.expand_as(states), states])
        numbers = range(first, first + part.shape[0])
        latents = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed + number)) for number in numbers]
        ).to(device)
        images.append(denoise(networks, latents, both, guidance, steps))
    return torch.cat(images)


def denoise(networks: Networks, latents: Tensor, states: Tensor, guidance: float, steps: int) -> Tensor:
    """Denoise `latents` under `states`, the empty caption's first, and decode them to uint8 pixels."""
    scheduler = DPMSolverMultistepScheduler.from_config(scheduler_config())
    scheduler.set_timesteps(steps, device=latents.device)
    fast = latents.device.type == "cuda"
    with torch.autocast(latents.device.type, torch.float16, enabled=fast):
        for timestep in scheduler.timesteps:
            predicted = networks.unet(torch.cat([latents, latents]), timestep, states, return_dict=False)[
                0
            ].float()
            free, guided = predicted.chunk(2)
            latents = scheduler.step(free + guidance * (guided - free), timestep, latents, return_dict=False)[
                0
            ]
        return augment.to_pixels(networks.vae.decode(latents).sample)


def grid(rows: Sequence[Tensor]) -> Tensor:
    """Lay rows of (columns, side, side, 3) uint8 images out as one (height, width, 3) picture."""
    return torch.cat([torch.cat(list(row), dim=1) for row in rows], dim=0)
