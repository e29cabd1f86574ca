"""`qlip-export calibrate`: the stages in their order, each with its result and its recipe on disk.

A stage whose recipe is already there, made with the same settings, is not run again.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray

from qlip_export.bundle import Bundle
from qlip_export.calibrate import kept
from qlip_export.calibrate.bits import LAMBDA_BIT, LEARNING_RATE, TRAINER, Plan, bit_costs, train_q2b
from qlip_export.calibrate.latency import latency_costs, measure_latencies, read_latencies
from qlip_export.calibrate.options import STAGES, CalibrateOptions, CalibrationReport, Stage
from qlip_export.calibrate.quality import (
    LEAST_LABELS,
    MIXTURE,
    Drawn,
    draw,
    predicted,
    prompt_lengths,
    raw_labels,
    scaled,
    train_t2q,
)
from qlip_export.calibrate.ranges import hash_of, measure_ranges
from qlip_export.calibrate.trajectories import Trajectories, record
from qlip_export.calibrate.weights import LEARNER, blocks_of, learn_rounding, quantized_weights
from qlip_export.capture import denoiser_family, shapes_of
from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError
from qlip_export.features import FeatureExtractor, has_vision_tower, images_of, joined
from qlip_export.files import content_key, sha256_of, written_aside
from qlip_export.pipelines import pipeline_of
from qlip_export.policy.store import (
    Policy,
    PolicyRecipe,
    Quality,
    QualityRecipe,
    policy_name,
)
from qlip_export.progress import Progress, batches
from qlip_export.quant.ranges import Ranges, Recipe
from qlip_export.quant.rounding import LearnedRounding, RoundingRecipe
from qlip_export.quant.weights import round_to_nearest
from qlip_export.simulate import Simulator, text_projection
from qlip_export.spec import Frozen
from qlip_export.torch_pipeline import require_device

WEIGHT_BITS = 4
TARGET_MISSED = 0.02
"""Relative distance from the target FAB that is worth a word."""
SAID_LATELY = ("reference_sha256",)
"""Fields that recipes lack which were written before there was such a field."""
_UNIFORM = "--stages ranges,weights for uniform bits"


@dataclass(frozen=True)
class Sizes:
    """How much of everything, where the options do not say otherwise."""

    range_prompts: int = 32
    weight_prompts: int = 256
    weight_samples: int = 1024
    weight_iterations: int = 1500
    weight_batch: int = 32
    label_prompts: int = 12_000
    epochs: int = 60
    bit_prompts: int = 1500
    bit_iterations: int = 500
    bit_batch: int = 32


SIZES = Sizes()


class Calibration:
    """Runs stages for one model into one folder."""

    def __init__(
        self, checkpoint: Checkpoint, prompts: Sequence[str], options: CalibrateOptions, folder: Path
    ) -> None:
        """Nothing is computed before `run`."""
        self._checkpoint, self._prompts, self._options = checkpoint, list(prompts), options
        self._folder = folder
        self._family = denoiser_family(checkpoint)
        self._progress: Progress
        self._kind = pipeline_of(self._family.name)
        self._scheduler = options.scheduler or self._kind.scheduler
        own = self._kind.guidance(checkpoint.index).scale
        self._guidance = own if options.guidance is None else options.guidance
        size = shapes_of(checkpoint, batch_size=1, height=options.height, width=options.width).size.image
        self._size = None if options.height is options.width is None else size
        self._reused: list[str] = []
        self._measured: dict[str, float] = {}

    def run(self, progress: Progress) -> CalibrationReport:
        """Run the stages asked for, in their order.

        Raises:
            QlipError: A stage lacks the result of one before it, or anything else the user can mend.
        """
        self._progress = progress
        self._check()
        stages = {"ranges": self.ranges, "weights": self.weights, "t2q": self.t2q, "q2b": self.q2b}
        files: dict[str, str] = {}
        seconds: dict[str, float] = {}
        memory: dict[str, int] = {}
        gpu = self._options.device == "cuda"
        for name in (name for name in STAGES if name in self._options.stages):
            self._free()
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            started = time.monotonic()
            try:
                files[name] = str(stages[name]())
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                raise self._too_large(name) from error
            seconds[name] = round(time.monotonic() - started, 1)
            if gpu:
                memory[name] = torch.cuda.max_memory_allocated()
        return CalibrationReport(
            folder=str(self._folder),
            random_weights=self._checkpoint.random_seed,
            files=files,
            reused=tuple(self._reused),
            seconds=seconds,
            gpu_bytes=memory,
            measured={k: round(v, 6) for k, v in self._measured.items()},
        )

    def _free(self) -> None:
        """Let go of the models before: their hooks refer to them, and only Python's collector sees that."""
        gc.collect()
        if self._options.device == "cuda":
            torch.cuda.empty_cache()

    def _too_large(self, stage: Stage) -> QlipError:
        free, total = torch.cuda.mem_get_info()
        size = self._options.batch_size
        ways = []
        if stage != "ranges" and size > 1:
            ways.append(f"--batch-size {size // 2}, which changes results no more than float sums do")
        if stage in ("weights", "q2b"):
            ways.append("a lower --limit, for a shorter training")
        ways.append("a GPU with more")
        return QlipError(
            f"the GPU has too little memory for {stage} with --batch-size {size}",
            found=f"{total / 1e9:.0f} GB in all, {free / 1e9:.1f} GB free now",
            fix=f"{'; '.join(ways)}. Stages, drawn images and blocks that are done are kept",
        )

    def _check(self) -> None:
        """Refuse now what a later stage would refuse after hours of work."""
        options, folder = self._options, self._checkpoint.folder
        require_device(options.device)
        if "t2q" in options.stages:
            count = len(options.first(self._prompts, SIZES.label_prompts))
            if count < LEAST_LABELS:
                raise QlipError(
                    "too few prompts to learn a policy from",
                    expected=f"{LEAST_LABELS} or more; the emoji model has 12,000",
                    found=str(count),
                    fix=f"--prompts with a longer file, or {_UNIFORM}",
                )
            text_projection(self._checkpoint)
            if options.criterion == "quality" and not has_vision_tower(folder):
                raise QlipError(
                    f"{folder} has no vision tower to judge images by",
                    expected="a CLIPVisionModelWithProjection in its folder image_encoder",
                    found=f"no {folder / 'image_encoder' / 'config.json'}",
                    fix=f"--criterion complexity, which needs none, or {_UNIFORM}",
                )
            _ = self._reference
        if "q2b" in options.stages and options.cost == "latency":
            if options.bundle is None:
                read_latencies(self._latencies)
            else:
                Bundle.open(options.bundle)

    @cached_property
    def denoiser(self) -> str:
        """Fingerprint of the denoiser."""
        return self._checkpoint.component(self._family.denoiser_folder).fingerprint

    @property
    def _quality_encoder(self) -> str:
        """Fingerprint of the text encoder whose pooled embedding T2Q reads."""
        return self._checkpoint.component(self._kind.quality_encoder).fingerprint

    @property
    def _latencies(self) -> Path:
        return self._folder / "latency.json"

    def ranges(self) -> Path:
        """Measure activation ranges; return their file."""
        path, options = self._folder / "ranges.json", self._options
        prompts = options.first(self._prompts, SIZES.range_prompts)
        recipe = Recipe(
            prompts_sha256=hash_of(prompts),
            prompts=len(prompts),
            steps=options.steps,
            scheduler=self._scheduler,
            guidance=self._guidance,
            seed=options.seed,
            size=self._size,
            random_weights=self._checkpoint.random_seed,
        )
        settings = {"fingerprint": self.denoiser, "recipe": recipe.model_dump()}
        if self._is_there("ranges", path, settings, lambda: Ranges.load(path)):
            return path
        self._progress.stage("ranges", len(prompts) * options.steps)
        ranges = measure_ranges(
            self._checkpoint,
            prompts,
            steps=options.steps,
            scheduler=self._scheduler,
            guidance=self._guidance,
            seed=options.seed,
            height=options.height,
            width=options.width,
            device=options.device,
            on_step=lambda: self._progress.item(""),
        )
        with written_aside(path) as aside:
            aside.write_text(ranges.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return path

    def weights(self) -> Path:
        """Learn the rounding of the weights; return its file."""
        path, options = self._folder / "weights.safetensors", self._options
        prompts = options.first(self._prompts, SIZES.weight_prompts)
        samples = min(SIZES.weight_samples, len(prompts) * options.steps)
        settings = {
            "fingerprint": self.denoiser,
            "bits": WEIGHT_BITS,
            "prompts": len(prompts),
            "prompts_sha256": hash_of(prompts),
            "samples": samples,
            "steps": options.steps,
            "scheduler": self._scheduler,
            "guidance": self._guidance,
            "iterations": options.iterations or SIZES.weight_iterations,
            "batch": min(SIZES.weight_batch, samples),
            "seed": options.seed,
            "size": self._size,
            "random_weights": self._checkpoint.random_seed,
        }
        if self._is_there("weights", path, settings, lambda: LearnedRounding.load(path).recipe):
            return path
        simulator = self.simulator()
        trajectories = self.record(simulator, prompts)
        self._progress.stage("weights", len(blocks_of(simulator)))
        blocks = kept.KeptBlocks(self._folder / ".cache" / f"weights-{content_key(LEARNER, settings)}")
        learned = learn_rounding(
            simulator,
            trajectories,
            bits=WEIGHT_BITS,
            samples=samples,
            iterations=options.iterations or SIZES.weight_iterations,
            batch=min(SIZES.weight_batch, samples),
            at_once=options.batch_size,
            seed=options.seed,
            store=blocks,
            on_block=self._progress.item,
        )
        recipe = RoundingRecipe.model_validate(
            {
                **settings,
                "flipped": learned.flipped,
                "error_nearest": learned.error_nearest,
                "error_learned": learned.error_learned,
            }
        )
        LearnedRounding.of(recipe, learned.up, learned.scale).save(path)
        blocks.remove()
        self._measured |= {"error_nearest": learned.error_nearest, "error_learned": learned.error_learned}
        return path

    def t2q(self) -> Path:
        """Label images and train T2Q; return the network's file."""
        options, criterion = self._options, self._options.criterion
        path = Quality.path(self._folder, criterion)
        prompts = options.first(self._prompts, SIZES.label_prompts)
        reference = self._reference
        features = None if reference is None else hashlib.sha256(reference.tobytes()).hexdigest()
        settings = {
            "text_encoder": self._quality_encoder,
            "denoiser": self.denoiser,
            "criterion": criterion,
            "prompts": len(prompts),
            "prompts_sha256": hash_of(prompts),
            "reference": None if reference is None else len(reference),
            "reference_sha256": features,
            "steps": options.steps,
            "scheduler": self._scheduler,
            "guidance": self._guidance,
            "seed": options.seed,
            "size": self._size,
            "random_weights": self._checkpoint.random_seed,
            "mixture": MIXTURE if criterion == "quality" else None,
            "epochs": SIZES.epochs,
        }
        if self._is_there("t2q", path, settings, lambda: Quality.load(self._folder, criterion).recipe):
            return path
        simulator = self.simulator()
        if criterion == "length":
            raw = prompt_lengths(simulator, prompts)
        else:
            raw = raw_labels(self._drawn(simulator, prompts), criterion, reference, seed=options.seed)
        labels, low, high = scaled(raw)
        self._progress.stage("t2q", SIZES.epochs)
        self._progress.detail("text embeddings")
        trained = train_t2q(
            simulator.projection,
            simulator.pooled(prompts),
            labels,
            epochs=SIZES.epochs,
            seed=options.seed,
            on_epoch=lambda: self._progress.item("epochs"),
        )
        recipe = QualityRecipe.model_validate(
            {
                **settings,
                "low": low,
                "high": high,
                "held_out": trained.held_out,
                "srocc": trained.srocc,
                "plcc": trained.plcc,
            }
        )
        self._measured |= {"srocc": trained.srocc, "plcc": trained.plcc}
        return Quality(trained.network, recipe).save(self._folder)

    def q2b(self) -> Path:
        """Train Q2B against the fake-quantized denoiser; return the policy's file."""
        options = self._options
        quality = Quality.load(self._folder, options.criterion)
        quality.check(
            self._quality_encoder,
            Quality.path(self._folder, options.criterion),
        )
        name = policy_name(
            options.bit_options, options.unit, options.criterion, options.learned_parts, options.cost
        )
        prompts = options.first(self._prompts, SIZES.bit_prompts)
        iterations = options.iterations or SIZES.bit_iterations
        Ranges.load(self._folder / "ranges.json")
        if options.bundle is not None and options.cost == "latency":
            measure_latencies(options.bundle, self._latencies)
        batch = min(SIZES.bit_batch, 4 * len(prompts))
        rounding = self._folder / "weights.safetensors"
        recipe = {
            "denoiser": self.denoiser,
            "options": options.bit_options,
            "unit": options.unit,
            "granularity": options.granularity,
            "parts": options.learned_parts,
            "criterion": options.criterion,
            "t2q_sha256": quality.sha256,
            "cost": options.cost,
            "steps": options.steps,
            "groups": options.groups,
            "forced_steps": options.forced_steps,
            "scheduler": self._scheduler,
            "guidance": self._guidance,
            "prompts": len(prompts),
            "prompts_sha256": hash_of(prompts),
            "iterations": iterations,
            "batch": batch,
            "learning_rate": LEARNING_RATE,
            "seed": options.seed,
            "size": self._size,
            "random_weights": self._checkpoint.random_seed,
            "target_fab": options.target_fab,
            "ranges_sha256": sha256_of(self._folder / "ranges.json"),
            "weights": sha256_of(rounding) if rounding.is_file() else "nearest",
            "trainer": TRAINER,
        }
        if options.cost == "latency":
            recipe["latency_sha256"] = sha256_of(self._latencies)
        if options.target_fab is None:
            recipe["lambda_bit"] = options.lambda_bit or LAMBDA_BIT
        path = Policy.path(self._folder, name)
        if self._is_there("q2b", path, recipe, lambda: Policy.load(self._folder, name).recipe):
            return path
        trajectories = self.record(self.simulator(), prompts)
        self._free()
        simulator = self.simulator(quantized=True)
        units, unit_of_layer = self._family.units_of(simulator.layers, options.unit, options.granularity)
        plan = Plan(
            options=options.bit_options,
            parts=frozenset(options.learned_parts),
            units=units,
            unit_of_layer=unit_of_layer,
            costs=self._costs(simulator, units, unit_of_layer),
            groups=options.groups,
            forced_steps=options.forced_steps,
            lambda_bit=options.lambda_bit,
            target_fab=options.target_fab,
            iterations=iterations,
            batch=batch,
            at_once=options.batch_size,
            seed=options.seed,
        )
        self._progress.stage("q2b", iterations)
        qualities = predicted(self._folder, options.criterion, simulator, prompts)
        learned = train_q2b(
            simulator,
            trajectories,
            qualities,
            plan,
            lambda fab, error: self._progress.item(f"FAB {fab:.2f}, error {error:.5f}"),
        )
        self._measured |= {"fab": learned.fab, "error": learned.error, "lambda_bit": learned.lambda_bit}
        if options.target_fab is not None and abs(learned.fab / options.target_fab - 1) > TARGET_MISSED:
            self._progress.note(
                f"the target FAB of {options.target_fab:g} was missed: the policy has {learned.fab:.2f}"
            )
        made = PolicyRecipe.model_validate(
            {
                **recipe,
                "units": units,
                "lambda_bit": learned.lambda_bit,
                "fab": learned.fab,
                "error": learned.error,
            }
        )
        return Policy(learned.q2b, made).save(self._folder, name)

    def simulator(self, *, quantized: bool = False) -> Simulator:
        """Return the model at full precision, or with quantized weights and activation ranges."""
        options, ranges = self._options, None
        path = self._folder / "ranges.json"
        if quantized:
            ranges = Ranges.load(path)
            ranges.check(self.denoiser, set(), path)
        simulator = Simulator(
            self._checkpoint,
            device=options.device,
            ranges=ranges,
            scheduler=self._scheduler,
            steps=options.steps,
            height=options.height,
            width=options.width,
        )
        if quantized:
            rounding = self._folder / "weights.safetensors"
            quantize = LearnedRounding.load(rounding) if rounding.is_file() else round_to_nearest
            if isinstance(quantize, LearnedRounding):
                quantize.check(self.denoiser, WEIGHT_BITS, rounding)
            simulator.set_weights(
                quantized_weights(self._checkpoint, simulator.all_layers, quantize, WEIGHT_BITS)
            )
        return simulator

    def record(self, simulator: Simulator, prompts: list[str]) -> Trajectories:
        """Return full-precision runs over ``prompts``."""
        size = self._options.batch_size
        self._progress.stage("sample", -(-len(prompts) // size))
        return record(
            simulator,
            prompts,
            guidance=self._guidance,
            seed=self._options.seed,
            batch_size=size,
            on_batch=lambda: self._progress.item(""),
        )

    def _is_there(
        self, stage: Stage, path: Path, settings: Mapping[str, object], load: Callable[[], Frozen]
    ) -> bool:
        """Say whether the result of a stage is there, whole, and made with these settings."""
        if not path.is_file():
            return False
        try:
            found = load().model_dump()
        except QlipError:
            self._progress.note(f"{path} is damaged or not of this version: it is made again")
            return False
        # What older recipes do not say cannot differ.
        unsaid = {name for name in SAID_LATELY if found.get(name) is None}
        if any(found[name] != value for name, value in settings.items() if name not in unsaid):
            return False
        self._reused.append(stage)
        return True

    def _drawn(self, simulator: Simulator, prompts: list[str]) -> Drawn:
        """Draw the images to label, or read what an earlier run kept of them: this takes the longest."""
        options = self._options
        judged = options.criterion == "quality"
        key = content_key(
            "drawn",
            self.denoiser,
            "".join(self._checkpoint.component(e.name).fingerprint for e in self._kind.text_encoders),
            self._checkpoint.component("vae").fingerprint,
            hash_of(prompts),
            options.steps,
            self._scheduler,
            self._guidance,
            options.seed,
            self._size,
        )
        # Images drawn for another criterion will do, if that needed features or this one does not.
        path = self._folder / ".cache" / f"drawn-{key}.safetensors"
        plain = self._folder / ".cache" / f"complexity-{key}.safetensors"
        for file in (path,) if judged else (path, plain):
            if (found := kept.read_drawn(file)) is not None:
                return found
        wanted = path if judged else plain
        extractor = FeatureExtractor(self._checkpoint.folder, device=options.device) if judged else None
        missing = [part for part, file in kept.part_files(len(prompts), wanted) if not file.is_file()]
        counts = [len(prompts[part]) for part in missing]
        self._progress.stage("draw", sum(-(-count // options.batch_size) for count in counts))

        def draw_part(part: slice) -> Drawn:
            return draw(
                simulator,
                prompts[part],
                lambda images: (
                    torch.from_numpy(extractor(images)["embedding"])
                    if extractor
                    else torch.empty(len(images), 0)
                ),
                guidance=self._guidance,
                seed=options.seed + part.start,
                batch_size=options.batch_size,
                on_images=lambda _: self._progress.item(""),
            )

        return kept.drawn_in_parts(len(prompts), wanted, draw_part)

    @cached_property
    def _reference(self) -> NDArray[np.float32] | None:
        """Features of the real images, (M, D), from a folder of images or a file of features."""
        path = self._options.reference
        if path is None or self._options.criterion != "quality":
            return None
        if path.is_dir():
            extractor = FeatureExtractor(self._checkpoint.folder, device=self._options.device)
            images = images_of(path, on_batch=batches(self._progress, "reference"))
            return joined(map(extractor, images))["embedding"]
        from safetensors.numpy import load_file

        try:
            return load_file(path)["embedding"].astype(np.float32)
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            raise QlipError(
                f"cannot read reference features from {path}",
                expected="a folder of images, or safetensors with a tensor 'embedding'",
                found=str(error).splitlines()[0],
            ) from error

    def _costs(
        self, simulator: Simulator, units: tuple[str, ...], unit_of_layer: tuple[int, ...]
    ) -> torch.Tensor:
        options = self._options
        if options.cost == "bits":
            return bit_costs(options.bit_options, unit_of_layer, len(units))
        return latency_costs(
            self._latencies,
            options.bit_options,
            {
                layer: (self._family.block_of(layer, options.granularity) or "", units[unit], macs)
                for layer, unit, macs in zip(
                    simulator.layers,
                    unit_of_layer,
                    (simulator.layer_macs[name] for name in simulator.layers),
                    strict=True,
                )
            },
            units,
            self.denoiser,
        )


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether a full GPU is behind this: libraries say it in words, and recordings end otherwise."""
    told = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in told or "alloc_failed" in told:
        return True
    return error.__context__ is not None and _is_out_of_memory(error.__context__)
