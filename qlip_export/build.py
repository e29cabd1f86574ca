"""`qlip-export build` and `export`: export a model, compile it if asked to, and put a bundle in place."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from qlip_export import __version__
from qlip_export.backends import get_backend
from qlip_export.backends.base import Backend
from qlip_export.build_variants import hardware, prompt_qualities
from qlip_export.bundle import Bundle
from qlip_export.capture import Shapes, denoiser_family, shapes_of
from qlip_export.checkpoint import Checkpoint, read_json
from qlip_export.compile import compile_target
from qlip_export.compiled import TargetEntry
from qlip_export.errors import QlipError
from qlip_export.export import NEAREST, Exporter, ExportOptions, WeightMethod
from qlip_export.files import content_key, sha256_of
from qlip_export.lora import LoraRef
from qlip_export.manifest import (
    SCHEMA_VERSION,
    Exported,
    Manifest,
    ModelEntry,
    QuantizationEntry,
    ShapesEntry,
    SizeEntry,
)
from qlip_export.pipelines import Pipeline, pipeline_of
from qlip_export.policy.select import SelectedPolicy, select_policy
from qlip_export.progress import Progress
from qlip_export.prompts import CALIBRATION, GENERIC_PROMPTS, own_prompts, read_prompts
from qlip_export.quant.ranges import RANGE_BITS, Ranges
from qlip_export.quant.rounding import LearnedRounding
from qlip_export.sampler_probe import probe_scheduler, scheduler_from_config
from qlip_export.spec import (
    MOST_IMAGES,
    Container,
    Frozen,
    Granularity,
    ImageSize,
    SamplerTable,
    Unit,
    WeightBits,
    container_of,
    image_sizes,
)
from qlip_export.variants.choose import Choice, Chooser, Limits, VariantRow
from qlip_export.workspace import Workspace, check_replaceable
from qlip_export.zoo import ZooModel, find_model

RANGES = "calibration/ranges.json"
WEIGHTS = "weights.safetensors"


class BuildOptions(Frozen):
    """Everything a build can be asked for."""

    model: str
    bits: tuple[int, ...] = (8, 16, 32)
    weight_bits: WeightBits = 4
    granularity: Granularity = "coarse"
    backend: str = "auto"
    batch_size: int = Field(default=1, ge=1, le=MOST_IMAGES)
    height: int | None = Field(default=None, description="of images, pixels; none: the model's own")
    width: int | None = None
    sizes: tuple[str, ...] = Field(default=(), description="WIDTHxHEIGHT[:BATCH], instead of these")
    revision: str | None = Field(default=None, description="of a model from the Hub")
    lora: tuple[str, ...] = Field(default=(), description="PATH[:SCALE], fused into the weights")
    random_weights: bool = False
    seed: int = Field(default=0, ge=0, description="of random weights")
    steps: int = Field(default=25, ge=1, le=1000)
    scheduler: str | None = Field(default=None, description="the family's own if absent")
    calibration: Path | None = None
    policy: str = "auto"
    weights: Literal["auto", "nearest"] = "auto"
    precision: Unit = "block"
    fuse: bool = False
    max_variants: int | None = Field(default=None, ge=1)
    max_engine_bytes: int | None = Field(default=None, ge=1)
    target_fab: float | None = Field(default=None, gt=0)
    target_latency: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_limit(self) -> BuildOptions:
        given = [name for name in _LIMITS if getattr(self, name) is not None]
        options = [f"--{name.replace('_', '-')}" for name in given]
        if given and self.precision == "block":
            raise QlipError(
                f"{options[0]} limits variants by layer",
                found="--granularity block",
                fix="--granularity layer",
            )
        if len(given) > 1:
            raise QlipError(
                "each of these picks the number of variants", expected="one of them", found=", ".join(options)
            )
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> BuildOptions:
        if len(self.image_sizes) > 1 and self.target_latency is not None:
            raise QlipError(
                "--target-latency is about one size of images: each takes its own time",
                found=f"{len(self.sizes)} sizes",
                fix="build the size that it is about; --max-variants, as that build chose, does for all",
            )
        return self

    @property
    def image_sizes(self) -> tuple[ImageSize, ...]:
        """All sizes, the first one first; the batch size is that of each."""
        return image_sizes(self.sizes, self.height, self.width, self.batch_size)

    @field_validator("bits")
    @classmethod
    def _increasing(cls, bits: tuple[int, ...]) -> tuple[int, ...]:
        for option in bits:
            container_of(option)
        if not bits or list(bits) != sorted(set(bits)):
            raise QlipError(
                "the bit options must increase", expected="e.g. 8,16,32", found=",".join(map(str, bits))
            )
        return bits


_LIMITS = ("max_variants", "max_engine_bytes", "target_fab", "target_latency")


class BuildReport(Frozen):
    """What a build did, as `--json` prints it."""

    bundle: str
    model: str
    sizes: tuple[str, ...] = Field(description="WIDTHxHEIGHT[:BATCH] of images")
    backend: str | None = Field(description="none: exported only")
    device: str | None
    bits: tuple[int, ...]
    random_weights: int | None = Field(description="seed; none: the model's own weights")
    policy: str | None = Field(description="none: uniform bits only")
    weights: str = Field(description="how the denoiser's weights were rounded")
    blocks: int
    unfused: int = Field(description="blocks before neighbours were fused")
    variants: tuple[VariantRow, ...] = Field(description="what numbers of variants cost; none: uniform bits")
    chosen: VariantRow | None = Field(description="the number of variants that was built")
    engines: int
    built: int = Field(description="files made by this run")
    reused: int = Field(description="files that were there already")
    bytes: dict[str, int] = Field(description="by kind: onnx, weights, engines")
    seconds: float


def build(options: BuildOptions, out: Path, progress: Progress) -> BuildReport:
    """Export and compile the bundle ``out``; a bundle that is there is replaced when the new one is whole.

    Raises:
        QlipError: Anything the user can mend: see the message.
    """
    return _run(options, out, options.backend, progress)


def export_bundle(options: BuildOptions, out: Path, progress: Progress) -> BuildReport:
    """As `build`, but without engines: what `compile_bundle` needs, on any machine.

    Raises:
        QlipError: Anything the user can mend: see the message.
    """
    return _run(options, out, None, progress)


def _run(options: BuildOptions, out: Path, backend_name: str | None, progress: Progress) -> BuildReport:
    started = time.monotonic()
    model, checkpoint = find_model(
        options.model,
        revision=options.revision,
        random_weights=options.seed if options.random_weights else None,
        lora=options.lora,
    )
    backend = get_backend(backend_name) if backend_name is not None else None
    family = denoiser_family(checkpoint)
    pipeline = pipeline_of(family.name)
    sizes = [shapes_of(checkpoint, **dict(size)) for size in options.image_sizes]
    samplers = [_sampler(checkpoint, pipeline, options, shapes) for shapes in sizes]
    steps = len(samplers[0].steps)
    for component in (family.denoiser_folder, *(e.name for e in pipeline.text_encoders), "vae"):
        checkpoint.component(component).require_weights()
    # What is shipped was learned on the model's own weights.
    folder = options.calibration or (None if options.random_weights or options.lora else model.calibration)
    denoiser = checkpoint.component(family.denoiser_folder).fingerprint
    shipped = _shipped_ranges(folder, denoiser, options)
    weights = _weight_method(folder, denoiser, options)
    policy = select_policy(
        folder,
        options.policy,
        bits=options.bits,
        granularity=options.granularity,
        precision=options.precision,
        denoiser=denoiser,
        text_encoder=checkpoint.component(pipeline.quality_encoder).fingerprint,
    )
    check_replaceable(out)
    with Workspace.open(
        out, lambda: progress.note(f"another build is writing {out}; waiting for it")
    ) as workspace:
        chooser = _chooser(options, policy, steps, checkpoint, sizes, folder, backend, workspace)
        exporter = Exporter(
            checkpoint,
            sizes,
            ExportOptions(
                options.bits,
                options.weight_bits,
                options.granularity,
                weights,
                chooser,
                options.precision == "block",
            ),
            workspace,
            progress,
        )
        ranges = _ranges(checkpoint, exporter, options, shipped, workspace, progress)
        parts = []
        for shapes, exported, sampler in zip(sizes, exporter.run(ranges), samplers, strict=True):
            entry = None
            if policy is not None:
                tag = exporter.tag(shapes, text=True)
                entry = policy.export(exported.blocks, steps, shapes.batch_size, workspace, tag)
            parts.append(_Size(shapes, exported.model_copy(update={"policy": entry}), sampler))
        manifest = _manifest(
            options, model, checkpoint, exporter, parts, weights, ranges is not None, workspace
        )
        if backend is not None:
            target = compile_target(manifest, backend, lambda p: workspace.root / p, workspace, progress)
            update = {"targets": {backend.name: target}, "files": workspace.files}
            manifest = manifest.model_copy(update=update)
            _check_engine_bytes(manifest, target, options.max_engine_bytes)
        bundle = workspace.finish(manifest)
        return _report(bundle, exporter.choice, workspace, time.monotonic() - started)


@dataclass(frozen=True)
class _Size:
    """One size of a bundle, and what was made for it."""

    shapes: Shapes
    exported: Exported
    sampler: SamplerTable


def _sampler(
    checkpoint: Checkpoint, pipeline: Pipeline, options: BuildOptions, shapes: Shapes
) -> SamplerTable:
    name = options.scheduler or pipeline.scheduler
    scheduler = scheduler_from_config(
        name, read_json(checkpoint.folder / "scheduler" / "scheduler_config.json")
    )
    arguments = pipeline.timesteps(scheduler.config, options.steps, shapes.size)
    return probe_scheduler(scheduler, options.steps, name=name, timesteps=arguments)


def _chooser(
    options: BuildOptions,
    policy: SelectedPolicy | None,
    steps: int,
    checkpoint: Checkpoint,
    sizes: Sequence[Shapes],
    folder: Path | None,
    backend: Backend | None,
    workspace: Workspace,
) -> Chooser | None:
    """Return what chooses variants and fuses blocks, or nothing where all is uniform and apart."""
    if options.precision == "block" and not options.fuse:
        return None
    if policy is None:
        raise QlipError(
            "blocks are fused where a policy never tells them apart, and there is no policy",
            fix="--blocks whole, or a calibrated folder with --calibration",
        )
    if backend is None and (options.max_engine_bytes is not None or options.target_latency is not None):
        option = "--max-engine-bytes" if options.max_engine_bytes is not None else "--target-latency"
        raise QlipError(f"{option} is about engines, and an export makes none", fix="qlip-export build")
    qualities: list[float] = []
    if options.precision == "layer":
        path = own_prompts(folder, CALIBRATION)
        prompts = read_prompts(path) if path is not None else list(GENERIC_PROMPTS)
        qualities = prompt_qualities(checkpoint, policy.quality, prompts, workspace)
    return Chooser(
        policy.policy.table(steps),
        qualities,
        Limits(options.max_variants, options.max_engine_bytes, options.target_fab, options.target_latency),
        hardware(
            backend,
            options.weight_bits,
            folder,
            policy.denoiser,
            sizes[0].latents,
            sizes=len(sizes),
            previous=workspace.out,
        ),
        precision=options.precision,
        fuse=options.fuse,
        batches=any(shapes.batch_size > 1 for shapes in sizes),
    )


def _check_engine_bytes(manifest: Manifest, target: TargetEntry, limit: int | None) -> None:
    """Hold the denoiser's engines of all sizes to the budget; they were chosen by estimates of their size."""
    blocks = [block for size in manifest.sizes for block in size.blocks]
    onnx = {variant.onnx for block in blocks for variant in block.variants.values()}
    found = sum(manifest.files[target.engines[path].path].size for path in onnx)
    if limit is not None and found > limit:
        raise QlipError(
            "the engines came out larger than --max-engine-bytes",
            expected=f"at most {limit:,} bytes",
            found=f"{found:,} bytes of {len(onnx)} engines",
            fix=f"--max-engine-bytes {int(limit * limit / found)}: estimates were too low by as much",
        )


