"""The charts of a report, as Plotly figures with a sentence each for those who cannot see them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import plotly.graph_objects as go
from pydantic import Field

from qlip_export.bitmap import PALETTE, BitMap, colour
from qlip_export.report.policy import PolicyStatistics
from qlip_export.spec import Frozen

LINE = "#4c8dd6"


class Chart(Frozen):
    """A chart as HTML without its script, and what it says in words."""

    html: str
    alt: str
    table: tuple[tuple[str, ...], ...] = Field(description="the same numbers, a heading first")


def heatmap(name: str, drawn: BitMap, options: Sequence[int]) -> Chart:
    """Draw the bits of every block (a row) at every step (a column).

    Args:
        name: Unique within the page.
        drawn: The bits of a run.
        options: All bits that may occur, increasing.
    """
    blocks, rows = drawn.blocks, drawn.rows
    steps = list(range(1, len(rows[0]) + 1))
    edges = [i / len(options) for i in range(len(options) + 1)]
    scale = [
        [edge, colour(bits, options)] for i, bits in enumerate(options) for edge in (edges[i], edges[i + 1])
    ]
    figure = go.Figure(
        go.Heatmap(
            z=[[bisect_left(options, bits) for bits in row] for row in rows],
            text=[[f"{bits:.0f}" for bits in row] for row in rows],
            customdata=rows,
            texttemplate="%{text}" if len(steps) <= 30 and len(rows) <= 40 else None,
            hovertemplate="%{y}, step %{x}: %{customdata} bits<extra></extra>",
            x=steps,
            y=blocks,
            colorscale=scale,
            zmin=-0.5,
            zmax=len(options) - 0.5,
            showscale=False,
            xgap=1,
            ygap=1,
        )
    )
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title="step", dtick=5, tick0=0)
    cells = ((b, *(f"{bits:g}" for bits in row)) for b, row in zip(blocks, rows, strict=True))
    table = (("block", *map(str, steps)), *cells)
    height = 90 + 20 * len(rows)
    return Chart(html=_html(figure, name, height), alt=drawn.words, table=table)


def richness(statistics: PolicyStatistics) -> Chart:
    """Draw FAB against the richness of prompts (figure S4 of the paper)."""
    figure = go.Figure()
    labels = [level.label for level in statistics.richness]
    ticks = [label.split(":")[0] for label in labels]  # short enough for a phone
    for tick, level in zip(ticks, statistics.richness, strict=True):
        figure.add_box(
            y=level.fab,
            x=[tick] * len(level.fab),
            name=level.label,
            boxpoints="all" if len(level.fab) <= 60 else "outliers",
            jitter=0.4,
            pointpos=0,
            marker={"color": LINE, "size": 4, "opacity": 0.6},
            line={"color": LINE, "width": 1},
            fillcolor="rgba(76, 141, 214, 0.15)",
            showlegend=False,
            hovertemplate="%{y:.2f} bits<extra>%{x}</extra>",
        )
    means = [sum(level.fab) / len(level.fab) for level in statistics.richness]
    figure.add_scatter(
        x=ticks, y=means, mode="lines+markers", name="mean", line={"color": PALETTE[3], "width": 2}
    )
    figure.update_layout(showlegend=False)
    figure.update_yaxes(title="FAB, bits")
    figure.update_xaxes(type="category", title="richness of the prompt" if statistics.ladder else "words")
    table = (
        ("prompts", "number", "mean q", "mean FAB"),
        *(
            (level.label, str(len(level.fab)), f"{sum(level.q) / len(level.q):.3f}", f"{mean:.2f}")
            for level, mean in zip(statistics.richness, means, strict=True)
        ),
    )
    alt = "Mean FAB by richness of the prompt: " + ", ".join(
        f"{label} {mean:.2f}" for label, mean in zip(labels, means, strict=True)
    )
    return Chart(html=_html(figure, "richness", 380), alt=alt + ".", table=table)


def shares(statistics: PolicyStatistics, options: Sequence[int]) -> Chart:
    """Draw how often each block runs at each bit option (figure S3 of the paper)."""
    figure = go.Figure()
    names = [f"{share.block} ({share.layers})" for share in statistics.shares]
    for bits in options:
        figure.add_bar(
            y=names,
            x=[100 * share.shares.get(bits, 0) for share in statistics.shares],
            name=f"{bits} bits",
            orientation="h",
            marker={"color": colour(bits, options)},
            hovertemplate="%{y}: %{x:.1f} % at " + f"{bits} bits<extra></extra>",
        )
    figure.update_layout(
        barmode="stack", legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"}
    )
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title="share, %", range=[0, 100])
    cells = [[f"{100 * share.shares.get(bits, 0):.1f} %" for bits in options] for share in statistics.shares]
    table = (
        ("block (layers)", *(f"{bits} bits" for bits in options)),
        *((name, *row) for name, row in zip(names, cells, strict=True)),
    )
    alt = "Share of bits by block: " + "; ".join(
        f"{name} " + ", ".join(f"{cell} at {bits}" for cell, bits in zip(row, options, strict=True))
        for name, row in zip(names, cells, strict=True)
    )
    return Chart(html=_html(figure, "shares", 120 + 26 * len(names)), alt=alt + ".", table=table)


def batches(statistics: PolicyStatistics) -> Chart:
    """Draw FAB against the batch size (figure S1 of the paper)."""
    found = statistics.batches
    figure = go.Figure(
        go.Scatter(
            x=[str(batch.size) for batch in found],
            y=[batch.mean for batch in found],
            error_y={
                "type": "data",
                "array": [batch.most - batch.mean for batch in found],
                "arrayminus": [batch.mean - batch.least for batch in found],
                "color": LINE,
                "thickness": 1,
            },
            mode="lines+markers",
            line={"color": LINE, "width": 2},
            hovertemplate="batch of %{x}: %{y:.2f} bits<extra></extra>",
        )
    )
    figure.update_xaxes(title="prompts in a batch", type="category")
    figure.update_yaxes(title="FAB, bits")
    table = (
        ("batch size", "mean FAB", "least", "most"),
        *((str(b.size), f"{b.mean:.2f}", f"{b.least:.2f}", f"{b.most:.2f}") for b in found),
    )
    alt = "Mean FAB by batch size: " + ", ".join(f"{b.size}: {b.mean:.2f}" for b in found)
    return Chart(html=_html(figure, "batches", 360), alt=alt + ".", table=table)


def _html(figure: go.Figure, name: str, height: int) -> str:
    """Return a figure without background; the page's style sheet colours its text and lines."""
    figure.update_layout(
        height=height,
        margin={"l": 10, "r": 10, "t": 24, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        template="none",
    )
    figure.update_xaxes(automargin=True, gridcolor="rgba(128,128,128,0.25)", zeroline=False, fixedrange=True)
    figure.update_yaxes(automargin=True, gridcolor="rgba(128,128,128,0.25)", zeroline=False, fixedrange=True)
    html: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={"displayModeBar": False, "responsive": True},
    )
    return html
