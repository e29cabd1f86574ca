"""The vocabulary shared by every stage: bit options, containers, dtypes and the sampler table."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from enum import Enum
from pathlib import PurePosixPath
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from qlip_export.errors import QlipError

DType = Literal["float32", "float16", "bfloat16", "int64", "int32", "int8"]
BYTES: dict[DType, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1}
WeightBits = Literal[4, 8, 32]
Granularity = Literal["coarse", "fine", "whole"]
Unit = Literal["block", "layer"]
"""What a policy decides over."""

REFERENCE_BITS = 32
"""Every block is also exported at 32 bits, whatever the options: validation compares against that graph."""


T2Q_HIDDEN = 512
"""Width of T2Q's hidden layer (QLIP, table S5)."""


class Frozen(BaseModel):
    """Base of all configuration: immutable, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _stays_inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.parts:
        raise ValueError(f"path {path!r} leaves the bundle")
    return path


BundlePath = Annotated[str, AfterValidator(_stays_inside)]
"""A POSIX path relative to the bundle that cannot leave it."""


class Container(str, Enum):
    """The numeric format that carries an activation precision on hardware."""

    INT8 = "int8"
    HALF = "half"
    FLOAT = "float32"

    @property
    def nbytes(self) -> int:
        """Bytes of a number in this format."""
        return {Container.INT8: 1, Container.HALF: 2, Container.FLOAT: 4}[self]


class Asked(NamedTuple):
    """What a typed graph asks of one of its layers."""

    layer: str
    """Module path in the model."""
    precision: str
    """``int8`` where the layer's input comes from a Q/DQ pair, else the dtype of that input."""


def container_of(bits: int) -> Container:
    """Return the container of an activation bit option.

    Up to 8 bits are INT8 Q/DQ (fewer than 8 clip the grid), 9 to 16 bits are FP16 or BF16, 32 is FP32.

    Raises:
        QlipError: ``bits`` has no container.
    """
    if 2 <= bits <= 8:
        return Container.INT8
    if 9 <= bits <= 16:
        return Container.HALF
    if bits == 32:
        return Container.FLOAT
    raise QlipError(
        f"no hardware format holds {bits}-bit activations", expected="2 to 16, or 32", found=str(bits)
    )


MOST_IMAGES = 64
"""Of a batch."""


class ImageSize(Frozen):
    """Size of images, pixels, and how many are drawn at a time; none: the model's own, the build's."""

    width: int | None = None
    height: int | None = None
    batch_size: int | None = None

    @classmethod
    def parse(cls, text: str) -> ImageSize:
        """Read ``WIDTHxHEIGHT[:BATCH]``.

        Raises:
            QlipError: It is something else.
        """
        found = re.fullmatch(r"(\d+)x(\d+)(?::(\d+))?", text)
        if found is None or not 1 <= (batch := int(found[3] or 1)) <= MOST_IMAGES:
            raise QlipError(
                "--size is not known",
                expected=f"WIDTHxHEIGHT[:BATCH], e.g. 768x512 or 512x512:4, batches of at most {MOST_IMAGES}",
                found=text,
            )
        return cls(width=int(found[1]), height=int(found[2]), batch_size=batch if found[3] else None)


def image_sizes(
    sizes: Sequence[str], height: int | None, width: int | None, batch_size: int
) -> tuple[ImageSize, ...]:
    """Return what ``--size``, repeated, or ``--height`` and ``--width`` ask for, each with its batch size.

    Raises:
        QlipError: Both are given, a size is no size, or one is given twice.
    """
    if sizes and (height is not None or width is not None):
        raise QlipError(
            "the size of images is said twice", expected="--size, or --height and --width", found="both"
        )
    found = tuple(map(ImageSize.parse, sizes)) or (ImageSize(height=height, width=width),)
    found = tuple(s.model_copy(update={"batch_size": s.batch_size or batch_size}) for s in found)
    if len(set(found)) < len(found):
        raise QlipError("a size is given twice", found=", ".join(sizes))
    return found


def variant_name(bits: int) -> str:
    """Return the name of the uniform variant of a block at ``bits``, as files and manifests spell it."""
    return f"a{bits}"


def mixed_name(bits: Sequence[int]) -> str:
    """Return the name of the variant whose layers have these bits: of its content, so that it never moves."""
    if len(set(bits)) == 1:
        return variant_name(bits[0])
    return f"m{hashlib.sha256(bytes(bits)).hexdigest()[:8]}"


class SamplerStep(Frozen):
    """One sampling step as a linear combination.

    ``denoiser input = input_scale * x_i`` and
    ``x_{i+1} = sum_j sample[j] * x_{i-j} + sum_j output[j] * e_{i-j}``,
    where ``e`` are the (guided) denoiser outputs.
    """

    timestep: float = Field(description="value handed to the denoiser")
    input_scale: float
    sample: tuple[float, ...] = Field(min_length=1, description="coefficients of x_i, x_{i-1}, ...")
    output: tuple[float, ...] = Field(min_length=1, description="coefficients of e_i, e_{i-1}, ...")


class SamplerTable(Frozen):
    """A scheduler reduced to numbers: all that the run time needs to sample without it."""

    scheduler: str = Field(description="name on the command line, e.g. 'dpmsolver++'")
    scheduler_class: str = Field(description="diffusers class that was probed")
    init_scale: float = Field(description="factor that turns unit-variance noise into x_0")
    requested_steps: int = Field(ge=1, description="steps asked for; PNDM calls the denoiser once more")
    steps: tuple[SamplerStep, ...] = Field(min_length=1)
