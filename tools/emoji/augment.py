"""Random changes to batches of images on the GPU, each drawn from the generator of the training step."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Draw `count` numbers evenly between `low` and `high`, on the generator's device."""
    return torch.rand(count, generator=generator, device=generator.device) * (high - low) + low


def to_unit(pixels: Tensor) -> Tensor:
    """Turn (batch, side, side, 3) uint8 pixels into (batch, 3, side, side) FP32 in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Turn (batch, 3, side, side) images in [-1, 1] back into (batch, side, side, 3) uint8 pixels."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def move(images: Tensor, generator: torch.Generator, zoom: float, shift: float) -> Tensor:
    """Zoom by up to 1 +- `zoom` and shift by up to `shift` (a fraction of the side), white coming in."""
    count = images.shape[0]
    scale = 1 / uniform(count, 1 - zoom, 1 + zoom, generator)
    theta = torch.zeros(count, 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = uniform(2 * count, -2 * shift, 2 * shift, generator).view(count, 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # Outside the image grid_sample reads 0: white, once white is moved to 0.
    return F.grid_sample(images - 1, grid, mode="bilinear", align_corners=False) + 1


def soften(images: Tensor, generator: torch.Generator, noise: float) -> Tensor:
    """Blur each image by a random amount and add noise of a random deviation up to `noise`."""
    count = images.shape[0]
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    weight = uniform(count, -1, 1, generator).clamp(min=0).view(-1, 1, 1, 1)
    grain = torch.randn(images.shape, generator=generator, device=images.device)
    deviation = uniform(count, -noise, noise, generator).clamp(min=0).view(-1, 1, 1, 1)
    return torch.lerp(images, blurred, weight) + deviation * grain


def turn(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror and transpose each image at random: all eight ways a square can lie."""
    for change in (lambda x: x.flip(3), lambda x: x.flip(2), lambda x: x.transpose(2, 3)):
        chosen = uniform(images.shape[0], 0, 1, generator).view(-1, 1, 1, 1) < 0.5
        images = torch.where(chosen, change(images), images)
    return images


def recolor(images: Tensor, generator: torch.Generator, share: float) -> Tensor:
    """In a `share` of the images, swap the colour channels at random and scale each one."""
    count = images.shape[0]
    order = torch.rand(count, 3, generator=generator, device=images.device).argsort(1)
    swapped = images.gather(1, order[:, :, None, None].expand_as(images))
    gain = uniform(3 * count, 0.6, 1.0, generator).view(count, 3, 1, 1)
    changed = (swapped - 1) * gain + 1
    chosen = uniform(count, 0, 1, generator).view(-1, 1, 1, 1) < share
    return torch.where(chosen, changed, images)
