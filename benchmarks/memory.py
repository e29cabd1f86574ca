"""Peak memory of an export against the number of transformer blocks, at FLUX's real width.

python -m benchmarks.memory                      # 2, 4 and 8 double blocks: about ten minutes of a core
python -m benchmarks.memory --model sdxl         # a model of the zoo as it is
python -m benchmarks.memory --whole              # all of FLUX, text encoders too: half an hour, 16 GB of disk

Weights are random, and without --whole the text encoders are short, so that what is measured is the denoiser.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.bundles import run_measured
from qlip_export.zoo import CONFIGS

TOLERANCE = 0.10
"""Of the least peak: what counts as flat."""

SHORT = {
    "text_encoder": {"num_hidden_layers": 1, "vocab_size": 8192},
    "text_encoder_2": {"num_hidden_layers": 1, "num_layers": 1, "vocab_size": 8192},
}


def measure(model: str, blocks: int | None, *, whole: bool) -> dict[str, Any]:
    """Export a model of the zoo, its transformer cut to so many double and single blocks; return the row."""
    with tempfile.TemporaryDirectory(prefix="qlip-memory-") as name:
        folder, out = Path(name) / model, Path(name) / "bundle"
        shutil.copytree(CONFIGS / model, folder)
        for part, changes in ({} if whole else SHORT).items():
            change(folder / part, changes)
        if blocks is not None:
            change(folder / "transformer", {"num_layers": blocks, "num_single_layers": blocks})
        command = [sys.executable, "-m", "qlip_export", "export", "--model", str(folder), "--random-weights"]
        output, peak = run_measured([*command, "-o", str(out), "--json"])
        report = json.loads(output.splitlines()[-1])
    return {
        "blocks": blocks,
        "engines": report["blocks"],
        "weights": report["bytes"]["weights"],
        "peak": peak,
        "seconds": report["seconds"],
    }


def change(part: Path, values: dict[str, Any]) -> None:
    """Set those values of a config that it has."""
    path = part / "config.json"
    if path.is_file():
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {k: v for k, v in values.items() if k in config}))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--model", default="flux-dev", help="a name of the zoo")
    parser.add_argument("--blocks", type=int, nargs="*", help="of each kind; 2 4 8 for FLUX")
    parser.add_argument("--whole", action="store_true", help="all blocks, and text encoders as they are")
    chosen = parser.parse_args()
    if chosen.whole and chosen.blocks is not None:
        parser.error("--whole has all blocks: leave --blocks out")
    curve = chosen.model.startswith("flux") and not chosen.whole
    counts = chosen.blocks or ([2, 4, 8] if curve else [None])
    rows = []
    for count in counts:
        rows.append(measure(chosen.model, count, whole=chosen.whole))
        row = rows[-1]
        print(
            f"{chosen.model}, {count or 'all'} blocks of each kind: peak {row['peak'] / 1e9:.2f} GB, "
            f"weights {row['weights'] / 1e9:.2f} GB, {row['seconds']:.0f} s",
            flush=True,
        )
    if len(rows) > 1:
        peaks = [row["peak"] for row in rows]
        spread = max(peaks) / min(peaks) - 1
        print(f"spread {100 * spread:.1f} %: {'flat' if spread <= TOLERANCE else 'NOT flat'}")


if __name__ == "__main__":
    main()
