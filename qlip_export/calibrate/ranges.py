"""Activation ranges: run the full-precision model on prompts and measure what its layers see."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from qlip_export.capture import denoiser_family, shapes_of
from qlip_export.checkpoint import Checkpoint
from qlip_export.pipelines import pipeline_of
from qlip_export.quant.layers import layers_of
from qlip_export.quant.ranges import BINS, MagnitudeHistogram, Ranges, Recipe
from qlip_export.torch_pipeline import draw, load_pipeline, require_device, use_scheduler

SAMPLES = 32_768
"""Activations of one call that go into a layer's histogram; the maximum is taken over all of them."""


def hash_of(prompts: Sequence[str]) -> str:
    """Return the SHA-256 of a list of prompts, one a line."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def measure_ranges(
    checkpoint: Checkpoint,
    prompts: list[str],
    *,
    steps: int = 25,
    scheduler: str | None = None,
    guidance: float | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    device: str = "cpu",
    on_step: Callable[[], None] = lambda: None,
) -> Ranges:
    """Measure the input range of every quantized layer over whole sampling runs.

    Every prompt is sampled once, guided as the model is, and all timesteps count.

    Args:
        checkpoint: The full-precision model.
        prompts: One run each.
        steps: Sampling steps of a run.
        scheduler: Name of the scheduler; the family's own if absent.
        guidance: Guidance scale; the family's own if absent.
        seed: Seed of the first run's noise.
        height: Of the images, pixels; the model's own if absent.
        width: The same.
        device: ``cpu`` or ``cuda``.
        on_step: Called after each denoiser step, ``len(prompts) * steps`` times or a few more (PNDM).

    Raises:
        QlipError: An activation is not finite, or there is no such device here.
    """
    require_device(device)
    family = denoiser_family(checkpoint)
    kind = pipeline_of(family.name)
    scheduler = scheduler or kind.scheduler
    guidance = kind.guidance(checkpoint.index).scale if guidance is None else guidance
    size = shapes_of(checkpoint, batch_size=1, height=height, width=width).size
    pipeline = load_pipeline(checkpoint).to(device)
    use_scheduler(pipeline, scheduler)
    denoiser = getattr(pipeline, family.denoiser_folder)
    histograms: dict[str, MagnitudeHistogram] = {}
    handles = []
    for name, module in layers_of(denoiser).items():
        if family.quantizes(name):
            histograms[name] = MagnitudeHistogram()
            handles.append(module.register_forward_pre_hook(_observer(histograms[name])))
    try:
        for index, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(seed + index)
            draw(
                pipeline,
                prompt,
                latents_size=size.latents,
                steps=steps,
                guidance=guidance,
                generator=generator,
                output_type="latent",
                on_step=on_step,
            )
    finally:
        for handle in handles:
            handle.remove()
    recipe = Recipe(
        prompts_sha256=hash_of(prompts),
        prompts=len(prompts),
        steps=steps,
        scheduler=scheduler,
        guidance=guidance,
        seed=seed,
        size=None if height is width is None else size.image,
        random_weights=checkpoint.random_seed,
    )
    return Ranges(
        fingerprint=checkpoint.component(family.denoiser_folder).fingerprint,
        recipe=recipe,
        layers={name: histogram.range() for name, histogram in histograms.items()},
    )


def _observer(histogram: MagnitudeHistogram) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
    def observe(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        magnitudes = args[0].detach().abs().float().flatten()
        histogram.prepare(float(magnitudes.max()))
        if histogram.width:
            sampled = magnitudes[:: max(1, magnitudes.numel() // SAMPLES)]
            counts = torch.histc(sampled, bins=BINS, min=0, max=histogram.width)
            histogram.add(counts.cpu().numpy().astype(np.float64))

    return observe
