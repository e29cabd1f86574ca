"""The diffusers pipeline of a checkpoint: loaded in silence, with another scheduler or other weights."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlip_export.checkpoint import Checkpoint, Component
from qlip_export.errors import QlipError
from qlip_export.families import Family, family_of
from qlip_export.pipelines import pipeline_of
from qlip_export.random_weights import random_pipeline
from qlip_export.sampler_probe import scheduler_from_config


def require_device(device: str) -> None:
    """Refuse a GPU where there is none.

    Raises:
        QlipError: There is none.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise QlipError("there is no CUDA device here", expected="cpu", found=device, fix="--device cpu")


def load_pipeline(checkpoint: Checkpoint) -> Any:
    """Return the diffusers pipeline of a checkpoint in FP32 on the CPU, silent and without safety checker."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    without = {}
    if "safety_checker" in checkpoint.index:
        without = {"safety_checker": None, "requires_safety_checker": False}
    # A text encoder's file may hold its projection too; that it goes unused here is no news.
    with quiet_loading(), warnings.catch_warnings():
        # Newer versions call it `dtype`, which older ones would silently ignore.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        if checkpoint.random_seed is not None:
            pipeline = random_pipeline(checkpoint)
        else:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                checkpoint.folder,
                torch_dtype=torch.float32,
                local_files_only=True,
                **without,
            )
            for name in checkpoint:
                component = checkpoint.component(name)
                if component.changed:
                    _change_weights(getattr(pipeline, name), component)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from telling of parameters that are not read, and of how far it has loaded."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def family_of_pipeline(pipeline: Any) -> Family:
    """Return the family of a diffusers pipeline's denoiser.

    Raises:
        QlipError: No family knows it.
    """
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    # What stands in for a denoiser has its config, which names the class.
    name = denoiser.config.get("_class_name", type(denoiser).__name__)
    return family_of(name, denoiser.config)


def draw(
    pipeline: Any,
    prompt: str,
    *,
    latents_size: tuple[int, int],
    steps: int,
    guidance: float,
    latents: NDArray[np.float32] | None = None,
    negative_prompt: str | None = None,
    on_step: Callable[[], None] = lambda: None,
    **more: Any,
) -> Any:
    """Call a diffusers pipeline for one image and return what it made.

    Args:
        pipeline: As `load_pipeline` returns it.
        prompt: The prompt.
        latents_size: Height and width of the latents.
        steps: Inference steps.
        guidance: Guidance scale.
        latents: (1, C, H, W) of unit variance instead of a generator among ``more``.
        negative_prompt: Left to the pipeline if absent.
        on_step: Called after each denoiser step, ``steps`` times or a few more (PNDM).
        **more: Further arguments of the pipeline.
    """
    family = family_of_pipeline(pipeline)
    kind = pipeline_of(family.name)
    if latents is not None:
        more["latents"] = torch.from_numpy(kind.pack(latents))
    if negative_prompt is not None:
        more["negative_prompt"] = negative_prompt
    if kind.longest_text is not None:
        more[kind.longest_text] = family.dimensions["text_length"]
    height, width = (side * pipeline.vae_scale_factor for side in latents_size)

    def step_ended(*_: Any) -> dict[str, Any]:
        on_step()
        return {}

    with torch.inference_mode():
        return pipeline(
            prompt,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            callback_on_step_end=step_ended,
            **more,
        )


def use_scheduler(pipeline: Any, name: str) -> None:
    """Give a pipeline the scheduler called ``name``, with the settings of its own."""
    pipeline.scheduler = scheduler_from_config(name, dict(pipeline.scheduler.config))


def _change_weights(module: nn.Module, component: Component) -> None:
    """Give a module the parameters that differ from those of its folder."""
    parameters = dict(module.named_parameters())
    for stored in component.changed:
        name = next(
            n for n in parameters if stored == n or stored.endswith(f".{n}") or n.endswith(f".{stored}")
        )
        parameters[name].data.copy_(torch.from_numpy(component.get(stored)))


def replace_weights(module: nn.Module, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """Replace parameters of a module, by name."""
    parameters = dict(module.named_parameters())
    for name, weight in weights.items():
        parameters[name].data.copy_(torch.from_numpy(weight))


def token_ids(
    tokenizer: Any, prompts: Sequence[str], batch_size: int, length: int | None = None
) -> Iterator[Tensor]:
    """Yield the token ids of ``prompts`` in batches, (n, length) int64, padded and cut to ``length``.

    Without a length it is the longest that the tokenizer is for.
    """
    for start in range(0, len(prompts), batch_size):
        ids: Tensor = tokenizer(
            list(prompts[start : start + batch_size]),
            padding="max_length",
            max_length=length or tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        yield ids
