"""Compare the configurations of a bundle: its policy, and uniform bits, on the same prompts and noise.

Every configuration draws from the same latents. What was measured on it is kept as it is done, so that an
interrupted evaluation goes on where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor

from qlip_export import __version__
from qlip_export.bundle import MANIFEST, Bundle, best_fast_option
from qlip_export.errors import QlipError
from qlip_export.features import (
    FeatureExtractor,
    Features,
    OnBatch,
    ReferenceStatistics,
    images_of,
    joined,
    text_embeddings,
)
from qlip_export.files import content_key, explained_os_errors, sha256_of, written_aside
from qlip_export.metrics import (
    Draws,
    Estimate,
    bit_operations,
    clip_scores,
    frechet_draws,
    mean_draws,
    median_draws,
    resample,
)
from qlip_export.noise import seeded_noise
from qlip_export.pipelines import pipeline_of
from qlip_export.progress import Progress, batches
from qlip_export.prompts import CALIBRATION, EVALUATION, GENERIC_PROMPTS, own_prompts, read_prompts
from qlip_export.reference import check_same_model
from qlip_export.renderers import POLICY, EngineRenderer, Renderer, SimulatorRenderer
from qlip_export.sizes import choose_size
from qlip_export.spec import REFERENCE_BITS, Frozen, container_of
from qlip_export.zoo import ZooModel, model_of

Metric = Literal["fid", "sfid", "clip", "fab", "bitops", "latency"]
Device = Literal["engines", "cpu", "cuda"]

_FRECHET: frozenset[Metric] = frozenset({"fid", "sfid"})
_IMAGES = _FRECHET | {"clip"}
_Choice = TypeVar("_Choice", bound=str)

METRICS: tuple[Metric, ...] = ("fid", "sfid", "clip", "fab", "bitops", "latency")
DEVICES: tuple[Device, ...] = ("engines", "cpu", "cuda")
FP32 = "fp32"
"""The reference that is the 32-bit images of the same prompts and latents."""
DEFAULT_SAMPLES = 256
TIMED = 8
"""Prompts on which the configurations are timed, in turn."""


class EvaluateOptions(Frozen):
    """What to evaluate, and how."""

    prompts: Path | None = Field(default=None, description="the model's own if absent")
    samples: int | None = Field(default=None, ge=1, description="256, or all prompts where these are fewer")
    metrics: tuple[str, ...] | None = Field(default=None, description="all that the device can measure")
    compare: tuple[int, ...] | None = Field(default=None, description="all of the bundle's bits")
    baseline: str | None = Field(default=None, description="configuration that ratios refer to")
    device: str = "engines"
    backend: str = Field(default="auto", description="whose engines draw")
    height: int | None = Field(default=None, description="of images, where the bundle has several sizes")
    width: int | None = None
    batch_size: int | None = None
    reference: str | None = Field(default=None, description="file of statistics, folder of images, or fp32")
    inception: Path | None = Field(default=None, description="weights of Inception-v3, for the usual FID")
    model: str | None = Field(default=None, description="the one the bundle was built from if absent")
    guidance: float | None = Field(default=None, allow_inf_nan=False, description="the model's own if absent")
    seed: int = Field(default=0, ge=0)
    out: Path | None = Field(default=None, description="folder that keeps images and features")


class EvaluationRow(Frozen):
    """One configuration."""

    configuration: str = Field(description="'policy', or uniform activation bits")
    metrics: dict[Metric, Estimate]


class EvaluationReport(Frozen):
    """Every configuration on the same prompts and latents, with 95 % bootstrap intervals."""

    bundle: str
    size: str = Field(description="WIDTHxHEIGHT[:BATCH]")
    device: Device
    target: str | None = Field(description="whose engines drew; none if they did not")
    reference: str | None = Field(description="what Fréchet distances are measured to")
    features: str | None = Field(description="what FID is measured in; sFID always in the vision tower's")
    prompts: str = Field(description="where they come from")
    samples: int
    seed: int
    guidance: float
    steps: int
    weight_bits: int
    baseline: str = Field(description="configuration that ratios refer to")
    rows: tuple[EvaluationRow, ...]


@dataclass(frozen=True)
class Measured:
    """What one configuration drew.

    Attributes:
        features: Of N images, (N, width) float32 by feature set; empty if no metric needs images.
        bits: (N, steps, layers) uint8, of the quantized layers.
    """

    features: Features
    bits: NDArray[np.uint8]


def evaluate(path: str | os.PathLike[str], options: EvaluateOptions, progress: Progress) -> EvaluationReport:
    """Evaluate a bundle.

    Args:
        path: The bundle.
        options: What to compare, on what, and by which metrics.
        progress: Display; one item is one image.

    Raises:
        QlipError: Options that do not fit the bundle or each other, a size that it does not have, a model
            that is not its own, prompts that cannot be read or are too few, or a device that is not here.
    """
    opened = Bundle.open(path)
    bundle = choose_size(opened, height=options.height, width=options.width, batch_size=options.batch_size)
    device = _one_of(options.device, DEVICES, "device")
    if device == "cuda" and not torch.cuda.is_available():
        raise QlipError("there is no CUDA device here", fix="--device engines, or --device cpu")
    metrics = _metrics(options.metrics, device)
    _require_libraries(metrics)
    model, checkpoint = model_of(bundle.manifest.model, options.model)
    check_same_model(bundle, checkpoint)
    prompts, source = _prompts(options, model, metrics)
    names, baseline = _configurations(bundle, options, device)
    extractor = reference = None
    if _IMAGES & set(metrics):
        where = "cpu" if device == "engines" else device
        progress.stage("load", 1)
        progress.item("vision tower")
        extractor = FeatureExtractor(checkpoint.folder, device=where, inception=options.inception)
    if extractor is not None and _FRECHET & set(metrics):
        reference = _reference(options, model, extractor, metrics, batches(progress, "reference"))
    encoder = pipeline_of(bundle.manifest.model.family).quality
    texts = (
        text_embeddings(
            checkpoint.folder,
            prompts,
            encoder=encoder.name,
            tokenizer=encoder.tokenizer,
            on_batch=batches(progress, "texts"),
        )
        if "clip" in metrics
        else None
    )
    against_32 = reference is None and bool(_FRECHET & set(metrics))
    full = str(REFERENCE_BITS)
    if against_32 and device == "engines":
        bundle.bits(REFERENCE_BITS)
    every = list(dict.fromkeys([*names, full])) if against_32 else names
    renderer: Renderer = (
        EngineRenderer(bundle, options.backend)
        if device == "engines"
        else SimulatorRenderer(bundle, checkpoint, device)
    )
    session = _Session(bundle, prompts, options, renderer, extractor)
    progress.stage("evaluate", len(prompts) * len(every))
    measured = {name: session.measure(name, progress) for name in every}
    if against_32 and extractor is not None:
        reference = ReferenceStatistics.of_features(
            measured[full].features, extractor.fingerprints, "the 32-bit images of the same prompts and noise"
        )
    seconds: dict[str, NDArray[np.float64]] = {}
    if "latency" in metrics and isinstance(renderer, EngineRenderer):
        seconds = session.seconds(renderer, names, progress)
    progress.stage("intervals", len(names))
    draws = {}
    for name in names:
        progress.item(name)
        draws[name] = _draws(measured[name], seconds.get(name), bundle, metrics, reference, texts)
    rows = []
    for name, found in draws.items():
        base = draws[baseline] if name != baseline else {}
        estimates = {metric: drawn.estimate(base.get(metric)) for metric, drawn in found.items()}
        rows.append(EvaluationRow(configuration=name, metrics=estimates))
    return EvaluationReport(
        bundle=str(bundle.root),
        size=bundle.manifest.shapes.label,
        device=device,
        target=renderer.target,
        reference=reference.recipe.source if reference else None,
        features=None if reference is None else "Inception" if options.inception else "the vision tower's",
        prompts=source,
        samples=len(prompts),
        seed=options.seed,
        guidance=bundle.guidance(options.guidance),
        steps=len(bundle.manifest.sampler.steps),
        weight_bits=bundle.manifest.quantization.weight_bits,
        baseline=baseline,
        rows=tuple(rows),
    )


# --- what is kept


class _Session:
    """Draws configurations and keeps what was measured, where there is a folder for it."""

    def __init__(
        self,
        bundle: Bundle,
        prompts: Sequence[str],
        options: EvaluateOptions,
        renderer: Renderer,
        extractor: FeatureExtractor | None,
    ) -> None:
        self._prompts, self._options = prompts, options
        self._guidance = bundle.guidance(options.guidance)
        self._renderer, self._extractor = renderer, extractor
        if options.out is not None:
            with explained_os_errors(options.out):
                options.out.mkdir(parents=True, exist_ok=True)
        shape = bundle.manifest.shapes.latents[1:]
        self._latents = np.stack([seeded_noise(options.seed + i, shape) for i in range(len(prompts))])
        self._settings = (
            __version__,
            sha256_of(bundle.root / MANIFEST),
            bundle.manifest.shapes.label,
            list(prompts),
            options.seed,
            self._guidance,
            renderer.identity(),
            extractor.fingerprints if extractor else {},
        )

    def measure(self, name: str, progress: Progress) -> Measured:
        """Return what configuration ``name`` drew: as kept by an earlier run of equal settings, or anew."""
        folder = self._options.out
        key = content_key(self._settings, name)
        if folder is not None and (kept := _read(folder / f"{name}.safetensors", key)) is not None:
            for _ in self._prompts:
                progress.item(f"{name}: kept from an earlier run")
            return kept
        parts: list[Features] = []
        bits = []
        done = 0
        for images, chosen in self._renderer.draw(name, self._prompts, self._latents, self._guidance):
            if folder is not None:
                _save_images(images, folder / name, done)
            if self._extractor is not None:
                parts.append(self._extractor(images))
            bits.append(chosen)
            for _ in images:
                progress.item(f"{name}: {self._prompts[done]}")
                done += 1
        measured = Measured(joined(parts), np.concatenate(bits))
        if folder is not None:
            _write(measured, folder / f"{name}.safetensors", key)
        return measured

    def seconds(
        self, renderer: EngineRenderer, names: Sequence[str], progress: Progress
    ) -> dict[str, NDArray[np.float64]]:
        """Return seconds of an image, on the first prompts."""
        few = self._prompts[:TIMED]
        progress.stage("time", len(names) * (-(-len(few) // renderer.batch_size) + 1))
        return renderer.seconds(names, few, self._latents[:TIMED], self._guidance, progress.item)


def _read(path: Path, key: str) -> Measured | None:
    """Return what a run with this key kept; ``None`` where there is nothing, or another run's."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return None  # not whole: it is drawn again
    bits = tensors.pop("bits")
    return Measured(tensors, bits)


