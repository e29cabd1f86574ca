"""Interleaved repeats and medians: noise from outside hits all sides alike."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

THREADS = 2
"""For everybody: OpenVINO's inference threads, torch's and ONNX Runtime's intra-op threads."""

Call = Callable[[], Any]


def interleave(
    sides: Mapping[str, Call], *, rounds: int, least_seconds: float = 0.2, settle: bool = True
) -> dict[str, list[float]]:
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
        call()
        started = time.perf_counter()
        call()
        took = time.perf_counter() - started
        repeats[name] = max(1, round(least_seconds / took))
        print(f"  {name}: {took:.4g} s, {repeats[name]} calls a visit", file=sys.stderr, flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds):
        # Every other round goes backwards, so that no side always follows the same one.
        for name in list(sides) if index % 2 == 0 else list(reversed(sides)):
            if settle:
                sides[name]()
            started = time.perf_counter()
            for _ in range(repeats[name]):
                sides[name]()
            seconds[name].append((time.perf_counter() - started) / repeats[name])
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Return median, extremes and the number of visits."""
    return {
        "median": round(statistics.median(seconds), 6),
        "least": round(min(seconds), 6),
        "most": round(max(seconds), 6),
        "visits": len(seconds),
    }


def ratio(seconds: Mapping[str, list[float]], side: str, base: str) -> float:
    """Return the median over rounds of ``side`` / ``base``: each pair was timed within the same moments."""
    pairs = zip(seconds[side], seconds[base], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 4)
