"""The table and the plot of one policy by layer on engines by layer, for several numbers of variants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bundles import RESULTS as SPEED
from benchmarks.quality.measure import file_name
from benchmarks.tables import table
from qlip_export.metrics import Draws

RESULTS = Path(__file__).resolve().parent / "results"
PICTURE = Path(__file__).resolve().parents[2] / "docs" / "images" / "variants.svg"
TITLES = {
    "block": "by block, 3 options",
    "at-most-1": "N = 1",
    "at-most-2": "N = 2",
    "at-most-3": "N = 3",
    "at-most-5": "N = 5",
    "at-most-9": "N = 9",
    "exact": "exact",
    "fused": "N = 1, fused",
}
ROWS = {"block": "uniform", "exact": "qlip", "fused": "variants-1"} | {
    f"at-most-{n}": f"variants-{n}" for n in (1, 2, 3, 5, 9)
}
BASELINE = 16.0
"""Bits that a saving is counted from."""


def variants_table() -> str:
    """Return the table, and draw the plot beside the documentation."""
    result = json.loads((SPEED / "variants-emoji.json").read_text())["result"]
    rows = {row["name"]: row for row in result["rows"]}
    least = rows["exact"]["fab"]
    PICTURE.write_text(_plot(rows), encoding="utf-8")
    cells = []
    for name, title in TITLES.items():
        row = rows[name]
        saved = (BASELINE - row["fab"]) / (BASELINE - least)
        cells.append(
            [
                title,
                f"{row['fab']:.2f}",
                f"{100 * saved:.1f} %",
                _fid(f"{ROWS[name]}:{result['policy']}"),
                f"{row['seconds']:.2f}",
                f"{row['engines']} in {row['blocks']}",
                f"{row['engine_bytes'] / 1e6:.0f}",
                f"{(row['onnx_bytes'] + row['weight_bytes']) / 1e6:.1f}",
                f"{row['build_seconds']:.0f}",
            ]
        )
    head = ["", "FAB", "of the exact saving", "FID", "seconds"]
    return table([*head, "engines in blocks", "engines, MB", "ONNX and weights, MB", "build, s"], cells)


def _fid(row: str) -> str:
    path = RESULTS / f"{file_name(row)}.json"
    if not path.is_file():
        return "not measured"
    found = json.loads(path.read_text())["fid"]
    estimate = Draws(found["value"], np.array(found["resampled"])).estimate()
    return f"{estimate.value:.2f} ± {(estimate.high - estimate.low) / 2:.2f}"


def _plot(rows: dict[str, Any]) -> str:
    """Draw average bits over the number of engines, on a logarithmic axis."""
    left, right, top, bottom = 60, 600, 30, 250
    names = [name for name in TITLES if name.startswith("at-most") or name == "exact"]
    engines = [rows[name]["engines"] for name in names]
    low, high = np.log(min(engines)), np.log(max(engines))
    least = np.floor(rows["exact"]["fab"]) - 0.5

    def place(row: dict[str, Any]) -> tuple[float, float]:
        x = left + (right - left) * (np.log(row["engines"]) - low) / (high - low)
        return float(x), float(bottom - (bottom - top) * (row["fab"] - least) / (BASELINE - least))

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 310" '
        'font-family="system-ui, sans-serif" font-size="13">',
        '<rect width="640" height="310" fill="#ffffff"/>',
    ]
    for bits in range(int(np.ceil(least)), int(BASELINE) + 1, 2):
        y = place({"engines": engines[0], "fab": bits})[1]
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#d9dde4"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" fill="#5b6472" text-anchor="end">{bits}</text>')
    points = [place(rows[name]) for name in names]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="3"/>')
    for name, (x, y) in zip(names, points, strict=True):
        title = f"{TITLES[name]}: {rows[name]['fab']:.2f}"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#1f6feb"/>')
        last = name == "exact"
        parts.append(
            f'<text x="{x + (0 if last else 8):.1f}" y="{y - 10:.1f}" fill="#1b1f24" '
            f'text-anchor="{"end" if last else "start"}">{title}</text>'
        )
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 20}" fill="#5b6472" text-anchor="middle">'
            f"{rows[name]['engines']}</text>"
        )
    x, y = place(rows["block"])
    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#d1242f"/>')
    parts.append(
        f'<text x="{x + 9:.1f}" y="{y + 4:.1f}" fill="#d1242f">by block: {rows["block"]["fab"]:.2f}</text>'
    )
    parts.append(
        f'<text x="{(left + right) / 2}" y="{bottom + 44}" fill="#5b6472" text-anchor="middle">'
        "engines of the denoiser; the axis is logarithmic</text>"
    )
    parts.append(f'<text x="{left}" y="18" fill="#5b6472">feature average bits</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