def _write(measured: Measured, path: Path, key: str) -> None:
    from safetensors.numpy import save_file

    with written_aside(path) as aside:
        tensors: dict[str, NDArray[Any]] = {"bits": measured.bits}
        tensors.update(measured.features)
        save_file(tensors, aside, metadata={"key": key})


def _save_images(images: Tensor, folder: Path, first: int) -> None:
    for number, pixels in enumerate(images.numpy(), start=first):
        with written_aside(folder / f"{number:05d}.png") as aside:
            Image.fromarray(pixels).save(aside, format="PNG")


# --- numbers


def _draws(
    measured: Measured,
    seconds: NDArray[np.float64] | None,
    bundle: Bundle,
    metrics: Sequence[Metric],
    reference: ReferenceStatistics | None,
    texts: NDArray[np.float32] | None,
) -> dict[Metric, Draws]:
    """Return every metric of a configuration, with the same resamples for all configurations."""
    images = resample(len(measured.bits))
    macs, fixed_macs = _work(bundle)
    weight_bits = bundle.manifest.quantization.weight_bits

    def draw(metric: Metric) -> Draws:
        if metric in _FRECHET and reference is not None:
            name = _feature_set(metric, measured.features)
            return frechet_draws(measured.features[name], reference.moments[name], images)
        if metric == "clip" and texts is not None:
            return mean_draws(clip_scores(measured.features["embedding"], texts), images)
        if metric == "fab":
            return mean_draws(measured.bits.mean((1, 2), dtype=np.float64), images)
        if metric == "bitops":
            return mean_draws(bit_operations(measured.bits, macs, fixed_macs, weight_bits), images)
        assert metric == "latency" and seconds is not None
        return median_draws(seconds, resample(len(seconds)))

    return {metric: draw(metric) for metric in metrics}


