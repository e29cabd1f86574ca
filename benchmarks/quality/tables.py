"""Render docs/results.md: the lines ``<!-- NAME -->`` of notes.md become tables of what was measured."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bundles import RESULTS as SPEED
from benchmarks.quality.by_layer import variants_table
from benchmarks.quality.measure import file_name
from benchmarks.tables import fill, table
from qlip_export.metrics import Draws, Estimate
from qlip_export.policy.store import PolicyRecipe, QualityRecipe
from qlip_export.quant.rounding import RoundingRecipe

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
NOTES = Path(__file__).resolve().parent / "notes.md"
PAGE = ROOT / "docs" / "results.md"
CALIBRATION = ROOT / "calibration" / "emoji"
TITLES = {
    "fp32": "FP32",
    "w4a32-nearest": "W4A32, weights to nearest",
    "w4a32": "W4A32",
    "w4a16": "W4A16",
    "w4a8": "W4A8",
    "w4a6": "W4A6",
    "w4a5": "W4A5",
    "qlip:8-16-32": "QLIP {8,16,32}",
    "random:8-16-32": "random choice, {8,16,32}",
    "timestep:8-16-32": "timestep only, {8,16,32}",
    "static:8-16-32": "static, {8,16,32}",
    "qlip:6-8-10": "QLIP {6,8,10}",
    "random:6-8-10": "random choice, {6,8,10}",
    "timestep:6-8-10": "timestep only, {6,8,10}",
    "static:6-8-10": "static, {6,8,10}",
    "qlip:8-16-32-latency": "QLIP {8,16,32}, latency cost",
    "qlip:6-8-10-complexity": "QLIP {6,8,10}, by complexity (T2C, C2B)",
    "qlip:6-8-10-length": "QLIP {6,8,10}, by prompt length",
    "qlip:8-16": "QLIP {8,16}",
    "qlip:6-8": "QLIP {6,8}",
    "qlip:6-8-16": "QLIP {6,8,16}",
    "qlip:6-8-16-32": "QLIP {6,8,16,32}",
    "qlip:6-8-10-qh": "QLIP {6,8,10}, parts q and h",
    "qlip:6-8-10-qm": "QLIP {6,8,10}, parts q and m",
    "qlip:6-8-10-layer": "QLIP {6,8,10}, units are layers",
    "qlip:8-16-32-layer": "QLIP {8,16,32}, units are layers",
    "w4a6+.*time_emb_proj": "W4A6, inputs of `time_emb_proj` exact",
    "w4a6+up_blocks.*resnets.*conv1": "W4A6, inputs of `conv1` behind a skip exact",
    "w4a32!up_blocks.*conv(1|_shortcut)": "W4A32, weights of `conv1`, `conv_shortcut` behind a skip exact",
}
MAIN = tuple(TITLES)[:15]
CRITERIA = ("qlip:6-8-10", "qlip:6-8-10-complexity", "qlip:6-8-10-length")
OPTIONS = ("qlip:8-16", "qlip:8-16-32", "qlip:6-8", "qlip:6-8-10", "qlip:6-8-16", "qlip:6-8-16-32")
PARTS = ("qlip:6-8-10", "qlip:6-8-10-qh", "qlip:6-8-10-qm")
UNITS = ("qlip:6-8-10", "qlip:6-8-10-layer", "qlip:8-16-32", "qlip:8-16-32-layer")
BOUNDS = ("w4a6", *(name for name in TITLES if "+" in name), "w4a32", *(n for n in TITLES if "!" in n))
METRICS = ("fid", "sfid", "clip")
BASELINES = ("random", "timestep", "static")


def write() -> None:
    """Write the page."""
    fill(NOTES, PAGE, lambda name: TABLES[name]())


def _row(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{file_name(name)}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return found


def _draws(row: dict[str, Any], metric: str) -> Draws:
    return Draws(row[metric]["value"], np.array(row[metric]["resampled"]))


def _value(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} ± {(estimate.high - estimate.low) / 2:.{digits}f}"


def _rows(names: tuple[str, ...]) -> str:
    rows = []
    for name in names:
        row = _row(name)
        if row is None:
            rows.append([TITLES[name], "not measured", "", "", "", ""])
            continue
        fab = row["fab"]["value"] if "fab" in row else 32.0
        cells = [_value(_draws(row, m).estimate(), 4 if m == "clip" else 2) for m in METRICS]
        rows.append([TITLES[name], f"{fab:.2f}", *cells, str(row["samples"])])
    return table(["", "FAB", "FID", "sFID", "CLIP score", "images"], rows)


def _ratios(pairs: tuple[tuple[str, str], ...]) -> str:
    rows = []
    for name, base in pairs:
        one, other = _row(name), _row(base)
        if one is None or other is None:
            continue
        cells = []
        for metric in METRICS:
            ratio = _draws(one, metric).estimate(_draws(other, metric))
            assert ratio.ratio is not None and ratio.ratio_high is not None
            cells.append(f"{ratio.ratio:.4f} ± {ratio.ratio_high - ratio.ratio:.4f}")
        fab = one["fab"]["value"] if "fab" in one else 32.0
        rows.append([f"{TITLES[name]} / {TITLES[base]}", f"{fab:.2f}", *cells])
    return table(["", "FAB", "FID", "sFID", "CLIP score"], rows)


def _t2q() -> str:
    rows = []
    for path in sorted(CALIBRATION.glob("t2q.*.json"), reverse=True):
        recipe = QualityRecipe.model_validate_json(path.read_text())
        label = {"quality": "GIQA", "complexity": "image complexity", "length": "tokens"}[recipe.criterion]
        rows.append(
            [
                label,
                f"{recipe.prompts:,}",
                f"{recipe.held_out:,}",
                f"{recipe.srocc:.3f}",
                f"{recipe.plcc:.3f}",
            ]
        )
    rows.append(["the paper, GIQA", "10,000", "", "0.805", "0.811"])
    return table(["label", "labelled prompts", "of them held out", "SROCC", "PLCC"], rows)


def _weights() -> str:
    recipe = RoundingRecipe.model_validate_json((CALIBRATION / "weights.json").read_text())
    return table(
        ["", "round to nearest", "learned"],
        [
            [
                "squared error of block outputs, relative, mean of all blocks",
                f"{recipe.error_nearest:.5f}",
                f"{recipe.error_learned:.5f}",
            ],
            ["weights that do not go to the nearest code", "0", f"{100 * recipe.flipped:.1f} %"],
        ],
    )


def _seconds() -> str:
    rows = []
    for shape in ("emoji", "bk-sdm-tiny"):
        record = json.loads((SPEED / f"schedules-{shape}.json").read_text())
        for row in record["result"]["rows"]:
            seconds = row["denoiser_seconds_per_image"]
            rows.append(
                [
                    shape,
                    row["name"],
                    f"{seconds['median']:.3g} s ({seconds['least']:.3g}–{seconds['most']:.3g})",
                    f"{row['to_uniform_16']:.3f}",
                    f"{row['to_uniform_8']:.3f}",
                ]
            )
    return table(["shape", "", "denoiser, an image of 25 steps", "to uniform 16", "to uniform 8"], rows)


def _policies() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "policies.json").read_text())
    return found


def _batches() -> str:
    found = _policies()
    sizes = list(next(iter(found.values()))["fab_by_batch"])
    rows = [[name, *(f"{f['fab_by_batch'][s]:.2f}" for s in sizes)] for name, f in found.items()]
    return table(["FAB at a batch of", *sizes], rows)


def _richness() -> str:
    found = _policies()
    qualities = {
        ("complexity" if "complexity" in name else "quality"): f["richness"] for name, f in found.items()
    }
    rows = [
        [f"q, {what}", *(f"{v:.3f}" for v in rich["q"]), f"{rich['spearman_q']:.2f}"]
        for what, rich in qualities.items()
    ]
    for name, policy in found.items():
        rich = policy["richness"]
        rank = "no difference" if rich["spearman_fab"] is None else f"{rich['spearman_fab']:.2f}"
        rows.append([f"FAB, {name}", *(f"{v:.2f}" for v in rich["fab"]), rank])
    return table(
        ["", "name", "+ keyword", "name, style", "sentence", "sentence + keywords", "rank correlation"], rows
    )


def _shares() -> str:
    parts = []
    for name in ("6-8-10", "8-16-32"):
        row = _row(f"qlip:{name}")
        recipe = PolicyRecipe.model_validate_json((CALIBRATION / "policies" / f"{name}.json").read_text())
        assert row is not None
        rows = []
        for unit in recipe.units:
            layer = next(n for n in row["share_of_layer"] if n.startswith((f"{unit}.", _LONE.get(unit, "?"))))
            share = row["share_of_layer"][layer]
            rows.append([unit, *(f"{100 * share.get(str(b), 0.0):.0f} %" for b in recipe.options)])
        parts.append(table([name, *(f"{b} bits" for b in recipe.options)], rows))
    return "\n\n".join(parts)


_LONE = {"stem": "conv_in", "out": "conv_out"}


def _grids() -> str:
    found = json.loads((RESULTS / "grids.json").read_text())
    gains: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for bits in (6, 8):
        for name, errors in found["centred"].items():
            lone = name.endswith("time_emb_proj")
            what = "time_emb_proj" if lone else "all other Linear and 1x1 Conv2d"
            gains[f"centred grid, {what}", bits].append(errors[str(bits)])
        for errors in found["split"].values():
            gains["split grid, inputs of conv1 behind a skip", bits].append(errors[str(bits)])
    gains["split scales, weights of conv1 and conv_shortcut", 4] = list(found["split_weights"].values())
    rows = []
    for (what, bits), pairs in gains.items():
        ratios = [one / finer for one, finer in pairs]
        median, most = f"{np.median(ratios):.2f}", f"{max(ratios):.2f}"
        rows.append([what, str(bits), str(len(ratios)), median, most])
    return table(["", "bits", "layers", "error, one grid / finer: median", "most"], rows)


def _prompts() -> str:
    found = json.loads((RESULTS / "prompts.json").read_text())
    rows = []
    for what, parts in (("error at {} bits", found["uniform"]), ("gain from {} bits", found["gain"])):
        for bits, values in parts.items():
            shares = [f"{100 * values[f'share_of_{of}']:.0f} %" for of in ("steps", "prompts")]
            rows.append([what.format(bits), *shares, f"{values['spearman_q']:.2f}"])
    columns = ["logarithm of the", "variance between steps", "between prompts", "rank correlation with q"]
    return table(columns, rows)


def _against(policy: str) -> str:
    return _ratios(tuple((f"qlip:{policy}", f"{kind}:{policy}") for kind in BASELINES))


TABLES = {
    "main": lambda: _rows(MAIN),
    "criteria": lambda: _rows(CRITERIA),
    "options": lambda: _rows(OPTIONS),
    "bounds": lambda: _rows(BOUNDS),
    "parts": lambda: _rows(PARTS),
    "units": lambda: _rows(UNITS),
    "latency": lambda: _rows(("qlip:8-16-32", "qlip:8-16-32-latency")),
    "prompts": _prompts,
    "against-w4a16": lambda: _ratios((("qlip:8-16-32", "w4a16"), ("qlip:8-16-32", "w4a8"))),
    "against-w4a8": lambda: _ratios(
        tuple(
            (name, "w4a8")
            for name in ("qlip:6-8-10", *(f"{kind}:6-8-10" for kind in BASELINES), "w4a6", "fp32")
        )
    ),
    "against-baselines-8-16-32": lambda: _against("8-16-32"),
    "against-baselines-6-8-10": lambda: _against("6-8-10"),
    "t2q": _t2q,
    "weights": _weights,
    "seconds": _seconds,
    "batches": _batches,
    "richness": _richness,
    "shares": _shares,
    "grids": _grids,
    "by-layer": variants_table,
}