def _needs_ranges(options: BuildOptions) -> tuple[int, ...]:
    return tuple(b for b in options.bits if container_of(b) is Container.INT8)


def _shipped_ranges(folder: Path | None, denoiser: str, options: BuildOptions) -> Path | None:
    """Return the ranges that the model brings or the user names, after making sure that they fit."""
    for bits in _needs_ranges(options):
        if bits not in RANGE_BITS:
            raise QlipError(
                f"no activation ranges for {bits} bits",
                expected=", ".join(map(str, RANGE_BITS)),
                found=str(bits),
            )
    if folder is None:
        return None
    path = folder / "ranges.json"
    if not path.is_file():
        if options.calibration is None:
            return None
        raise QlipError(
            f"{folder} holds no calibration",
            expected="ranges.json",
            found="no such file",
            fix=f"qlip-export calibrate --model {options.model} -o {folder}",
        )
    ranges = Ranges.load(path)
    ranges.check(denoiser, set(), path)
    for bits in _needs_ranges(options):
        ranges.thresholds(bits)
    return path


def _weight_method(folder: Path | None, denoiser: str, options: BuildOptions) -> WeightMethod:
    """Return learned rounding where the folder has it for these weight bits, else round to nearest."""
    path = folder / WEIGHTS if folder is not None else None
    if path is None or not path.is_file() or options.weights == "nearest" or options.weight_bits == 32:
        return NEAREST
    rounding = LearnedRounding.load(path)
    if rounding.recipe.bits != options.weight_bits:
        return NEAREST
    rounding.check(denoiser, options.weight_bits, path)
    return WeightMethod("learned rounding", rounding, sha256_of(path))


