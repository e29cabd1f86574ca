"""Everything that a report shows: images, decisions, engine times, parity, provenance."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from qlip_export import __version__
from qlip_export.bundle import MANIFEST, Bundle
from qlip_export.errors import QlipError
from qlip_export.files import sha256_of
from qlip_export.noise import seeded_noise
from qlip_export.progress import Progress
from qlip_export.prompts import (
    CALIBRATION,
    EMOJI_PROMPTS,
    EVALUATION,
    GENERIC_PROMPTS,
    RICHNESS,
    own_prompts,
    read_prompts,
)
from qlip_export.report.engines import EngineRow, SizeRow, other_sizes, step_of, time_engines
from qlip_export.report.policy import PolicyStatistics, ladder_levels, statistics, word_levels
from qlip_export.runtime import TextToImage
from qlip_export.spec import Frozen
from qlip_export.zoo import EMBEDDED, calibration_of, model_of

if TYPE_CHECKING:
    from qlip_export.validate import ValidationReport

POPULATION = 256
"""Prompts whose decisions are counted, at most; they are not drawn."""


class ReportOptions(Frozen):
    """What a report shows."""

    prompts: Path | None = Field(default=None, description="the model's own, or generic, if absent")
    images: int = Field(default=8, ge=1, le=24, description="prompts that are drawn")
    seed: int = Field(default=0, ge=0)
    guidance: float | None = Field(default=None, allow_inf_nan=False, description="the model's own if absent")
    backend: str = "auto"
    height: int | None = Field(default=None, description="of images, where the bundle has several sizes")
    width: int | None = None
    batch_size: int | None = None
    reference: bool = Field(default=True, description="draw in FP32 with diffusers too")
    parity: bool = Field(default=True, description="validate the bundle")


@dataclass(frozen=True)
class Drawing:
    """A prompt at one configuration.

    Attributes:
        label: What drew it, e.g. `16 bits`.
        image: The image.
        q: Predicted quality; ``None`` where the policy had no say.
        fab: Feature average bits.
        seconds: From prompt to image, everything loaded.
        ours: Whether engines of the bundle drew it.
    """

    label: str
    image: Image.Image
    q: float | None
    fab: float
    seconds: float
    ours: bool


@dataclass(frozen=True)
class PromptRow:
    """A prompt at every configuration, from the same noise.

    Attributes:
        prompt: The prompt.
        seed: Of its noise.
        drawings: Highest precision first, the policy last.
        record: What the run time tells of the policy's image; of the first image where there is no policy.
    """

    prompt: str
    seed: int
    drawings: tuple[Drawing, ...]
    record: dict[str, Any]


@dataclass(frozen=True)
class ReportData:
    """What the page is made of.

    Attributes:
        bundle: In the size that was drawn.
        sizes: All of the bundle's, this one first.
    """

    bundle: Bundle
    target: str
    rows: tuple[PromptRow, ...]
    policy: PolicyStatistics | None
    engines: tuple[EngineRow, ...]
    sizes: tuple[SizeRow, ...]
    parity: ValidationReport | None
    provenance: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def collect(path: str | os.PathLike[str], options: ReportOptions, progress: Progress) -> ReportData:
    """Draw, time and validate a bundle.

    Raises:
        QlipError: No bundle, no such size, no engines that run here, prompts that cannot be read.
    """
    pipeline = TextToImage.load(
        path,
        backend=options.backend,
        height=options.height,
        width=options.width,
        batch_size=options.batch_size,
    )
    bundle = pipeline.bundle
    calibration = calibration_of(bundle.manifest.model)
    shown, population, source = _prompts(options, bundle, calibration)
    notes: list[str] = []
    references = _references(bundle, shown, options, progress, notes)
    rows = _draw(pipeline, shown, options, references, progress)
    policy = None
    if bundle.manifest.policy is None:
        notes.append("The bundle has no policy: every run is at uniform bits.")
    else:
        policy = _decisions(pipeline, population, source, calibration, progress)
    engines = time_engines(pipeline, progress)
    sizes = [step_of(pipeline, engines)]
    sizes += [step_of(other, time_engines(other, progress)) for other in other_sizes(pipeline)]
    from qlip_export.validate import missing_libraries, validate

    parity = None
    if not options.parity:
        notes.append("Engines were not compared with their graphs: --no-parity.")
    elif missing := missing_libraries():
        notes.append(
            f"Engines were not compared with their graphs: not installed: {', '.join(missing)} "
            '(pip install "qlip-export[validate]").'
        )
    else:
        parity = validate(
            path, prompt=shown[0], seed=options.seed, model=None, progress=progress, backend=options.backend
        )
    return ReportData(
        bundle=bundle,
        target=pipeline.target.name,
        rows=rows,
        policy=policy,
        engines=engines,
        sizes=tuple(sizes),
        parity=parity,
        provenance=_provenance(pipeline),
        notes=tuple(notes),
    )


def _prompts(
    options: ReportOptions, bundle: Bundle, calibration: Path | None
) -> tuple[list[str], list[str], str]:
    """Return the prompts to draw, those whose decisions are counted, and where the latter come from."""
    if options.prompts is not None:
        own = read_prompts(options.prompts)
        return own[: options.images], own[:POPULATION], options.prompts.name
    embedded = bundle.manifest.model.source in EMBEDDED
    shown = list(EMOJI_PROMPTS if embedded else GENERIC_PROMPTS)[: options.images]
    file = own_prompts(calibration, EVALUATION, CALIBRATION)
    if file is None:
        return shown, list(GENERIC_PROMPTS), "the generic prompts"
    return shown, read_prompts(file)[:POPULATION], f"{file.name} of {bundle.manifest.model.name}"


def _noise(bundle: Bundle, seed: int) -> NDArray[np.float32]:
    return seeded_noise(seed, bundle.manifest.shapes.latents[1:])[None]


def _references(
    bundle: Bundle, prompts: Sequence[str], options: ReportOptions, progress: Progress, notes: list[str]
) -> list[Drawing]:
    """Return every prompt as diffusers draws it in FP32 with the checkpoint's weights; none if it cannot."""
    if not options.reference:
        notes.append("No FP32 reference was drawn: --no-reference.")
        return []
    if any(find_spec(name) is None for name in ("torch", "diffusers")):
        notes.append(
            'No FP32 reference was drawn: diffusers is not installed (pip install "qlip-export[export]").'
        )
        return []
    sampler = bundle.manifest.sampler
    progress.stage("reference", len(prompts) * sampler.requested_steps)
    progress.detail("loading diffusers")
    from qlip_export.reference import check_same_model, reference_image
    from qlip_export.torch_pipeline import load_pipeline, use_scheduler

    try:
        _, checkpoint = model_of(bundle.manifest.model)
        check_same_model(bundle, checkpoint)
    except QlipError as error:
        notes.append(f"No FP32 reference was drawn: {error.problem}.")
        return []
    pipeline = load_pipeline(checkpoint)
    use_scheduler(pipeline, sampler.scheduler)
    found = []
    for i, prompt in enumerate(prompts):
        noise = _noise(bundle, options.seed + i)
        started = time.perf_counter()
        image = reference_image(
            pipeline,
            prompt,
            noise,
            steps=sampler.requested_steps,
            guidance=bundle.guidance(options.guidance),
            on_step=lambda told=prompt[:40]: progress.item(told),  # type: ignore[misc]
        )
        found.append(Drawing("FP32, diffusers", image, None, 32.0, time.perf_counter() - started, False))
    return found


