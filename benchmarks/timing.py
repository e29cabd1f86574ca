"""Interleaved repeats and medians: noise from outside hits all sides alike.

Wall seconds are what counts; the processor seconds of this process beside them hardly feel other processes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

THREADS = 2
"""For everybody: OpenVINO's inference threads, torch's and ONNX Runtime's intra-op threads."""

LONG = 2.0
"""Seconds from which on one call is a visit."""

Call = Callable[[], Any]


@dataclass
class Times:
    """Seconds of one call, one entry for each visit: on the wall, and of all processors together."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleave(
    sides: Mapping[str, Call], *, rounds: int, least_seconds: float = 0.2, settle: bool = True
) -> dict[str, Times]:
    """Time every side ``rounds`` times, one after the other in each round; return seconds of one call.

    Args:
        sides: What to call, by name.
        rounds: Visits of each side.
        least_seconds: A visit repeats a short call until this long has passed; its time is the mean of the
            repeats. One call is made first and thrown away if ``settle``, so that caches and the thread pools
            of the side before (which spin for some milliseconds) are out of the way.
        settle: Whether to make that call; without it, long calls take half the time.
    """
    repeats: dict[str, int] = {}
    for name, call in sides.items():
        took = _seconds(call)
        if took < LONG:
            took = _seconds(call)  # the first call may have compiled or loaded something
        repeats[name] = max(1, round(least_seconds / took))
        print(f"  {name}: {took:.4g} s, {repeats[name]} calls a visit", file=sys.stderr, flush=True)
    seconds = {name: Times() for name in sides}
    for index in range(rounds):
        # Every other round goes backwards, so that no side always follows the same one.
        for name in list(sides) if index % 2 == 0 else list(reversed(sides)):
            if settle:
                sides[name]()
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(repeats[name]):
                sides[name]()
            seconds[name].wall.append((time.perf_counter() - wall) / repeats[name])
            seconds[name].cpu.append((time.process_time() - cpu) / repeats[name])
    return seconds


def _seconds(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def summary(seconds: list[float]) -> dict[str, float]:
    """Return median, extremes and the number of visits."""
    return {
        "median": round(statistics.median(seconds), 6),
        "least": round(min(seconds), 6),
        "most": round(max(seconds), 6),
        "visits": len(seconds),
    }


def ratio(side: list[float], base: list[float]) -> float:
    """Return the median over visits of ``side`` / ``base``: each pair was timed within the same moments."""
    return round(statistics.median(a / b for a, b in zip(side, base, strict=True)), 4)
