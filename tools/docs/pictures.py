"""The pictures of the documentation: `python -m tools.docs.pictures BUNDLE [--out FOLDER]`.

`adaptive.webp`: prompts at uniform bits and at the policy's, each with the map of its bits. `decision.svg`:
what one unit's options are worth against q, from the policy that the bundle was built with.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qlip_export.bitmap import bit_map, colour, options_of
from qlip_export.manifest import PolicyEntry
from qlip_export.policy.store import Policy
from qlip_export.policy.table import quality_probability
from qlip_export.runtime import TextToImage
from qlip_export.zoo import find_model

SEED = 7
INK, SOFT = "#1d2129", "#596273"
MARGIN, HEAD = 12, 26


def choose_prompts(pipeline: TextToImage, prompts: list[str], count: int) -> list[str]:
    """Return prompts spread evenly over the order of their predicted quality."""
    order = np.argsort(pipeline.qualities(prompts))
    return [prompts[order[round(i)]] for i in np.linspace(0.02, 0.98, count) * (len(prompts) - 1)]


def adaptive(pipeline: TextToImage, prompts: list[str]) -> Image.Image:
    """Draw each prompt at 16 and 8 bits and adaptively, with its map beside it."""
    options = options_of(pipeline.bundle.manifest)
    uniform = [bits for bits in reversed(options) if bits <= 16]
    side = pipeline.bundle.manifest.shapes.image[0]
    cell = (13, 13)
    steps = len(pipeline.bundle.manifest.sampler.steps)
    left = (len(uniform) + 1) * (side + MARGIN) + MARGIN
    names = 96
    width = left + names + steps * cell[0] + MARGIN
    row_height = side + 2 * MARGIN + 16
    sheet = Image.new("RGB", (width, HEAD + len(prompts) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(size=13), ImageFont.load_default(size=11)
    for column, title in enumerate([*(f"{bits} bits" for bits in uniform), "QLIP"]):
        centre = MARGIN + column * (side + MARGIN) + side / 2
        draw.text((centre, HEAD / 2), title, INK, font, anchor="mm")
    x = left + names
    for bits in options:
        draw.rectangle((x, HEAD / 2 - 6, x + 12, HEAD / 2 + 6), fill=colour(bits, options))
        draw.text((x + 18, HEAD / 2), f"{bits} bits", INK, font, anchor="lm")
        x += 80
    for row, prompt in enumerate(prompts):
        top = HEAD + row * row_height
        made: list[tuple[Image.Image, dict[str, Any]]] = []
        for wanted in [*uniform, None]:
            result = pipeline(prompt, seed=SEED, bits=wanted)
            made.append((result.images[0], result.records[0]))
        for column, (image, _) in enumerate(made):
            sheet.paste(image, (MARGIN + column * (side + MARGIN), top + 18))
        record = made[-1][1]
        draw.text(
            (MARGIN, top + 8),
            f"{prompt}   q {record['q']:.2f}, {record['fab']:.1f} bits on average",
            INK,
            font,
            anchor="lm",
        )
        drawn = bit_map(pipeline.bundle.manifest, record)
        for line, (block, bits_of_steps) in enumerate(zip(drawn.blocks, drawn.rows, strict=True)):
            y = top + 22 + line * (cell[1] + 1)
            draw.text((left + names - 6, y + 6), block, SOFT, small, anchor="rm")
            for step, bits in enumerate(bits_of_steps):
                at = left + names + step * cell[0]
                draw.rectangle((at, y, at + cell[0] - 2, y + cell[1] - 1), fill=colour(bits, options))
    return sheet


def decision(entry: PolicyEntry, policy: Policy) -> str:
    """Return an SVG of one unit in the group in which its bits depend on q the most."""
    table = entry.table
    found = [
        (len(choice.thresholds), -abs(float(np.mean(choice.thresholds)) - 0.5), group, unit)
        for group, row in enumerate(table.choices)
        for unit, choice in enumerate(row)
        if choice.thresholds
    ]
    _, _, group, unit = max(found)
    choice = table.choices[group][unit]
    every = policy.q2b.lines().detach()
    lines = every[min(group, len(every) - 1)][unit].tolist()
    s, o = policy.q2b.slope[unit].item(), policy.q2b.offset[unit].item()
    qualities = np.linspace(0, 1, 101)
    probabilities = [[a + b * quality_probability(q, s, o) for q in qualities] for a, b in lines]
    return _svg(entry, group, unit, qualities, probabilities, choice.thresholds, choice.bits)


def _svg(
    entry: PolicyEntry,
    group: int,
    unit: int,
    qualities: np.ndarray,
    probabilities: list[list[float]],
    thresholds: tuple[float, ...],
    bits: tuple[int, ...],
) -> str:
    left, right, top, bottom = 50, 600, 40, 260
    x = lambda q: left + (right - left) * q  # noqa: E731
    y = lambda p: bottom - (bottom - top) * p  # noqa: E731
    options = entry.table.options
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 330" font-family="system-ui, sans-serif" '
        'font-size="13">',
        '<rect width="640" height="330" fill="#ffffff"/>',
        f'<text x="{left}" y="22" fill="{INK}">{entry.table.units[unit]}, timestep group {group + 1} of '
        f"{len(entry.table.choices)}, policy {entry.name}</text>",
    ]
    for level in (0, 0.5, 1):
        parts.append(f'<path d="M{left} {y(level)}H{right}" stroke="#d9dde4"/>')
        parts.append(
            f'<text x="{left - 8}" y="{y(level) + 4}" fill="{SOFT}" text-anchor="end">{level:g}</text>'
        )
    for option, values in zip(options, probabilities, strict=True):
        points = " ".join(f"{x(q):.1f},{y(p):.1f}" for q, p in zip(qualities, values, strict=True))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour(option, options)}" stroke-width="3"/>'
        )
    edges = [0.0, *thresholds, 1.0]
    for low, high, value in zip(edges, edges[1:], bits, strict=False):
        parts.append(
            f'<rect x="{x(low):.1f}" y="275" width="{x(high) - x(low):.1f}" height="20" '
            f'fill="{colour(value, options)}"/>'
        )
        parts.append(_text((x(low) + x(high)) / 2, 290, f"{value} bits", INK, "middle"))
    for threshold in thresholds:
        parts.append(f'<path d="M{x(threshold):.1f} {top}V295" stroke="{INK}" stroke-dasharray="4 3"/>')
        parts.append(
            f'<text x="{x(threshold) + 4:.1f}" y="{top + 26}" fill="{SOFT}">q = {threshold:.3f}</text>'
        )
    parts.append(f'<text x="{(left + right) / 2}" y="318" fill="{SOFT}" text-anchor="middle">q</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, fill: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" text-anchor="{anchor}">{text}</text>'


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    pipeline = TextToImage.load(arguments.bundle)
    entry = pipeline.bundle.manifest.policy
    model, _ = find_model(pipeline.bundle.manifest.model.source)
    if entry is None or model.calibration is None:
        parser.error("the bundle has no policy of a zoo model")
    prompts = (model.calibration / "richness.txt").read_text(encoding="utf-8").splitlines()
    chosen = choose_prompts(pipeline, prompts, 4)
    adaptive(pipeline, chosen).save(arguments.out / "adaptive.webp", quality=88)
    svg = decision(entry, Policy.load(model.calibration, entry.name))
    (arguments.out / "decision.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
