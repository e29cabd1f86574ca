"""Measure into benchmarks/results/, then `python -m benchmarks tables` writes docs/benchmarks.md.

python -m benchmarks                                   # everything: about 30 minutes on two cores
python -m benchmarks chain images --shape emoji --quick
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from pathlib import Path

from benchmarks.bundles import OUT, RESULTS, SHAPES, Subject, subject
from benchmarks.machine import machine
from benchmarks.timing import THREADS

BENCHMARKS: dict[str, tuple[str, ...]] = {
    "build": SHAPES,
    "chain": SHAPES,
    "images": SHAPES,
    "startup": ("emoji",),
    "previews": ("emoji",),
    "schedules": SHAPES,
    "variants": ("emoji",),
    "planning": ("emoji",),
    "residency": SHAPES,
}
"""Name, which is also that of the module, and the shapes it makes sense for."""

ON_REQUEST: dict[str, tuple[str, ...]] = {"cuda": SHAPES, "calibration": SHAPES}
"""Those that need a device which most machines lack."""


def main() -> None:
    known = BENCHMARKS | ON_REQUEST
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(known)} or tables; {', '.join(BENCHMARKS)}"
    )
    parser.add_argument("--shape", choices=SHAPES, help="only this model; both")
    parser.add_argument("--quick", action="store_true", help="few repeats: to see that it works")
    parser.add_argument("--emoji-model", type=Path, help="folder to use instead of the embedded emoji model")
    parser.add_argument("--reuse", action="store_true", help="take bundles that are there as they are")
    chosen = parser.parse_args()
    names = chosen.names or [*BENCHMARKS]
    if unknown := set(names) - {*known, "tables"}:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    # Ours to read while writing benchmarks; nothing about speed.
    warnings.simplefilter("ignore")
    OUT.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name == "tables":
            importlib.import_module("benchmarks.tables").write()
            continue
        for shape in known[name]:
            if chosen.shape in (None, shape):
                model = str(chosen.emoji_model) if chosen.emoji_model else None
                _measure(name, subject(shape, model, reuse=chosen.reuse), quick=chosen.quick)


def _measure(name: str, of: Subject, *, quick: bool) -> None:
    shape = of.shape
    print(f"{name} {shape}", file=sys.stderr, flush=True)
    where = machine()
    result = importlib.import_module(f"benchmarks.{name}").run(of, quick=quick)
    record = {
        "benchmark": name,
        "shape": shape,
        "trained": of.trained,
        "quick": quick,
        "command": f"python -m benchmarks {name} --shape {shape}{' --quick' if quick else ''}",
        "threads": THREADS,
        "machine": where,
        "result": result,
    }
    path = RESULTS / f"{name}-{shape}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{path}", file=sys.stderr)


if __name__ == "__main__":
    main()
