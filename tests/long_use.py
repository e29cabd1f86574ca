"""Generate with changing prompts and budgets, and tell what the process takes.

python -m tests.long_use engines/emoji 500 50 1     # 500 generations, told of every 50, by one user

A process of its own has the run time in it and nothing else: beside torch, three per cent are 20 MB.
"""

from __future__ import annotations

import argparse
import json
import mmap
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from qlip_export.backends.heap import return_free_memory
from qlip_export.runtime import TextToImage

PROMPTS = ["a red apple", "the blue boat", "a dog"]
AMPLE = 10**9


def resident_bytes() -> int:
    """Return the resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE


class Footprint(NamedTuple):
    """What a process takes at rest: resident bytes, and mappings, of which Linux allows it 65,530."""

    resident: int
    mappings: int

    def __str__(self) -> str:
        return f"{self.resident / 1e6:.1f} MB in {self.mappings} mappings"


def apart(bundle: Path, count: int, settled: int, users: int, threads: int = 1) -> list[Footprint]:
    """Generate in a process of its own; return what it takes after every ``settled`` generations."""
    numbers = [str(number) for number in (count, settled, users, threads)]
    command = [sys.executable, "-m", "tests.long_use", str(bundle), *numbers]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.PIPE)
    return [Footprint(*row) for row in json.loads(done.stdout)]


def generate_often(bundle: Path, count: int, settled: int, users: int, threads: int) -> list[Footprint]:
    """Generate ``count`` times from ``users`` threads, each with its pipeline; see `apart`."""
    pipelines = [TextToImage.load(bundle, threads=threads or None) for _ in range(users)]
    smallest = max(
        pipelines[0](p, seed=0, memory_budget=AMPLE, bits=bits).records[0]["memory"]["smallest"]
        for p in PROMPTS
        for bits in (None, 8, 32)
    )
    budgets = [None, AMPLE, smallest, smallest + 2_000_000]
    found: list[Footprint] = []
    errors: list[BaseException] = []
    barrier = threading.Barrier(users)

    def work(pipeline: TextToImage) -> None:
        try:
            for i in range(count // users):
                prompt, budget = PROMPTS[i % len(PROMPTS)], budgets[(i // 2) % len(budgets)]
                pipeline(prompt, seed=i, memory_budget=budget, bits=(None, None, 8, 32)[i % 4])
                if (i + 1) % (settled // users) == 0:
                    # All at rest, with the engines of the same prompt: the first run drops those of others.
                    for each in (smallest, AMPLE):
                        pipeline(PROMPTS[0], seed=0, memory_budget=each)
                    if barrier.wait() == 0:
                        return_free_memory()
                        mappings = len(Path("/proc/self/maps").read_text().splitlines())
                        found.append(Footprint(resident_bytes(), mappings))
                    barrier.wait()
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    workers = [threading.Thread(target=work, args=(p,)) for p in pipelines]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.long_use")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("count", type=int, help="generations of all users together")
    parser.add_argument("settled", type=int, help="generations between two measurements")
    parser.add_argument("users", type=int, help="threads, each with a pipeline of its own")
    parser.add_argument("threads", type=int, nargs="?", default=1, help="of an engine; 0: the machine's own")
    print(json.dumps(generate_often(**vars(parser.parse_args()))))
