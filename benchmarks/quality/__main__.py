"""Measure on whatever device there is, then write docs/results.md.

python -m benchmarks.quality run --device cuda     # trains every policy of the plan, measures every row
python -m benchmarks.quality policies              # what shipped policies ask for; a minute on a CPU
python -m benchmarks.quality grids                 # what finer grids would gain
python -m benchmarks.quality prompts --device cuda # what of the error depends on the prompt
python -m benchmarks.quality tables
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

OUT = Path(__file__).resolve().parent / "results"


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
    for name, about in (
        ("policies", "figures S1 and S4"),
        ("grids", "centred and split grids"),
        ("prompts", "how much of the error depends on the prompt"),
    ):
        other = commands.add_parser(name, help=about)
        if name == "prompts":
            other.add_argument("--device", default="cpu")
        other.add_argument("--calibration", type=Path, default=Path("calibration/emoji"))
        other.add_argument("--out", type=Path, default=OUT)
    commands.add_parser("tables", help="write docs/results.md")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    if chosen.command == "tables":
        from benchmarks.quality.tables import write

        return write()
    if chosen.command == "policies":
        from benchmarks.quality.policies import describe_policies

        return describe_policies(chosen.calibration, chosen.out)
    if chosen.command == "grids":
        from benchmarks.quality.grids import measure_grids

        return measure_grids(chosen.calibration, chosen.out)
    if chosen.command == "prompts":
        from benchmarks.quality.prompts import measure_prompts

        return measure_prompts(chosen.calibration, chosen.out, chosen.device)
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