def _ranges(
    checkpoint: Checkpoint,
    exporter: Exporter,
    options: BuildOptions,
    shipped: Path | None,
    workspace: Workspace,
    progress: Progress,
) -> Ranges | None:
    if not _needs_ranges(options):
        return None
    if shipped is not None:

        def copy(path: Path) -> JsonValue:
            path.write_bytes(shipped.read_bytes())
            return None

        path, _ = workspace.product(RANGES, sha256_of(shipped), copy)
        return Ranges.load(path)

    from qlip_export.calibrate import measure_ranges

    if checkpoint.random_seed is not None:
        from qlip_export.random_weights import assumed_ranges

        assumed = assumed_ranges(checkpoint, exporter.family.denoiser_folder).model_dump_json(indent=1)

        def assume(path: Path) -> JsonValue:
            progress.note("random weights: activation ranges are assumed, not measured")
            path.write_text(assumed, encoding="utf-8")
            return None

        path, _ = workspace.product(RANGES, content_key("assumed ranges", assumed), assume)
        return Ranges.load(path)

    steps, name = min(options.steps, 10), options.scheduler or exporter.pipeline.scheduler
    prompts, size = list(GENERIC_PROMPTS), options.image_sizes[0]

    def measure(path: Path) -> JsonValue:
        progress.note(
            "this model brings no calibration: measuring activation ranges on a few generic prompts"
        )
        progress.stage("calibrate", len(prompts) * steps)
        found = measure_ranges(
            checkpoint,
            prompts,
            steps=steps,
            scheduler=name,
            height=size.height,
            width=size.width,
            on_step=lambda: progress.item(""),
        )
        path.write_text(found.model_dump_json(indent=1), encoding="utf-8")
        return None

    fingerprint = checkpoint.component(exporter.family.denoiser_folder).fingerprint
    encoders = [checkpoint.component(e.name).fingerprint for e in exporter.pipeline.text_encoders]
    scheduler = read_json(checkpoint.folder / "scheduler" / "scheduler_config.json")
    package = Path(__file__).parent
    code = [
        sha256_of(package / file)
        for file in ("calibrate/ranges.py", "quant/ranges.py", "torch_pipeline.py", "pipelines.py")
    ]
    key = content_key(
        "ranges", code, fingerprint, encoders, scheduler, prompts, steps, name, (size.height, size.width)
    )
    path, _ = workspace.product(RANGES, key, measure)
    return Ranges.load(path)


