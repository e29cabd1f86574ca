"""`qlip-export calibrate`: the stages in their order, each with its result and its recipe on disk.

A stage whose recipe is already there, made with the same settings, is not run again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from qlip_export.calibrate.bits import LEARNING_RATE, Plan, bit_costs, train_q2b
from qlip_export.calibrate.latency import latency_costs
from qlip_export.calibrate.quality import MIXTURE, Drawn, draw, predicted, raw_labels, scaled, train_t2q
from qlip_export.calibrate.ranges import measure_ranges
from qlip_export.calibrate.trajectories import Trajectories, record
from qlip_export.calibrate.weights import blocks_of, learn_rounding, quantized_weights
from qlip_export.capture import denoiser_family
from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError
from qlip_export.features import FeatureExtractor, images_of, joined
from qlip_export.files import content_key, written_aside
from qlip_export.policy.q2b import Part
from qlip_export.policy.store import (
    Criterion,
    Policy,
    PolicyRecipe,
    Quality,
    QualityRecipe,
    Unit,
    policy_name,
)
from qlip_export.progress import Progress
from qlip_export.quant.ranges import Ranges
from qlip_export.quant.rounding import LearnedRounding, RoundingRecipe
from qlip_export.quant.weights import round_to_nearest
from qlip_export.simulate import Simulator
from qlip_export.spec import Frozen, Granularity, container_of

Stage = Literal["ranges", "weights", "t2q", "q2b"]
STAGES: tuple[Stage, ...] = get_args(Stage)
WEIGHT_BITS = 4


class CalibrateOptions(Frozen):
    """Everything a calibration can be asked for."""

    stages: tuple[Stage, ...] = STAGES
    bit_options: tuple[int, ...] = (8, 16, 32)
    unit: Unit = "block"
    granularity: Granularity = "coarse"
    criterion: Criterion = "quality"
    parts: tuple[Part, ...] | None = Field(None, description="all that fit the number of options")
    cost: Literal["bits", "latency"] = "bits"
    lambda_bit: float | None = Field(None, gt=0)
    target_fab: float | None = Field(None, gt=0)
    bundle: Path | None = Field(None, description="whose engines are timed for the latency cost")
    reference: Path | None = Field(None, description="real images that GIQA's mixture is fitted to")
    device: Literal["cpu", "cuda"] = "cpu"
    steps: int = Field(25, ge=1, le=1000)
    scheduler: str = "dpmsolver++"
    guidance: float = 4.0
    seed: int = Field(0, ge=0)
    batch_size: int = Field(32, ge=1, description="images drawn at a time")
    limit: int | None = Field(None, ge=1, description="prompts of each stage at most")
    iterations: int | None = Field(None, ge=1, description="of the weights and q2b stages")
    groups: int = Field(5, ge=1)
    forced_steps: int = Field(2, ge=0)

    @field_validator("bit_options")
    @classmethod
    def _increasing(cls, options: tuple[int, ...]) -> tuple[int, ...]:
        for option in options:
            container_of(option)
        if not 2 <= len(options) <= 4 or list(options) != sorted(set(options)):
            raise QlipError(
                "two to four increasing bit options are needed",
                expected="e.g. 8,16,32",
                found=",".join(map(str, options)),
            )
        return options

    @model_validator(mode="after")
    def _one_weight(self) -> CalibrateOptions:
        if self.lambda_bit is not None and self.target_fab is not None:
            raise QlipError(
                "lambda_bit and a target FAB exclude each other", fix="give one of --lambda-bit, --target-fab"
            )
        return self

    @property
    def learned_parts(self) -> tuple[Part, ...]:
        """The parts to learn: those asked for, or all that fit."""
        if self.parts is not None:
            return self.parts
        return ("q",) if len(self.bit_options) == 2 else ("q", "m", "h")

    def first(self, prompts: Sequence[str], count: int) -> list[str]:
        """Return the first ``count`` prompts, or fewer if there is a limit."""
        return list(prompts[: min(count, self.limit or count)])


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


class CalibrationReport(Frozen):
    """What a calibration did, as `--json` prints it."""

    folder: str
    files: dict[str, str] = Field(description="stage -> its result")
    reused: tuple[str, ...] = Field(description="stages whose result was there already")
    measured: dict[str, float]


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
        self._reused: list[str] = []
        self._measured: dict[str, float] = {}

    def run(self, progress: Progress) -> CalibrationReport:
        """Run the stages asked for, in their order.

        Raises:
            QlipError: A stage lacks the result of one before it, or anything else the user can mend.
        """
        self._progress = progress
        stages = {"ranges": self.ranges, "weights": self.weights, "t2q": self.t2q, "q2b": self.q2b}
        files: dict[str, str] = {name: str(stages[name]()) for name in STAGES if name in self._options.stages}
        return CalibrationReport(
            folder=str(self._folder),
            files=files,
            reused=tuple(self._reused),
            measured={k: round(v, 6) for k, v in self._measured.items()},
        )

    @cached_property
    def denoiser(self) -> str:
        """Fingerprint of the denoiser."""
        return self._checkpoint.component(self._family.denoiser_folder).fingerprint

    def ranges(self) -> Path:
        """Measure activation ranges; return their file."""
        path, options = self._folder / "ranges.json", self._options
        prompts = options.first(self._prompts, SIZES.range_prompts)
        if path.is_file():
            found = Ranges.load(path)
            recipe = found.recipe
            if (
                found.fingerprint,
                recipe.prompts_sha256,
                recipe.steps,
                recipe.scheduler,
                recipe.guidance,
                recipe.seed,
            ) == (
                self.denoiser,
                hash_of(prompts),
                options.steps,
                options.scheduler,
                options.guidance,
                options.seed,
            ):
                self._reused.append("ranges")
                return path
        self._progress.stage("ranges", len(prompts) * options.steps)
        ranges = measure_ranges(
            self._checkpoint,
            prompts,
            steps=options.steps,
            scheduler=options.scheduler,
            guidance=options.guidance,
            seed=options.seed,
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
            "scheduler": options.scheduler,
            "guidance": options.guidance,
            "iterations": options.iterations or SIZES.weight_iterations,
            "batch": min(SIZES.weight_batch, samples),
            "seed": options.seed,
        }
        if path.is_file() and settings.items() <= LearnedRounding.load(path).recipe.model_dump().items():
            self._reused.append("weights")
            return path
        simulator = self.simulator()
        trajectories = self.record(simulator, prompts)
        self._progress.stage("weights", len(blocks_of(simulator.denoiser)))
        learned = learn_rounding(
            simulator,
            trajectories,
            bits=WEIGHT_BITS,
            samples=samples,
            iterations=options.iterations or SIZES.weight_iterations,
            batch=min(SIZES.weight_batch, samples),
            seed=options.seed,
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
        self._measured |= {"error_nearest": learned.error_nearest, "error_learned": learned.error_learned}
        return path

    def t2q(self) -> Path:
        """Label images and train T2Q; return the network's file."""
        options, criterion = self._options, self._options.criterion
        path = Quality.path(self._folder, criterion)
        prompts = options.first(self._prompts, SIZES.label_prompts)
        reference = self._reference_features()
        settings = {
            "text_encoder": self._checkpoint.component("text_encoder").fingerprint,
            "denoiser": self.denoiser,
            "criterion": criterion,
            "prompts": len(prompts),
            "prompts_sha256": hash_of(prompts),
            "reference": None if reference is None else len(reference),
            "steps": options.steps,
            "scheduler": options.scheduler,
            "guidance": options.guidance,
            "seed": options.seed,
            "mixture": MIXTURE if criterion == "quality" else None,
            "epochs": SIZES.epochs,
        }
        if (
            path.is_file()
            and settings.items() <= Quality.load(self._folder, criterion).recipe.model_dump().items()
        ):
            self._reused.append("t2q")
            return path
        simulator = self.simulator()
        drawn = self._drawn(simulator, prompts)
        raw = raw_labels(drawn, criterion, reference, seed=options.seed)
        labels, low, high = scaled(raw)
        self._progress.stage("t2q", 1)
        self._progress.item(f"{SIZES.epochs} epochs")
        trained = train_t2q(
            simulator.projection, simulator.pooled(prompts), labels, epochs=SIZES.epochs, seed=options.seed
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
            self._checkpoint.component("text_encoder").fingerprint,
            Quality.path(self._folder, options.criterion),
        )
        name = policy_name(
            options.bit_options, options.unit, options.criterion, options.learned_parts, options.cost
        )
        prompts = options.first(self._prompts, SIZES.bit_prompts)
        iterations = options.iterations or SIZES.bit_iterations
        simulator = self.simulator(quantized=True)
        units, unit_of_layer = self._units(simulator)
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
            batch=min(SIZES.bit_batch, 4 * len(prompts)),
            seed=options.seed,
        )
        recipe = {
            "denoiser": self.denoiser,
            "options": options.bit_options,
            "unit": options.unit,
            "granularity": options.granularity,
            "units": units,
            "parts": options.learned_parts,
            "criterion": options.criterion,
            "t2q_sha256": quality.sha256,
            "cost": options.cost,
            "steps": options.steps,
            "groups": options.groups,
            "forced_steps": options.forced_steps,
            "scheduler": options.scheduler,
            "guidance": options.guidance,
            "prompts": len(prompts),
            "prompts_sha256": hash_of(prompts),
            "iterations": iterations,
            "batch": plan.batch,
            "learning_rate": LEARNING_RATE,
            "seed": options.seed,
            "target_fab": options.target_fab,
        }
        path = Policy.path(self._folder, name)
        if path.is_file():
            found = Policy.load(self._folder, name).recipe
            same_lambda = options.lambda_bit in (None, found.lambda_bit)
            if same_lambda and recipe.items() <= found.model_dump().items():
                self._reused.append("q2b")
                return path
        trajectories = self.record(self.simulator(), prompts)
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
        made = PolicyRecipe.model_validate(
            {**recipe, "lambda_bit": learned.lambda_bit, "fab": learned.fab, "error": learned.error}
        )
        return Policy(learned.q2b, made).save(self._folder, name)

    def simulator(self, *, quantized: bool = False) -> Simulator:
        """Return the model at full precision, or with quantized weights and activation ranges."""
        options, ranges = self._options, None
        path = self._folder / "ranges.json"
        if quantized:
            ranges = Ranges.load(path)
        simulator = Simulator(
            self._checkpoint,
            device=options.device,
            ranges=ranges,
            scheduler=options.scheduler,
            steps=options.steps,
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
            guidance=self._options.guidance,
            seed=self._options.seed,
            batch_size=size,
            on_batch=lambda: self._progress.item(""),
        )

    def _drawn(self, simulator: Simulator, prompts: list[str]) -> Drawn:
        """Draw the images to label, or read what an earlier run kept of them: this takes the longest."""
        options = self._options
        key = content_key(
            "drawn",
            self.denoiser,
            self._checkpoint.component("text_encoder").fingerprint,
            self._checkpoint.component("vae").fingerprint,
            hash_of(prompts),
            options.steps,
            options.scheduler,
            options.guidance,
            options.seed,
        )
        path = self._folder / ".cache" / f"drawn-{key}.safetensors"
        if path.is_file():
            from safetensors.numpy import load_file

            try:
                return Drawn(**{k: v.astype(np.float32) for k, v in load_file(path).items()})
            except safetensors.SafetensorError:
                path.unlink()  # an interrupted copy; drawing again mends it
        extractor = FeatureExtractor(self._checkpoint.folder, device=options.device)
        self._progress.stage("draw", -(-len(prompts) // options.batch_size))
        drawn = draw(
            simulator,
            prompts,
            lambda images: torch.from_numpy(extractor(images)["embedding"]),
            guidance=options.guidance,
            seed=options.seed,
            batch_size=options.batch_size,
            on_images=lambda _: self._progress.item(""),
        )
        from safetensors.numpy import save_file

        with written_aside(path) as aside:
            save_file({k: np.ascontiguousarray(v) for k, v in vars(drawn).items()}, aside)
        return drawn

    def _reference_features(self) -> NDArray[np.float32] | None:
        """Return features of the real images, (M, D), from a folder of images or a file of features."""
        path = self._options.reference
        if path is None or self._options.criterion != "quality":
            return None
        if path.is_dir():
            extractor = FeatureExtractor(self._checkpoint.folder, device=self._options.device)
            return joined(map(extractor, images_of(path)))["embedding"]
        from safetensors.numpy import load_file

        try:
            return load_file(path)["embedding"].astype(np.float32)
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            raise QlipError(
                f"cannot read reference features from {path}",
                expected="a folder of images, or safetensors with a tensor 'embedding'",
                found=str(error).splitlines()[0],
            ) from error

    def _units(self, simulator: Simulator) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return the names of the units, and the unit of each layer."""
        if self._options.unit == "layer":
            return simulator.layers, tuple(range(len(simulator.layers)))
        blocks = [self._family.block_of(name, self._options.granularity) for name in simulator.layers]
        if None in blocks:
            raise QlipError(
                f"layer {simulator.layers[blocks.index(None)]!r} lies outside of all blocks",
                fix="name it in qlip_export/families/",
            )
        units = tuple(dict.fromkeys(b for b in blocks if b is not None))
        return units, tuple(units.index(b) for b in blocks if b is not None)

    def _costs(
        self, simulator: Simulator, units: tuple[str, ...], unit_of_layer: tuple[int, ...]
    ) -> torch.Tensor:
        options = self._options
        if options.cost == "bits":
            return bit_costs(options.bit_options, unit_of_layer, len(units))
        return latency_costs(
            options.bundle,
            self._folder / "latency.json",
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
        )


def hash_of(prompts: Sequence[str]) -> str:
    """Return the SHA-256 of a list of prompts, one a line."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()
