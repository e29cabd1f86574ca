"""What several commands take, and how it is read."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from qlip_export.errors import QlipError

BundleArgument = Annotated[Path, typer.Argument(help="Folder of a bundle.", show_default=False)]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON result on stdout, all else on stderr.")
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of an engine.", show_default="all")
]
TargetOption = Annotated[
    str,
    typer.Option(
        "--backend",
        help="Whose engines of the bundle to run.",
        show_default="auto: the first whose library and device are here",
    ),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(help="UTF-8 text, a prompt a line.", show_default="the model's own, or generic"),
]
GuidanceOption = Annotated[
    float | None, typer.Option(help="Guidance scale.", show_default="the model family's own")
]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        help="dpmsolver++, ddim, euler, pndm or flow-match-euler.", show_default="the model family's own"
    ),
]
StepsOption = Annotated[int, typer.Option(help="Sampling steps.")]
HeightOption = Annotated[
    int | None, typer.Option(help="Height of images, pixels.", show_default="the model's own")
]
WidthOption = Annotated[int | None, typer.Option(help="Width of images.", show_default="the model's own")]
ThisHeightOption = Annotated[
    int | None,
    typer.Option(
        "--height", help="Height of images, where the bundle has several sizes.", show_default="the first"
    ),
]
ThisWidthOption = Annotated[
    int | None, typer.Option("--width", help="Width of images, the same.", show_default="the first")
]
ThisBatchOption = Annotated[
    int | None, typer.Option("--batch-size", help="Images per batch, the same.", show_default="the first")
]
SizesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--size",
        metavar="WIDTHxHEIGHT[:BATCH]",
        help="Instead of these: a size of images and batches; repeatable, weights are shared.",
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a model from the Hub.", show_default="main")
]


class Blocks(str, enum.Enum):
    """Where the denoiser is cut."""

    coarse = "coarse"
    fine = "fine"
    whole = "whole"


def validated(kind: Any, **values: Any) -> Any:
    """Return options as ``kind`` checks them.

    Raises:
        QlipError: Naming the first option that does not do.
    """
    from pydantic import ValidationError

    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise QlipError(f"{option}: {first['msg']}", found=str(first.get("input"))) from error


def numbers(text: str, option: str = "--bits") -> tuple[int, ...]:
    """Return the numbers of e.g. ``8,16,32``.

    Raises:
        QlipError: ``option`` is no such list.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise QlipError(f"{option} is no list of numbers", expected="e.g. 8,16,32", found=text) from error
