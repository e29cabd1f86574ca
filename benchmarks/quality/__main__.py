"""Measure rows on whatever device there is, then `tables` writes docs/results.md.

python -m benchmarks.quality measure fp32 w4a8 qlip:8-16-32 --device cuda
python -m benchmarks.quality tables
"""

from __future__ import annotations

import argparse
from pathlib import Path

OUT = Path("benchmarks/out/quality")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("measure", help="draw and measure rows; rows that are there are kept")
    measure.add_argument("rows", nargs="+")
    measure.add_argument("--model", default="emoji")
    measure.add_argument("--calibration", type=Path, default=Path("calibration/emoji"))
    measure.add_argument("--device", default="cpu")
    measure.add_argument("--samples", type=int, default=6000)
    measure.add_argument("--batch-size", type=int, default=256)
    measure.add_argument("--guidance", type=float, default=4.0)
    measure.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    from benchmarks.quality.measure import measure_rows

    measure_rows(
        chosen.rows,
        chosen.model,
        chosen.calibration,
        chosen.out,
        device=chosen.device,
        samples=chosen.samples,
        batch_size=chosen.batch_size,
        guidance=chosen.guidance,
    )


if __name__ == "__main__":
    main()
