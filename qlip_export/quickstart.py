"""Build the embedded model, draw a dozen prompts at each bit option, validate: from nothing to images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from qlip_export.build import BuildOptions, BuildReport, build
from qlip_export.files import explained_os_errors, written_aside
from qlip_export.progress import Progress
from qlip_export.prompts import EMOJI_PROMPTS as PROMPTS
from qlip_export.runtime import Generation, TextToImage
from qlip_export.validate import ValidationReport, require_libraries, validate

STYLED = PROMPTS[3]
"""Validated with: a prompt that leaves the style open may fall into another one by the last bit of a sum."""


@dataclass(frozen=True)
class QuickstartReport:
    """What a quickstart made."""

    build: BuildReport
    validation: ValidationReport
    sheet: Path
    seconds_per_image: dict[str, float]


def quickstart(folder: Path, progress: Progress) -> QuickstartReport:
    """Build, generate and validate in ``folder``.

    Args:
        folder: Gets the bundle `emoji` and the contact sheet `quickstart.png`.
        progress: Display.

    Raises:
        QlipError: A library that validation needs is missing, the folder cannot be written, or anything that
            `build` raises.
    """
    require_libraries()  # refused before minutes of building
    bundle = folder / "emoji"
    built = build(BuildOptions(model="emoji"), bundle, progress)
    pipeline = TextToImage.load(bundle)
    manifest = pipeline.bundle.manifest
    options: list[int | None] = [*manifest.bits, *([None] if manifest.policy else [])]
    progress.stage("sample", len(options) * len(PROMPTS))
    columns: list[tuple[str, list[Image.Image]]] = []
    seconds: dict[str, float] = {}
    drawn: dict[int | None, Generation] = {bits: Generation([], []) for bits in options}
    # Settings take turns, so that what slows the machine down for a while slows all of them.
    for index, prompt in enumerate(PROMPTS):
        for bits in options:
            progress.item(f"{prompt[:30]} at {bits or 'its own'} bits")
            result = pipeline(prompt, seed=index, bits=bits)
            drawn[bits].images += result.images
            drawn[bits].records += result.records
    for bits, made in drawn.items():
        images, records = made.images, made.records
        totals = sorted(r["seconds"]["total"] for r in records)
        average = sum(r["fab"] for r in records) / len(records)
        title = f"{bits} bits" if bits else f"adaptive, {average:.1f} bits"
        seconds[title] = totals[len(totals) // 2]
        columns.append((f"{title}\n{seconds[title]:.1f} s an image", images))
    sheet = folder / "quickstart.png"
    with explained_os_errors(sheet), written_aside(sheet) as aside:
        contact_sheet(list(PROMPTS), columns).save(aside, format="PNG")
    report = validate(bundle, prompt=STYLED, seed=0, model=None, progress=progress)
    return QuickstartReport(built, report, sheet, seconds)


def contact_sheet(rows: list[str], columns: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Return a grid of images: a row for each prompt, a column for each setting, with captions."""
    width, height = columns[0][1][0].size
    margin, label, head = 8, 330, 44
    sheet = Image.new(
        "RGB", (label + len(columns) * (width + margin), head + len(rows) * (height + margin)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    for x, (title, images) in enumerate(columns):
        left = label + x * (width + margin)
        draw.multiline_text((left + width / 2, head / 2), title, "black", font, anchor="mm", align="center")
        for y, image in enumerate(images):
            sheet.paste(image, (left, head + y * (height + margin)))
    for y, text in enumerate(rows):
        draw.multiline_text(
            (label - 16, head + y * (height + margin) + height / 2),
            _wrapped(text, draw, font, label - 32),
            "black",
            font,
            anchor="rm",
            align="right",
        )
    return sheet


def _wrapped(
    text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
