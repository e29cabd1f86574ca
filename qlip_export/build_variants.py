"""What a build needs to know to choose variants: q of prompts, sizes and times of engines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from pydantic import JsonValue

from qlip_export.backends.base import Backend
from qlip_export.bundle import Bundle
from qlip_export.calibrate.latency import Latencies
from qlip_export.capture import denoiser_family
from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError
from qlip_export.files import content_key, sha256_of, write_json
from qlip_export.pipelines import TextEncoder, pipeline_of
from qlip_export.policy.store import Quality
from qlip_export.spec import WeightBits
from qlip_export.text_encoders import encode
from qlip_export.torch_pipeline import quiet_loading, token_ids
from qlip_export.variants.choose import Hardware
from qlip_export.workspace import Workspace

QUALITIES = "calibration/qualities.json"
MOST_PROMPTS = 512
"""Calibration prompts whose q is asked for, evenly spaced over all of them."""


def prompt_qualities(
    checkpoint: Checkpoint, quality: Quality, prompts: Sequence[str], workspace: Workspace
) -> list[float]:
    """Return q of calibration prompts, increasing; kept in the bundle as ``calibration/qualities.json``."""
    spaced = prompts[:: -(-len(prompts) // MOST_PROMPTS)]

    def measure(path: Path) -> JsonValue:
        with torch.inference_mode():
            found = quality.network(_pooled(checkpoint, spaced))
        write_json(path, sorted(round(float(q), 6) for q in found))
        return None

    key = content_key(
        "qualities",
        sha256_of(Path(__file__)),
        quality.sha256,
        checkpoint.component(_encoder(checkpoint).name).fingerprint,
        list(spaced),
    )
    path, _ = workspace.product(QUALITIES, key, measure)
    found: list[float] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _pooled(checkpoint: Checkpoint, prompts: Sequence[str]) -> torch.Tensor:
    """Return the pooled embeddings that T2Q reads, (N, C_clip) float32."""
    from transformers import AutoTokenizer, CLIPTextModel

    only = replace(_encoder(checkpoint), outputs=("pooled",))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder_of(only.tokenizer), local_files_only=True)
    with quiet_loading():
        module = CLIPTextModel.from_pretrained(
            checkpoint.component(only.name).folder, local_files_only=True
        ).eval()
    parts = [encode(module, ids, only)["pooled"].float() for ids in token_ids(tokenizer, prompts, 128)]
    return torch.cat(parts)


def _encoder(checkpoint: Checkpoint) -> TextEncoder:
    return pipeline_of(denoiser_family(checkpoint).name).quality


def hardware(
    backend: Backend | None,
    weight_bits: WeightBits,
    folder: Path | None,
    denoiser: str,
    latents: tuple[int, ...],
    *,
    sizes: int,
    previous: Path,
) -> Hardware:
    """Return what is known of engines of ``backend``.

    Args:
        backend: What will compile; none for an export.
        weight_bits: Of the build.
        folder: The calibration; its ``latency.json`` counts if it is of this device.
        denoiser: Fingerprint.
        latents: Their shape in the first size of the build, (N, C, H, W).
        sizes: Of images and batches in the build: how many engines each variant becomes.
        previous: The bundle that the build replaces, if there is one: its engines may have been timed.
    """
    if backend is None:
        return Hardware(sizes=sizes)
    can = backend.capabilities
    path = folder / "latency.json" if folder is not None else None
    times = Latencies.model_validate_json(path.read_text()) if path is not None and path.is_file() else None
    wanted = (backend.name, can.device, denoiser, latents)
    fits = times is not None and wanted == (
        times.backend,
        times.device,
        times.fingerprint,
        times.latents,
    )
    measured = _timed(previous, backend, weight_bits, denoiser, latents)
    uniform = {
        block: {bits[0]: found for bits, found in variants.items() if len(set(bits)) == 1}
        for block, variants in measured.items()
    }
    return Hardware(
        engine_bytes=partial(can.engine_bytes, weight_bits=weight_bits),
        milliseconds=times.milliseconds if fits and times is not None else uniform,
        measured=measured,
        sizes=sizes,
    )


def _timed(
    previous: Path, backend: Backend, weight_bits: WeightBits, denoiser: str, latents: tuple[int, ...]
) -> dict[str, dict[tuple[int, ...], float]]:
    """Return the milliseconds of a bundle's variants, block -> bits of its quantized layers -> a call.

    A variant that is slower than another of at least its bits takes the time of that one, which runs instead.
    A block without quantized layers counts as one layer. Nothing is known from no bundle, from one of another
    version, model or size, and from one whose engines were made for another device.
    """
    try:
        manifest = Bundle.open(previous).manifest
    except QlipError:
        return {}
    target, can = manifest.targets.get(backend.name), backend.capabilities
    same = (manifest.model.fingerprint, manifest.shapes.latents, manifest.quantization.weight_bits)
    if target is None or target.timing is None or same != (denoiser, latents, weight_bits):
        return {}
    if (target.device, target.version) != (can.device, can.version):
        return {}
    times, instead = target.timing.milliseconds, target.timing.instead
    found: dict[str, dict[tuple[int, ...], float]] = {}
    for block in manifest.blocks:
        runs = instead.get(block.name, {})
        found[block.name] = {
            block.layer_bits(name) or (entry.bits,): times[block.variants[runs.get(name, name)].onnx]
            for name, entry in block.variants.items()
            if block.variants[runs.get(name, name)].onnx in times
        }
    return found
