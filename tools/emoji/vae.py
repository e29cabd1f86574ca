"""The autoencoder stage: reconstruction with a weak prior, then latents of zero mean and unit variance."""

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKL
from torch import Tensor, nn

from tools.emoji import augment
from tools.emoji.architecture import Sizes, build_vae
from tools.emoji.loop import Draw
from tools.emoji.pool import Pool, pick

KL_WEIGHT = 3e-4
ABSOLUTE_WEIGHT = 0.25
EDGE_WEIGHT = 0.25


class Reconstruct(nn.Module):
    """The autoencoder; returns the loss of a batch for given posterior noise."""

    def __init__(self, sizes: Sizes) -> None:
        """Build the autoencoder with random weights."""
        super().__init__()
        self.vae = build_vae(sizes)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return the error of the pixels and of their edges plus the weighted KL divergence."""
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise
        error = self.vae.decode(latents).sample.float() - images
        edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (
            error[..., 1:, :] - error[..., :-1, :]
        ).abs().mean()
        mean, variance = posterior.mean.float(), posterior.var.float()
        divergence = 0.5 * (mean.square() + variance - 1 - posterior.logvar.float()).mean()
        return (
            error.square().mean()
            + ABSOLUTE_WEIGHT * error.abs().mean()
            + EDGE_WEIGHT * edges
            + KL_WEIGHT * divergence
        )


def make_draw(pool: Pool, batch: int, sizes: Sizes) -> Draw:
    """Return the function that draws a batch of augmented images and the posterior noise."""

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        images = augment.to_unit(pool.pixels[pick(len(pool), batch, generator)])
        # Any picture may be reconstructed, so the strongest changes help: 6,000 emoji are few.
        images = augment.turn(images, generator)
        images = augment.recolor(images, generator, share=0.4)
        images = augment.move(images, generator, zoom=0.25, shift=0.1)
        shape = (batch, sizes.latent_channels, sizes.latent, sizes.latent)
        images = images.contiguous(memory_format=torch.channels_last)
        return images, torch.randn(shape, generator=generator, device=generator.device)

    return draw


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Encode (images, side, side, 3) uint8 pixels; return the posterior means and deviations in FP32."""
    means, deviations = [], []
    for part in pixels.split(batch):
        posterior = vae.encode(augment.to_unit(part)).latent_dist
        means.append(posterior.mean)
        deviations.append(posterior.std)
    return torch.cat(means), torch.cat(deviations)


@torch.no_grad()
def fold_scale(vae: AutoencoderKL, mean: Tensor, deviation: Tensor) -> None:
    """Make `vae` encode to (latents - mean) / deviation and decode from it; both are one number a channel.

    Stable Diffusion's pipeline knows one scaling factor and no shift; the 1x1 convolutions next to the
    latents can hold both, channel by channel.
    """
    channels = mean.numel()
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    before.bias[:channels] = (before.bias[:channels] - mean) / deviation
    before.bias[channels:] -= 2 * deviation.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= deviation.view(1, -1, 1, 1)


def standardize(vae: AutoencoderKL, pixels: Tensor, batch: int) -> None:
    """Fold the channel means and deviations of the latents of `pixels` into `vae`."""
    means, _ = encode(vae, pixels, batch)
    fold_scale(vae, means.mean((0, 2, 3)), means.std((0, 2, 3)))


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pixels: Tensor, batch: int) -> Tensor:
    """Return the PSNR in dB of each reconstruction, both sides rounded to 8 bits, as (images,) FP32."""
    found = []
    for part in pixels.split(batch):
        restored = augment.to_pixels(vae.decode(vae.encode(augment.to_unit(part)).latent_dist.mode()).sample)
        error = F.mse_loss(restored.float() / 255, part.float() / 255, reduction="none").mean((1, 2, 3))
        found.append(-10 * error.clamp(min=1e-10).log10())
    return torch.cat(found)