def _manifest(
    options: BuildOptions,
    model: ZooModel,
    checkpoint: Checkpoint,
    exporter: Exporter,
    sizes: Sequence[_Size],
    weights: WeightMethod,
    calibrated: bool,
    workspace: Workspace,
) -> Manifest:
    first, *others = (_size_entry(exporter.pipeline, size) for size in sizes)
    exported = sizes[0].exported
    return Manifest(
        schema_version=SCHEMA_VERSION,
        qlip_export_version=__version__,
        model=ModelEntry(
            name=model.name,
            family=exporter.family.name,
            fingerprint=checkpoint.component(exporter.family.denoiser_folder).fingerprint,
            source=model.source,
            revision=model.revision,
            lora=tuple(str(LoraRef.parse(text)) for text in options.lora),
            random_weights=checkpoint.random_seed,
            parameters=exported.parameters,
        ),
        bits=options.bits,
        granularity=options.granularity,
        precision=options.precision,
        quantization=QuantizationEntry(
            weight_bits=options.weight_bits,
            weight_method="none" if options.weight_bits == 32 else weights.name,
            ranges=RANGES if calibrated else None,
        ),
        **{**dict(first), "policy": exported.policy},
        other_sizes=tuple(others),
        guidance=exporter.pipeline.guidance(checkpoint.index),
        quality_encoder=exporter.pipeline.quality_encoder,
        targets={},
        versions={
            "python": platform.python_version(),
            **{
                name: metadata.version(name)
                for name in ("torch", "diffusers", "transformers", "onnx", "onnx-ir")
            },
        },
        files=workspace.files,
    )


