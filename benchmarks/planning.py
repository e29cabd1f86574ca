"""Seconds and memory of choosing variants for large denoisers, by a random policy over their layers."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.bundles import Subject

SECONDS_TARGET = 5
BYTES_TARGET = 500e6
SHAPES = ("sdxl", "flux")


def run(of: Subject, *, quick: bool) -> dict[str, Any]:
    """Plan each shape in a process of its own, which imports neither torch nor the ONNX libraries."""
    rows = []
    for shape in SHAPES:
        command = [sys.executable, "-m", "benchmarks.planning_case", shape]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout))
    return {"seconds_target": SECONDS_TARGET, "bytes_target": BYTES_TARGET, "rows": rows}
