"""Seconds per denoiser step and per image: bundles against the usual ways to run the same model here."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.bundles import BITS, Subject, prepare
from benchmarks.peers import Array, Denoiser
from benchmarks.timing import THREADS, Times, interleave, ratio, summary
from qlip_export.manifest import BlockEntry
from qlip_export.runtime import TextToImage
from qlip_export.runtime.chain import Pattern
from qlip_export.spec import variant_name

STEPS = 25
ROUNDS = {"emoji": 15, "bk-sdm-tiny": 5}
QUICK_ROUNDS = 2
BASE = "diffusers eager FP32"
PROMPT = "a red apple"
GUIDANCE = 4.0


def run(of: Subject, *, quick: bool) -> dict[str, Any]:
    """Return seconds per step of all sides, and per image where the model is whole (emoji)."""
    prepare(of, ("coarse",))
    ours = TextToImage.load(of.bundle("coarse"), threads=THREADS)
    others = _peers(of, _inputs(ours))
    steps: dict[str, Callable[[], Any]] = {f"qlip-export {b} bits": _our_step(ours, b) for b in BITS}
    latents, timestep, text = _inputs(ours)
    for name, peer in others.items():
        steps[name] = _bound(peer, latents, timestep, text)
    rounds = QUICK_ROUNDS if quick else ROUNDS[of.shape]
    step_seconds = interleave(steps, rounds=rounds, settle=of.shape == "emoji")
    image_seconds: dict[str, Times] = {}
    if of.shape == "emoji":
        image_seconds = interleave(
            _images(of, ours, others), rounds=QUICK_ROUNDS if quick else 7, least_seconds=0, settle=False
        )
    gc.collect()
    return {
        "base": BASE,
        "steps_per_image": STEPS,
        "measured_images": bool(image_seconds),
        "rows": [
            {
                "name": name,
                "step": summary(seconds.wall),
                "speedup": round(1 / ratio(seconds.wall, step_seconds[BASE].wall), 3),
                "cpu_speedup": round(1 / ratio(seconds.cpu, step_seconds[BASE].cpu), 3),
                **({"image": summary(image_seconds[name].wall)} if image_seconds else {}),
            }
            for name, seconds in step_seconds.items()
        ],
    }


def _peers(of: Subject, inputs: tuple[Array, float, Array]) -> dict[str, Denoiser]:
    import torch

    torch.set_num_threads(THREADS)
    unet = peers.load_unet(of)
    found = {
        BASE: peers.eager(unet),
        "diffusers eager BF16": peers.eager(peers.load_unet(of).to(torch.bfloat16)),
        "torch.compile FP32": peers.eager(torch.compile(unet)),
        "OpenVINO FP32": peers.openvino_whole(of, inputs, "f32"),
        "OpenVINO BF16": peers.openvino_whole(of, inputs, "bf16"),
        "ONNX Runtime FP32": peers.onnxruntime_whole(of, inputs),
    }
    _check(found, inputs)
    return found


def _check(found: dict[str, Denoiser], inputs: tuple[Array, float, Array]) -> None:
    """A peer that computes something else is no peer."""
    reference = found[BASE](*inputs)
    for name, peer in found.items():
        error = float(np.abs(peer(*inputs) - reference).max() / np.abs(reference).max())
        if not error < (0.1 if "BF16" in name else 0.001):
            raise AssertionError(f"{name} is off by {error:.2g} of the largest value")


def _inputs(ours: TextToImage) -> tuple[Array, float, Array]:
    shapes = {t.name: t.shape for t in ours.bundle.manifest.inputs}
    rng = np.random.default_rng(0)
    latents = rng.standard_normal(shapes["latents"], dtype=np.float32)
    return latents, 500.0, rng.standard_normal(shapes["text"], dtype=np.float32)


def _our_step(ours: TextToImage, bits: int) -> Callable[[], Any]:
    latents, timestep, text = _inputs(ours)
    pattern = ours.chain.uniform(bits)
    ours.chain.load([pattern])
    ours.chain.hold("text", text)
    return lambda: ours.chain.step(latents, timestep, pattern)


def _bound(peer: Denoiser, latents: Array, timestep: float, text: Array) -> Callable[[], Any]:
    return lambda: peer(latents, timestep, text)


def _images(of: Subject, ours: TextToImage, others: dict[str, Denoiser]) -> dict[str, Callable[[], Any]]:
    """Return a call for each side that makes one whole image: text, steps with guidance, VAE."""
    assert len(ours.bundle.manifest.sampler.steps) == STEPS
    sides: dict[str, Callable[[], Any]] = {f"qlip-export {b} bits": _our_image(ours, b) for b in BITS}
    for name, peer in others.items():
        if name.startswith(("diffusers", "torch")):
            sides[name] = _diffusers_image(of, ours, name)
        else:
            # Text encoder, sampler and VAE are the bundle's: only the denoiser is what is compared.
            borrowed = TextToImage.load(of.bundle("coarse"), threads=THREADS)
            borrowed.chain = PeerChain(peer, ours.chain.blocks)  # type: ignore[assignment]
            sides[name] = _our_image(borrowed, BITS[-1])
    return sides


def _our_image(pipeline: TextToImage, bits: int) -> Callable[[], Any]:
    return lambda: pipeline(PROMPT, seed=0, guidance=GUIDANCE, bits=bits)


def _diffusers_image(of: Subject, ours: TextToImage, name: str) -> Callable[[], Any]:
    import torch

    from qlip_export.checkpoint import Checkpoint
    from qlip_export.torch_pipeline import load_pipeline, use_scheduler

    pipeline = load_pipeline(Checkpoint(of.folder))
    use_scheduler(pipeline, ours.bundle.manifest.sampler.scheduler)
    if "BF16" in name:
        pipeline.to(torch.bfloat16)
    if "compile" in name:
        pipeline.unet = torch.compile(pipeline.unet)

    def call() -> Any:
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            return pipeline(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator)

    return call


class PeerChain:
    """Stands in for a bundle's chain of engines."""

    def __init__(self, denoiser: Denoiser, blocks: Sequence[BlockEntry]) -> None:
        self._denoiser, self.blocks = denoiser, blocks
        self._text: Array | None = None

    def uniform(self, bits: int) -> Pattern:
        return (variant_name(bits),) * len(self.blocks)

    def load(self, patterns: Any) -> None:
        pass

    def hold(self, name: str, array: Array) -> None:
        self._text = array

    def step(self, latents: Array, timestep: float, pattern: Any, before: Any = None) -> Array:
        assert self._text is not None
        return self._denoiser(latents, timestep, self._text)