def _size_entry(pipeline: Pipeline, size: _Size) -> SizeEntry:
    shapes, exported = size.shapes, size.exported
    return SizeEntry(
        shapes=ShapesEntry(
            batch_size=shapes.batch_size,
            latents=shapes.latents,
            image=(shapes.image_height, shapes.image_width),
        ),
        inputs=exported.inputs,
        conditioning=pipeline.inputs(shapes.size),
        blocks=exported.blocks,
        text_encoders=exported.text_encoders,
        vae_decoder=exported.vae_decoder,
        policy=None if exported.policy is None else exported.policy.onnx,
        sampler=size.sampler,
    )


def _report(bundle: Bundle, choice: Choice | None, workspace: Workspace, seconds: float) -> BuildReport:
    manifest = bundle.manifest
    target = next(iter(manifest.targets.values()), None)
    return BuildReport(
        bundle=str(bundle.root),
        model=manifest.model.name,
        sizes=tuple(size.shapes.label for size in manifest.sizes),
        backend=target.backend if target else None,
        device=target.device if target else None,
        bits=manifest.bits,
        random_weights=manifest.model.random_weights,
        policy=manifest.policy.name if manifest.policy else None,
        weights=manifest.quantization.weight_method,
        blocks=len(manifest.blocks),
        unfused=sum(map(len, choice.runs)) if choice else len(manifest.blocks),
        variants=choice.rows if choice else (),
        chosen=choice.chosen if choice else None,
        engines=sum(path.startswith("engines/") for path in manifest.files),
        built=workspace.built,
        reused=workspace.reused,
        bytes=manifest.bytes_by_kind,
        seconds=round(seconds, 1),
    )