def _work(bundle: Bundle) -> tuple[NDArray[np.int64], int]:
    """Return the MACs of each layer that follows the bit options, and those of all others.

    The manifest counts MACs at the bundle's static shapes: a batch, and both halves of guidance.
    """
    samples = bundle.manifest.guidance.rows * bundle.manifest.shapes.batch_size
    layers = [layer for block in bundle.manifest.blocks for layer in block.quantized]
    others = [layer for block in bundle.manifest.blocks for layer in block.layers if not layer.quantized]
    return (
        np.array([layer.macs // samples for layer in layers]),
        sum(layer.macs for layer in others) // samples,
    )


def _feature_set(metric: Metric, available: Collection[str]) -> str:
    """Return the feature set of a Fréchet distance: Inception for FID where there is one."""
    if metric == "sfid":
        return "spatial"
    return "inception" if "inception" in available else "embedding"


# --- options


def _metrics(wanted: tuple[str, ...] | None, device: Device) -> tuple[Metric, ...]:
    if wanted is None:
        return tuple(metric for metric in METRICS if metric != "latency" or device == "engines")
    metrics = tuple(_one_of(metric, METRICS, "metric") for metric in dict.fromkeys(wanted))
    if "latency" in metrics and device != "engines":
        raise QlipError(
            f"the metric latency cannot be measured on {device}: no engine runs there",
            fix="--device engines, or other --metrics",
        )
    return metrics


def _require_libraries(metrics: Sequence[Metric]) -> None:
    """Refuse before anything is drawn what the last stage could not compute."""
    needed = ("torchmetrics", "threadpoolctl") if _FRECHET & set(metrics) else ()
    if missing := [name for name in needed if find_spec(name) is None]:
        raise QlipError(
            f"Fréchet distances need {missing[0]}, which is not installed",
            fix='pip install "qlip-export[evaluate]", or --metrics without fid and sfid',
        )


def _one_of(found: str, allowed: tuple[_Choice, ...], what: str) -> _Choice:
    for choice in allowed:
        if found == choice:
            return choice
    raise QlipError(f"unknown {what} {found!r}", expected=", ".join(allowed), found=found)


def _prompts(options: EvaluateOptions, model: ZooModel, metrics: Sequence[Metric]) -> tuple[list[str], str]:
    """Return the prompts, and where they come from."""
    path, source = options.prompts, str(options.prompts or "built in")
    if path is None and (path := own_prompts(model.calibration, EVALUATION, CALIBRATION)) is not None:
        source = f"{path.name} of {model.name}"
    every = read_prompts(path) if path is not None else list(GENERIC_PROMPTS)
    samples = min(DEFAULT_SAMPLES, len(every)) if options.samples is None else options.samples
    if samples > len(every):
        raise QlipError(
            "more samples than prompts",
            expected=f"at most {len(every)} with {source}",
            found=f"--samples {samples}",
            fix="fewer --samples, or more --prompts",
        )
    if samples < 2 and _FRECHET & set(metrics):
        raise QlipError(
            f"the metric {min(_FRECHET & set(metrics))} compares distributions of images",
            expected="2 samples or more",
            found=str(samples),
            fix="more --samples, or other --metrics",
        )
    return every[:samples], source


def _configurations(bundle: Bundle, options: EvaluateOptions, device: Device) -> tuple[list[str], str]:
    """Return the names of the configurations, and which of them is the baseline."""
    compare = options.compare or (bundle.uniform if device == "engines" else bundle.manifest.bits)
    for bits in compare:
        if device == "engines":
            bundle.bits(bits)
        container_of(bits)
    names = [POLICY] if bundle.manifest.policy is not None else []
    names += map(str, dict.fromkeys(compare))
    baseline = options.baseline or (str(best_fast_option(compare)) if compare else POLICY)
    return names, _one_of(baseline, tuple(names), "baseline")


def _reference(
    options: EvaluateOptions,
    model: ZooModel,
    extractor: FeatureExtractor,
    metrics: Sequence[Metric],
    on_batch: OnBatch,
) -> ReferenceStatistics | None:
    """Return the statistics to measure distances to; ``None`` for those of the 32-bit images."""
    if options.reference == FP32:
        return None
    shipped = model.calibration / "reference.safetensors" if model.calibration else None
    path = Path(options.reference) if options.reference else shipped
    if path is None or (options.reference is None and not path.is_file()):
        return None
    if path.is_dir():
        images = images_of(path, on_batch=on_batch)
        return ReferenceStatistics.of_images(images, extractor, f"the images of {path}")
    statistics = ReferenceStatistics.load(path)
    needed = {_feature_set(metric, extractor.fingerprints) for metric in _FRECHET & set(metrics)}
    statistics.check({name: extractor.fingerprints[name] for name in sorted(needed)}, path)
    return statistics
