"""The page: one HTML file that needs nothing else, the chart library's script included."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from plotly.offline import get_plotlyjs

from qlip_export.bitmap import bit_map, colour, options_of
from qlip_export.errors import QlipError
from qlip_export.files import explained_os_errors, written_aside
from qlip_export.memory import account
from qlip_export.report import charts
from qlip_export.report.collect import ReportData, median_seconds
from qlip_export.report.engines import TIMING_REPEATS
from qlip_export.spec import Frozen

if TYPE_CHECKING:
    from qlip_export.validate import ValidationReport

MOST = 10_000_000
"""Bytes of a page that mail and browsers take without complaint."""

SIDE = 512
"""Pixels of an image's longer side, at most."""

QUALITIES = (None, 90, 75, 50)
"""WebP qualities that are tried until the page is small enough; none is lossless."""


class ReportSummary(Frozen):
    """What `report --json` prints."""

    file: str
    bytes: int
    prompts: int
    fab: float | None
    seconds: dict[str, float]
    parity: bool | None
    notes: tuple[str, ...]


def write_page(data: ReportData, file: Path) -> ReportSummary:
    """Write the page.

    Raises:
        QlipError: The file cannot be written, or the page would be too large.
    """
    for quality in QUALITIES:
        html = render(data, quality).encode()
        if len(html) < MOST:
            break
    else:
        raise QlipError(
            "the report is too large for one page",
            expected=f"less than {MOST:,} bytes",
            found=f"{len(html):,}",
            fix="fewer --images",
        )
    with explained_os_errors(file), written_aside(file) as aside:
        aside.write_bytes(html)
    return ReportSummary(
        file=str(file),
        bytes=len(html),
        prompts=len(data.rows),
        fab=sum(data.policy.fab) / len(data.policy.fab) if data.policy else None,
        seconds=median_seconds(data.rows),
        parity=data.parity.passed if data.parity else None,
        notes=data.notes,
    )


def render(data: ReportData, quality: int | None = None) -> str:
    """Return the page; ``quality`` is that of its WebP images, lossless if ``None``."""
    environment = Environment(
        loader=PackageLoader("qlip_export.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    manifest = data.bundle.manifest
    policy = manifest.policy
    options = options_of(manifest)
    maps = [
        charts.heatmap(f"map{i}", bit_map(manifest, row.record), options) if policy else None
        for i, row in enumerate(data.rows)
    ]
    statistics = data.policy
    compared = [data.parity, *data.parity.other_sizes] if data.parity else []
    label = manifest.shapes.label
    return environment.get_template("page.html.j2").render(
        data=data,
        manifest=manifest,
        maps=maps,
        legend=[(bits, colour(bits, options)) for bits in options],
        richness=charts.richness(statistics) if statistics else None,
        shares=charts.shares(statistics, options) if statistics else None,
        batches=charts.batches(statistics) if statistics else None,
        median_seconds=median_seconds(data.rows),
        average_fab=_average_fab(data),
        memory=account(manifest),
        timing_repeats=TIMING_REPEATS,
        parity=next((found for found in compared if found.size == label), data.parity),
        off={found.size: _failed(found) for found in compared},
        picture=lambda image: _data_url(image, quality),
        plotly=Markup(get_plotlyjs()),
    )


def _failed(found: ValidationReport) -> int:
    """Return how many comparisons of one size failed: engines, images and the policy's decision."""
    passed = [each.passed for each in found.rows] + [each.passed for each in found.images]
    return (*passed, found.policy is None or found.policy.passed).count(False)


def _average_fab(data: ReportData) -> dict[str, float]:
    count = len(data.rows)
    labels = [drawing.label for drawing in data.rows[0].drawings]
    return {label: sum(row.drawings[i].fab for row in data.rows) / count for i, label in enumerate(labels)}


def _data_url(image: Image.Image, quality: int | None) -> str:
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    if quality is None:
        small.save(buffer, format="WEBP", lossless=True)
    else:
        small.save(buffer, format="WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
