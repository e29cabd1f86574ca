"""Measure on whatever device there is, then write docs/results.md.

python -m benchmarks.quality run --device cuda     # trains every policy of the plan, measures every row
python -m benchmarks.quality tables
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

OUT = Path("benchmarks/out/quality")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do all of the plan; start it once a GPU to share the work")
    run.add_argument("--calibration", type=Path, default=Path("calibration/emoji"))
    run.add_argument("--device", default="cpu")
    run.add_argument("--samples", type=int, default=5000)
    run.add_argument("--batch-size", type=int, default=256)
    run.add_argument("--seconds", type=float, default=float("inf"), help="start nothing after that long")
    run.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    from benchmarks.quality.plan import Worker

    Worker(
        "emoji",
        chosen.calibration,
        chosen.out,
        device=chosen.device,
        samples=chosen.samples,
        batch_size=chosen.batch_size,
    ).run(chosen.seconds)


if __name__ == "__main__":
    main()