def _draw(
    pipeline: TextToImage,
    prompts: Sequence[str],
    options: ReportOptions,
    references: Sequence[Drawing],
    progress: Progress,
) -> tuple[PromptRow, ...]:
    """Draw every prompt at every configuration; these take turns, so that a disturbance meets all of them."""
    manifest = pipeline.bundle.manifest
    every = pipeline.bundle.uniform
    uniform = [bits for bits in reversed(every) if bits <= 16] or list(every[:1])
    configurations: list[int | None] = [*uniform, *([None] if manifest.policy else [])]
    progress.stage("draw", len(configurations) * (len(prompts) + 1))

    def run(prompt: str, seed: int, bits: int | None) -> tuple[Image.Image, dict[str, Any]]:
        progress.item(f"{prompt[:40]} at {bits or 'its own'} bits")
        made = pipeline(prompt, seed=seed, guidance=options.guidance, bits=bits)
        return made.images[0], made.records[0]

    for bits in configurations:
        run(prompts[0], options.seed, bits)  # loads engines, and is not counted
    rows = []
    for i, prompt in enumerate(prompts):
        seed = options.seed + i
        drawings = [references[i]] if references else []
        made = [run(prompt, seed, bits) for bits in configurations]
        for bits, (image, record) in zip(configurations, made, strict=True):
            label = "QLIP" if bits is None else f"{bits} bits"
            seconds = record["seconds"]["total"]
            drawings.append(Drawing(label, image, record["q"], record["fab"], seconds, True))
        rows.append(PromptRow(prompt, seed, tuple(drawings), made[-1][1]))
    return tuple(rows)


