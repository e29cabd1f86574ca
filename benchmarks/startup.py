"""Cold process, warm file cache: `--help`, and the first image of a bundle, with what it is made of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bundles import Subject, prepare
from benchmarks.timing import interleave, summary

IMAGE_TARGET = 2.0
HELP_TARGET = 0.3
ROUNDS, QUICK_ROUNDS = 11, 3


def run(of: Subject, *, quick: bool) -> dict[str, Any]:
    """Return seconds of whole processes, as a user would wait for them, and one breakdown."""
    prepare(of, ("coarse",))
    bundle = of.bundle("coarse")
    command = str(Path(sys.executable).with_name("qlip-export"))
    rounds = QUICK_ROUNDS if quick else ROUNDS
    with tempfile.TemporaryDirectory(prefix="qlip-bench-") as folder:
        image = [command, "generate", str(bundle), "a red apple", "--seed", "0", "-o", f"{folder}/image.png"]
        seconds = interleave(
            {
                "first image": lambda: _silent(image),
                "help": lambda: _silent([command, "--help"]),
            },
            rounds=rounds,
            least_seconds=0,
            settle=False,
        )
    parts = [_breakdown(bundle) for _ in range(rounds)]
    # The breakdown of the run whose total is the median, so that its parts add up.
    middle = sorted(parts, key=lambda p: p["total"])[len(parts) // 2]
    return {
        "first_image": summary(seconds["first image"].wall),
        "first_image_target": IMAGE_TARGET,
        "help": summary(seconds["help"].wall),
        "help_target": HELP_TARGET,
        "breakdown": middle,
    }


def _silent(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _breakdown(bundle: Path) -> dict[str, float]:
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup", str(bundle)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "QLIP_BENCH_STARTED": repr(started)},
    )
    parts: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return parts


def _probe(bundle: str) -> dict[str, float]:
    """Make one image in this fresh process and return where the seconds went."""
    parts = {"python": time.time() - float(os.environ["QLIP_BENCH_STARTED"])}
    before = time.perf_counter()
    from qlip_export import bundle as bundles
    from qlip_export.runtime import TextToImage

    parts["imports"] = time.perf_counter() - before
    parts["hashing"] = 0.0
    sha256_of = bundles.sha256_of

    def timed(path: Path) -> str:
        started = time.perf_counter()
        digest = sha256_of(path)
        parts["hashing"] += time.perf_counter() - started
        return digest

    bundles.sha256_of = timed  # counted apart; it may run beside other things
    before = time.perf_counter()
    pipeline = TextToImage.load(bundle)
    parts["load"] = time.perf_counter() - before
    record = pipeline("a red apple", seed=0).records[0]
    parts["first prompt (loads what load did not)"] = record["seconds"]["prompt_and_load"]
    parts["steps"] = sum(record["seconds"]["steps"])
    parts["decode"] = record["seconds"]["decode"]
    parts["total"] = time.time() - float(os.environ["QLIP_BENCH_STARTED"])
    return {name: round(value, 3) for name, value in parts.items()}


if __name__ == "__main__":
    print(json.dumps(_probe(sys.argv[1])))
