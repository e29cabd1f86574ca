"""What a calibration can be asked for, and what it reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, field_validator, model_validator

from qlip_export.errors import QlipError
from qlip_export.policy.q2b import Part, check_parts
from qlip_export.policy.store import Criterion
from qlip_export.quant.ranges import RANGE_BITS
from qlip_export.spec import Container, Frozen, Granularity, Unit, container_of

Stage = Literal["ranges", "weights", "t2q", "q2b"]
STAGES: tuple[Stage, ...] = get_args(Stage)


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
    scheduler: str | None = Field(None, description="the family's own if absent")
    guidance: float | None = Field(None, allow_inf_nan=False, description="the family's own if absent")
    height: int | None = Field(None, ge=1, description="of the images, pixels; the model's own if absent")
    width: int | None = Field(None, ge=1, description="the same")
    seed: int = Field(0, ge=0)
    batch_size: int = Field(32, ge=1, description="images drawn, or trained on, at a time")
    limit: int | None = Field(None, ge=1, description="prompts of each stage at most")
    iterations: int | None = Field(None, ge=1, description="of the weights and q2b stages")
    groups: int = Field(5, ge=1)
    forced_steps: int = Field(2, ge=0)

    @field_validator("bit_options")
    @classmethod
    def _measurable(cls, options: tuple[int, ...]) -> tuple[int, ...]:
        for option in options:
            if container_of(option) is Container.INT8 and option not in RANGE_BITS:
                raise QlipError(
                    f"no activation ranges are measured for {option} bits",
                    expected=", ".join(str(b) for b in RANGE_BITS if b <= 8),
                    found=str(option),
                )
        return options

    @model_validator(mode="after")
    def _consistent(self) -> CalibrateOptions:
        check_parts(self.bit_options, frozenset(self.learned_parts))
        if self.lambda_bit is not None and self.target_fab is not None:
            raise QlipError(
                "lambda_bit and a target FAB exclude each other", fix="give one of --lambda-bit, --target-fab"
            )
        low, high = self.bit_options[0], self.bit_options[-1]
        if self.target_fab is not None and not low <= self.target_fab <= high:
            raise QlipError(
                "no choice of bits has the target FAB",
                expected=f"{low} to {high}, as --bit-options",
                found=f"{self.target_fab:g}",
            )
        if self.groups > self.steps and "q2b" in self.stages:
            raise QlipError(
                "more timestep groups than sampling steps",
                expected=f"--groups of at most {self.steps}",
                found=str(self.groups),
            )
        return self

    @property
    def learned_parts(self) -> tuple[Part, ...]:
        """The parts to learn: those asked for, or all that fit."""
        if self.parts is None:
            return ("q",) if len(self.bit_options) == 2 else ("q", "m", "h")
        return tuple(part for part in get_args(Part) if part in self.parts)

    def first(self, prompts: Sequence[str], count: int) -> list[str]:
        """Return the first ``count`` prompts, or fewer if there is a limit."""
        return list(prompts[: min(count, self.limit or count)])


class CalibrationReport(Frozen):
    """What a calibration did, as `--json` prints it."""

    folder: str
    random_weights: int | None = Field(None, description="seed; none: the model's own weights")
    files: dict[str, str] = Field(description="stage -> its result")
    reused: tuple[str, ...] = Field(description="stages whose result was there already")
    seconds: dict[str, float] = Field(description="by stage, models loaded and all")
    gpu_bytes: dict[str, int] = Field(description="by stage: most that PyTorch had allocated; none on a CPU")
    measured: dict[str, float]
