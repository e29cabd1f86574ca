"""One case of `benchmarks.planning`: a random policy over the layers of a shape, planned; prints JSON.

The numbers of quantized layers in coarse blocks are those of `families` for the shapes of SDXL and FLUX.1.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import numpy as np

from qlip_export.policy.table import DecisionTable, unit_choice
from qlip_export.variants.dispatch import Dispatch
from qlip_export.variants.merge import bits_of
from qlip_export.variants.plan import EXACT, Planner, units_of_blocks

LAYERS = {
    "sdxl": (1, 7, 51, 210, 108, 316, 76, 9, 1),
    "flux": (2, *[12] * 19, *[5] * 38, 1),
}
OPTIONS = (8, 16, 32)
STEPS, GROUPS, FORCED = 50, 10, 4
COUNTS = (1, 2, 3, 5, 9, EXACT)


def random_policy(units: list[str]) -> DecisionTable:
    """Return a policy whose layers rise or fall at qualities of their own."""
    rng = np.random.default_rng(0)
    slope, offset = rng.normal(0, 12, len(units)), rng.normal(0, 1, len(units))
    choices = []
    for _ in range(GROUPS):
        m, h = 1 / (1 + np.exp(-rng.normal(0, 2, (2, len(units)))))
        lines = [[(1 - a, a - 1), (a, 1 - b - a), (0.0, b)] for a, b in zip(m, h, strict=True)]
        each = zip(lines, slope, offset, strict=True)
        choices.append(tuple(unit_choice(np.array(line), s, o, OPTIONS) for line, s, o in each))
    return DecisionTable(
        options=OPTIONS,
        units=tuple(units),
        group_of_step=tuple(step * GROUPS // STEPS for step in range(STEPS)),
        forced_steps=FORCED,
        choices=tuple(choices),
    )


def main() -> None:
    """Plan and print."""
    shape = sys.argv[1]
    blocks = {f"b{i}": [f"b{i}.{j}" for j in range(n)] for i, n in enumerate(LAYERS[shape])}
    table = random_policy([layer for layers in blocks.values() for layer in layers])
    qualities = np.random.default_rng(0).beta(4, 4, 512).tolist()
    started, cpu = time.perf_counter(), time.process_time()
    planner = Planner(table, blocks, qualities)
    enumerated = time.perf_counter()
    plans = {count: planner.plan(count) for count in COUNTS}
    merged = time.perf_counter()
    units = units_of_blocks(table, blocks)
    for count in (5, EXACT):
        for name, variants in plans[count].variants.items():
            dispatch = Dispatch(table, units[name], variants, bits_of(variants))
            for step in range(STEPS):
                dispatch.choose([0.4], step)
    planned = time.perf_counter()
    print(
        json.dumps(
            {
                "shape": shape,
                "layers": len(table.units),
                "blocks": len(blocks),
                "patterns": plans[EXACT].engines,
                "enumerate_seconds": round(enumerated - started, 3),
                "merge_seconds": round(merged - enumerated, 3),
                "plan_seconds": round(planned - merged, 3),
                "seconds": round(planned - started, 3),
                "cpu_seconds": round(time.process_time() - cpu, 3),
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "fab": {str(c) if c < EXACT else "exact": round(p.fab, 3) for c, p in plans.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
