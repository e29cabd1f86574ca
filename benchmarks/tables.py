"""Render docs/benchmarks.md from the results under benchmarks/results/."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bundles import RESULTS, SHAPES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
NOTES = Path(__file__).resolve().parent / "notes.md"
"""What the numbers mean, written by hand; the tables go between its lines that name them."""

SHAPE_NAMES = {
    "emoji": "emoji (128x128 images, latents 4x32x32)",
    "bk-sdm-tiny": "shape of BK-SDM-Tiny (512x512 images, latents 4x64x64, 323 M parameters, random weights)",
}


CUDA_PAGE = PAGE.with_name("benchmarks-cuda.md")
CUDA_NOTES = NOTES.with_name("notes-cuda.md")
"""The same for the benchmarks that need a GPU: another machine, hence another page."""
ON_A_GPU = ("cuda", "calibration")


def write() -> None:
    """Write the page of `benchmarks/notes.md`, and that of the GPU."""
    fill(NOTES, PAGE, tables)
    fill(CUDA_NOTES, CUDA_PAGE, tables)


def fill(notes: Path, page: Path, tables_of: Callable[[str], str]) -> None:
    """Write ``page``: ``notes`` with every line ``<!-- NAME -->`` replaced by ``tables_of(NAME)``."""
    lines = []
    for line in notes.read_text(encoding="utf-8").splitlines():
        name = line.removeprefix("<!-- ").removesuffix(" -->")
        lines.append(tables_of(name) if line == f"<!-- {name} -->" else line)
    page.parent.mkdir(exist_ok=True)
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(page)


def tables(name: str) -> str:
    """Return the tables of one benchmark, one for each shape that was measured."""
    if name == "machine":
        records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
        return _machine([r for r in records if r["benchmark"] not in ON_A_GPU])
    paths = [path for s in SHAPES if (path := RESULTS / f"{name}-{s}.json").is_file()]
    records = [json.loads(path.read_text()) for path in paths]
    return "\n\n".join(_titled(r, RENDERERS[name](r["result"])) for r in records) or "not measured yet"


def _titled(record: dict[str, Any], rendered: str) -> str:
    shape = SHAPE_NAMES[record["shape"]] if record["benchmark"] != "planning" else "synthetic shapes"
    if record["shape"] == "emoji" and not record["trained"]:
        shape += ", random weights of the same architecture"
    quick = ", a quick run" if record["quick"] else ""
    load = record["machine"]["load_before"]
    when = f"{record['machine']['date']}, load before {'not kept' if load is None else f'{load:.1f}'}{quick}"
    return f"**{shape}** · `{record['command']}` · {when}\n\n{rendered}"


def _machine(records: list[dict[str, Any]]) -> str:
    of_runs = ("load_before", "date")
    machines = {
        json.dumps({k: v for k, v in r["machine"].items() if k not in of_runs}, sort_keys=True)
        for r in records
    }
    lines = []
    for text in sorted(machines):
        m = json.loads(text)
        versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
        lines.append(
            f"{m['cpu']} ({m['family_model']}; {', '.join(m['features'])}), {m['cores']} cores, "
            f"{m['ram_gb']} GB RAM, {m['system']}; {versions}."
        )
    return "\n\n".join(lines)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; all columns but the first are numbers."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _spread(seconds: dict[str, float]) -> str:
    scale, unit = (1000, "ms") if seconds["median"] < 1 else (1, "s")
    low, mid, high = (scale * seconds[k] for k in ("least", "median", "most"))
    return f"{mid:.3g} {unit} ({low:.3g}–{high:.3g})"


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def _chain(result: dict[str, Any]) -> str:
    return table(
        [
            "activation bits",
            "chain, a step",
            "one engine, a step",
            "chain / one engine",
            "target",
            "",
            "in CPU time",
        ],
        [
            [
                str(row["bits"]),
                _spread(row["chain"]),
                _spread(row["whole"]),
                f"{row['ratio']:.3f}",
                f"≤ {row['target']:.2f}",
                _verdict(row["ratio"] <= row["target"]),
                f"{row['cpu_ratio']:.3f}",
            ]
            for row in result["rows"]
        ],
    )


def _images(result: dict[str, Any]) -> str:
    measured, steps = result["measured_images"], result["steps_per_image"]
    image = f"an image ({steps} steps)" if measured else f"{steps} steps, extrapolated"
    rows = [
        [
            row["name"],
            _spread(row["step"]),
            f"{row['speedup']:.2f}x",
            f"{row['cpu_speedup']:.2f}x",
            _spread(row["image"]) if measured else f"{steps * row['step']['median']:.3g} s",
        ]
        for row in result["rows"]
    ]
    return table(["", "a step, batch 2", f"speed against {result['base']}", "in CPU time", image], rows)


def _startup(result: dict[str, Any]) -> str:
    rows = [
        [
            name,
            _spread(result[key]),
            f"< {result[f'{key}_target']} s",
            _verdict(result[key]["median"] < result[f"{key}_target"]),
        ]
        for name, key in (("`generate`, one image", "first_image"), ("`--help`", "help"))
    ]
    breakdown = table(
        ["one image, where the time goes", "seconds"],
        [[name, f"{seconds:.2f}"] for name, seconds in result["breakdown"].items()],
    )
    return f"{table(['whole process', 'wall time', 'target', ''], rows)}\n\n{breakdown}"


def _previews(result: dict[str, Any]) -> str:
    rows = [
        [str(row["previews"]), _spread(row["image"]), f"{row['ratio']:.3f}", f"{row['cpu_ratio']:.3f}"]
        for row in result["rows"]
    ]
    return table(["previews", f"an image, {result['steps']} steps", "to none", "in CPU time"], rows)


def _build(result: dict[str, Any]) -> str:
    seconds, seconds_target = result["wall_seconds"], result["seconds_target"]
    peak, peak_target = result["peak_rss_bytes"] / 1e9, result["peak_rss_target"] / 1e9
    fast, small = _verdict(seconds < seconds_target), _verdict(peak < peak_target)
    sizes = result["bytes"]
    return table(
        ["", "found", "target", ""],
        [
            ["wall time", f"{seconds:.0f} s", f"< {seconds_target} s", fast],
            ["peak memory (RSS)", f"{peak:.1f} GB", f"< {peak_target:.0f} GB", small],
            ["weights, packed", f"{sizes['weights'] / 1e6:.1f} MB", "", ""],
            ["ONNX graphs", f"{sizes['onnx'] / 1e6:.1f} MB", "", ""],
            ["engines", f"{sizes['engines'] / 1e6:.0f} MB", "", ""],
        ],
    )


def _cuda(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        for side, seconds in row["sides"].items():
            host = row["host"].get(side)
            ratio = row["ratios"].get(side)
            rows.append(
                [
                    f"{row['bits']} bits: {side}",
                    _spread(seconds),
                    f"{ratio:.3f}" if ratio is not None else "",
                    _verdict(ratio <= row["target"]) if ratio is not None and "graph" in side else "",
                    f"{1e3 * host['device']:.2f} ms" if host else "",
                    f"{1e6 * (host['wall'] - host['device']):.0f} µs" if host else "",
                    f"{1e6 * host['started']:.0f} µs" if host else "",
                ]
            )
    head = ["", "a step, batch 2", "to one session", "≤ 1.03", "of it GPU", "host overhead", "until started"]
    return f"{result['gpu']}; {result['blocks']} blocks.\n\n{table(head, rows)}"


def _calibration(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        if row["stage"] == "weights":
            sample, iteration = (1e3 * row[f"seconds_per_{what}"] for what in ("sample", "iteration"))
            pace = f"{sample:.1f} ms a sample, {iteration:.0f} ms an iteration"
            pace = f"{row['seconds_per_block']:.2f} s a block, {pace}"
        elif row["stage"] == "q2b":
            pace = f"{row['seconds_per_iteration']:.2f} s an iteration"
        else:
            pace = f"{row['seconds_per_image']:.3f} s an image of {result['steps']} steps"
        limit = f"{row['limit_bytes'] / 1e9:.0f} GB" if row["limit_bytes"] else "all"
        rows.append(
            [
                f"`{row['stage']}`, `--batch-size {row['at_once']}`",
                pace,
                f"{row['gpu_bytes'] / 1e9:.1f} GB",
                f"{row['reserved_bytes'] / 1e9:.1f} GB of {limit}",
            ]
        )
    whole = ", ".join(f"`{stage}` {seconds / 60:.0f} min" for stage, seconds in result["whole"].items())
    head = ["", "pace", "most in use", "most taken from the GPU"]
    return f"{result['gpu']}.\n\n{table(head, rows)}\n\nAt the stages' own sizes, by these paces: {whole}."


def _planning(result: dict[str, Any]) -> str:
    seconds, size = result["seconds_target"], result["bytes_target"]
    rows = []
    for row in result["rows"]:
        met = row["cpu_seconds"] < seconds and row["peak_rss_bytes"] < size
        rows.append(
            [
                row["shape"],
                f"{row['layers']} in {row['blocks']}",
                str(row["patterns"]),
                f"{row['enumerate_seconds']:.2f} s",
                f"{row['merge_seconds']:.2f} s",
                f"{row['plan_seconds']:.2f} s",
                f"{row['cpu_seconds']:.2f} s",
                f"{row['peak_rss_bytes'] / 1e6:.0f} MB",
                _verdict(met),
            ]
        )
    head = ["", "layers in blocks", "reachable patterns", "enumerate", "merge", "dispatch"]
    target = f"CPU time of all; target {seconds} s"
    return table([*head, target, f"peak memory; target {size / 1e6:.0f} MB", ""], rows)


def _residency(result: dict[str, Any]) -> str:
    seconds = table(
        ["", "everything stays", "half the memory", "ratio", "target", "", "in CPU time"],
        [
            [
                row["name"],
                _spread(row["base"]),
                _spread(row["half"]),
                f"{row['ratio']:.3f}",
                f"≤ {row['target']:.2f}",
                _verdict(row["ratio"] <= row["target"]),
                f"{row['cpu_ratio']:.3f}",
            ]
            for row in result["rows"]
        ],
    )
    megabytes = table(
        ["budget", "MB", "predicted peak", "measured peak", "measured / predicted", "loaded"],
        [
            [
                f"{row['fraction']:.2f} of all" if row["fraction"] else "the smallest",
                *(f"{row[key] / 1e6:.1f}" for key in ("budget", "peak", "measured_peak")),
                f"{row['measured_peak'] / row['peak']:.3f}",
                f"{row['loaded'] / 1e6:.0f} MB",
            ]
            for row in result["peaks"]
        ],
    )
    return f"{seconds}\n\n{megabytes}"


RENDERERS = {
    "chain": _chain,
    "images": _images,
    "startup": _startup,
    "previews": _previews,
    "build": _build,
    "planning": _planning,
    "cuda": _cuda,
    "calibration": _calibration,
    "residency": _residency,
}