def _decisions(
    pipeline: TextToImage, prompts: Sequence[str], source: str, calibration: Path | None, progress: Progress
) -> PolicyStatistics:
    file = own_prompts(calibration, RICHNESS)
    ladder = [] if file is None else read_prompts(file)
    progress.stage("decide", len(prompts) + len(ladder))

    def qualities(texts: Sequence[str]) -> list[float]:
        found: list[float] = []
        size = pipeline.bundle.manifest.shapes.batch_size
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            for text in part:
                progress.item(text[:40])
            found += pipeline.qualities(part)
        return found

    manifest = pipeline.bundle.manifest
    found = qualities(prompts)
    levels = ladder_levels(manifest, qualities(ladder)) if ladder else word_levels(manifest, prompts, found)
    return statistics(manifest, found, source, levels, bool(ladder))


def _provenance(pipeline: TextToImage) -> tuple[tuple[str, str], ...]:
    manifest = pipeline.bundle.manifest
    policy, target, sampler = manifest.policy, pipeline.target.entry, manifest.sampler
    shapes = [size.shapes for size in pipeline.bundle.whole.sizes]
    rows = {
        "Model": f"{manifest.model.name} ({manifest.model.family}), {manifest.model.parameters:,} parameters",
        "Model fingerprint (SHA-256)": manifest.model.fingerprint,
        "Weights": f"{manifest.quantization.weight_bits} bits, {manifest.quantization.weight_method}",
        "Activation ranges": _hash(pipeline.bundle, manifest.quantization.ranges),
        "Policy": f"{policy.name}, {policy.criterion}, cost {policy.cost}" if policy else "none",
        "Policy graph (SHA-256)": _hash(pipeline.bundle, policy.onnx if policy else None),
        "Sampler": f"{sampler.scheduler}, {len(sampler.steps)} steps",
        "Image": "; ".join(f"{s.image[1]} x {s.image[0]}, batch {s.batch_size}" for s in shapes)
        + (f" (this report: {manifest.shapes.label})" if len(shapes) > 1 else ""),
        "Engines": f"{target.backend} {target.version} for {target.device}",
        "Built with": ", ".join(
            f"{name} {version}"
            for name, version in {"qlip-export": manifest.qlip_export_version, **manifest.versions}.items()
        ),
        "Manifest (SHA-256)": sha256_of(pipeline.bundle.root / MANIFEST),
        "This report": f"qlip-export {__version__}, Python {platform.python_version()} on "
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, "
        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
    }
    return tuple(rows.items())


def _hash(bundle: Bundle, path: str | None) -> str:
    return "none" if path is None else bundle.manifest.files[path].sha256


def median_seconds(rows: Sequence[PromptRow]) -> dict[str, float]:
    """Return the median seconds of an image, by configuration."""
    labels = [drawing.label for drawing in rows[0].drawings]
    return {label: median(row.drawings[i].seconds for row in rows) for i, label in enumerate(labels)}
