"""The diffusers pipeline as the reference: the bundle's weights, the same noise, scheduler and guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qlip_export.bundle import Bundle
from qlip_export.capture import denoiser_family
from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError
from qlip_export.graph.weights import WeightIndex
from qlip_export.quant.fake import FakeQuantizer
from qlip_export.quant.ranges import Ranges
from qlip_export.torch_pipeline import draw, load_pipeline, replace_weights, use_scheduler

DENOISER_WEIGHTS = "onnx/denoiser.weights.bin"


def reference_pipeline(bundle: Bundle, checkpoint: Checkpoint, *, bits: int = 32) -> Any:
    """Return the diffusers pipeline with the weights and the scheduler of ``bundle``, in FP32.

    Args:
        bundle: Its weights and, up to 8 bits, its activation grids.
        checkpoint: The model it was built from.
        bits: Activation bits. Up to 8, layer inputs are rounded to the grids of the engines; above, the
            arithmetic stays FP32.

    Raises:
        QlipError: The checkpoint is not the one that the bundle was built from.
    """
    check_same_model(bundle, checkpoint)
    family = denoiser_family(checkpoint)
    pipeline = load_pipeline(checkpoint)
    use_scheduler(pipeline, bundle.manifest.sampler.scheduler)
    denoiser = getattr(pipeline, family.denoiser_folder)
    replace_weights(denoiser, quantized_weights(bundle))
    if bits <= 8 and bundle.manifest.quantization.ranges is not None:
        ranges = Ranges.load(bundle.file(bundle.manifest.quantization.ranges))
        quantizer = FakeQuantizer(denoiser, {bits: ranges.thresholds(bits)})
        quantizer.set_bits({name: bits for name in ranges.layers if family.quantizes(name)})
    return pipeline


def check_same_model(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose denoiser is not the one that ``bundle`` was built from.

    Raises:
        QlipError: Naming both fingerprints.
    """
    fingerprint = checkpoint.component(denoiser_family(checkpoint).denoiser_folder).fingerprint
    if fingerprint != bundle.manifest.model.fingerprint:
        raise QlipError(
            f"{checkpoint.folder} is not the model that {bundle.root} was built from",
            expected=f"fingerprint {bundle.manifest.model.fingerprint}",
            found=fingerprint,
            fix="name the right model, or build the bundle again",
        )


def reference_image(
    pipeline: Any,
    prompt: str,
    latents: NDArray[np.float32],
    *,
    steps: int,
    guidance: float,
    negative_prompt: str | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Image.Image:
    """Return the image that diffusers makes of unit-variance ``latents`` (1, C, H, W).

    ``on_step`` is called after each denoiser step.
    """
    height, width = latents.shape[2:]
    made = draw(
        pipeline,
        prompt,
        latents_size=(height, width),
        steps=steps,
        guidance=guidance,
        latents=latents,
        negative_prompt=negative_prompt,
        on_step=on_step,
    )
    image: Image.Image = made.images[0]
    return image


def quantized_weights(bundle: Bundle) -> dict[str, NDArray[np.float32]]:
    """Return the denoiser's weights that are stored on a grid, as float32 (out, in, ...), by name."""
    path = bundle.file(DENOISER_WEIGHTS)
    index = WeightIndex.model_validate(bundle.manifest.files[DENOISER_WEIGHTS].facts)

    def stored(name: str) -> NDArray[np.float32]:
        return index.tensors[name].external(name, path.name, path.parent).numpy().astype(np.float32)

    weights = {}
    for name, axis in index.layer_axis.items():
        codes, scale = stored(f"{name}.codes"), stored(f"{name}.scale")
        shape = [1] * codes.ndim
        shape[axis] = -1
        weight = codes * scale.reshape(shape)
        weights[name] = np.ascontiguousarray(weight.T if axis == 1 else weight)
    return weights


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two 8-bit images, dB; infinite if they are equal."""
    difference = np.asarray(image, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    error = float((difference**2).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))
