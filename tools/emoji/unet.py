"""The denoising stage: noise prediction on latents and text states computed once, weighted by min-SNR-5.

The weight min(SNR, 5) / SNR is https://arxiv.org/abs/2303.09556, equation 4 for predicted noise.
"""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from tools.emoji.architecture import Sizes, build_unet, scheduler_config
from tools.emoji.loop import Draw
from tools.emoji.pool import Pool, pick
from tools.emoji.vae import encode

EMPTY_SHARE = 0.1
SNR_CEILING = 5.0


@dataclass(frozen=True)
class Conditioned:
    """The training set of the denoiser, on the device.

    `mean` and `deviation` are (images, 4, latent, latent) FP32; `states` (images, captions, 77, width), BF16
    on a GPU; `empty` (77, width), those of the empty caption; `signal` (1000,) FP32, alpha-bar.
    """

    mean: Tensor
    deviation: Tensor
    states: Tensor
    empty: Tensor
    signal: Tensor


class Denoise(nn.Module):
    """The denoiser; returns the weighted error of the predicted noise."""

    def __init__(self, sizes: Sizes) -> None:
        """Build the denoiser with random weights."""
        super().__init__()
        self.unet = build_unet(sizes)

    def forward(
        self, noisy: Tensor, noise: Tensor, timesteps: Tensor, states: Tensor, weight: Tensor
    ) -> Tensor:
        """Return the mean over the batch of `weight` (batch,) times the squared error."""
        predicted = self.unet(noisy, timesteps, states, return_dict=False)[0].float()
        return ((predicted - noise).square().mean((1, 2, 3)) * weight).mean()


@torch.no_grad()
def text_states(text: CLIPTextModelWithProjection, ids: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """Return the (captions, 77, width) states of (captions, 77) token ids, rounded to `dtype`."""
    return torch.cat([text(input_ids=part.long()).last_hidden_state.to(dtype) for part in ids.split(batch)])


def condition(
    pool: Pool, vae: AutoencoderKL, text: CLIPTextModelWithProjection, empty_ids: Tensor, batch: int
) -> Conditioned:
    """Encode every image and every caption of `pool` once."""
    device = pool.pixels.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    mean, deviation = encode(vae, pool.pixels, batch)
    flat = text_states(text, pool.ids.flatten(0, 1), 4 * batch, dtype)
    empty = text_states(text, empty_ids.view(1, -1).to(device), 1, dtype)[0]
    signal = DDPMScheduler.from_config(scheduler_config()).alphas_cumprod.to(device)
    return Conditioned(mean, deviation, flat.view(*pool.ids.shape, -1), empty, signal)


def spread_timesteps(count: int, total: int, generator: torch.Generator) -> Tensor:
    """Draw `count` timesteps below `total`, one from each of `count` equal parts: less noise in the loss."""
    places = torch.arange(count, device=generator.device)
    offset = torch.rand(count, generator=generator, device=generator.device)
    return ((places + offset) / count * total).long().clamp(max=total - 1)


def make_draw(data: Conditioned, batch: int) -> Draw:
    """Return the function that draws noisy latents, their noise, timesteps, text states and loss weights."""

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        device = generator.device
        chosen = pick(data.mean.shape[0], batch, generator)
        which = torch.randint(data.states.shape[1], (batch,), generator=generator, device=device)
        shape = (batch, *data.mean.shape[1:])
        latents = data.mean[chosen] + data.deviation[chosen] * torch.randn(
            shape, generator=generator, device=device
        )
        noise = torch.randn(shape, generator=generator, device=device)
        timesteps = spread_timesteps(batch, data.signal.numel(), generator)
        signal = data.signal[timesteps]
        level = signal.view(-1, 1, 1, 1)
        noisy = (level.sqrt() * latents + (1 - level).sqrt() * noise).contiguous(
            memory_format=torch.channels_last
        )
        ratio = signal / (1 - signal)
        weight = ratio.clamp(max=SNR_CEILING) / ratio
        empty = torch.rand(batch, generator=generator, device=device) < EMPTY_SHARE
        states = torch.where(empty.view(-1, 1, 1), data.empty, data.states[chosen, which])
        return noisy, noise, timesteps, states, weight

    return draw
