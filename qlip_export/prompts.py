"""Prompt files, and the prompts of models that bring none."""

from __future__ import annotations

from pathlib import Path

from qlip_export.errors import QlipError

GENERIC_PROMPTS = (
    "a cat",
    "a red sports car on a mountain road at sunset",
    "portrait of an old fisherman, detailed, soft light",
    "a bowl of fruit on a wooden table",
    "an astronaut riding a horse on the moon, highly detailed",
    "a city street at night in the rain, neon signs, reflections",
    "a rainbow",
    "a small house beside a lake, watercolour",
)
"""Used where a model brings no calibration prompts of its own."""


EMOJI_PROMPTS = (
    "volcano",
    "rainbow",
    "rocket, space, launch",
    "cat face, noto style",
    "an emoji of octopus in fluent flat style",
    "a twemoji style emoji of hamburger on a white background",
    "a picture of red apple in noto style, centered on white",
    "an emoji of sailboat in fluent color style",
    "pizza, cheese, slice, fluent color style",
    "an emoji of snowman in twemoji style",
    "cherry blossom, blossom, flower, fluent flat style",
    "an icon of alarm clock with time and wake, drawn in fluent color style",
)
"""Of the embedded model, plain and rich, in the words that it was trained on."""


CALIBRATION = "prompts.txt"
"""In a calibration folder: what a model is calibrated on."""
EVALUATION = "evaluation.txt"
"""The same, held out."""
RICHNESS = "richness.txt"
"""Concepts from the plainest to the richest prompt."""


def own_prompts(calibration: Path | None, *names: str) -> Path | None:
    """Return the first of the files ``names`` that a calibration folder holds, if there is such a folder."""
    files = [] if calibration is None else [calibration / name for name in names]
    return next((file for file in files if file.is_file()), None)


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a UTF-8 text file, one a line, blank lines ignored.

    Raises:
        QlipError: The file is missing, empty, or not UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise QlipError(
            f"cannot read prompts from {path}", expected="UTF-8 text, a prompt a line", found=str(error)
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise QlipError(f"{path} holds no prompt", expected="a prompt a line", found="an empty file")
    return prompts
