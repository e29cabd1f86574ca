"""Seconds per image of policies' schedules against uniform bits, and what deciding costs.

On the BK-SDM-Tiny shape, whose weights are random, the denoiser runs the schedules that emoji's policies
choose: same blocks, same layers, but large enough for INT8 to show its speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bundles import BITS, Subject, prepare, subject
from benchmarks.images import GUIDANCE, STEPS, _inputs
from benchmarks.timing import THREADS, interleave, ratio, summary
from qlip_export.policy.store import Policy
from qlip_export.runtime import TextToImage
from qlip_export.runtime.chain import Pattern
from qlip_export.runtime.schedule import Scheduler, feature_average_bits

PROMPTS = 200
ROUNDS = {"emoji": 15, "bk-sdm-tiny": 3}
CALIBRATION = Path("calibration/emoji")
POLICIES = ("8-16-32", "8-16-32-latency")


def run(of: Subject, *, quick: bool) -> dict[str, Any]:
    """Time every pattern that a prompt asks for, and add up the steps of each prompt's schedule."""
    emoji = subject("emoji")
    for each in {of.shape: of, "emoji": emoji}.values():
        prepare(each, ("coarse",))
    chooser = TextToImage.load(emoji.bundle("coarse"), threads=THREADS)
    prompts = (CALIBRATION / "evaluation.txt").read_text(encoding="utf-8").splitlines()[:PROMPTS]
    blocks, qualities = chooser.chain.blocks, chooser.qualities(prompts)
    schedules = {}
    for name in POLICIES:
        schedule = Scheduler(Policy.load(CALIBRATION, name).table(STEPS), blocks)
        schedules[name] = [schedule([q]) for q in qualities]
    ours = TextToImage.load(of.bundle("coarse"), threads=THREADS)
    uniform = {bits: ours.chain.uniform(bits) for bits in BITS}
    asked = {name: Counter(pattern for run in runs for pattern in run) for name, runs in schedules.items()}
    patterns = list(dict.fromkeys([*uniform.values(), *(p for counts in asked.values() for p in counts)]))
    rounds = 2 if quick else ROUNDS[of.shape]
    seconds = interleave(
        {_name(pattern): _step(ours, pattern) for pattern in patterns},
        rounds=rounds,
        settle=of.shape == "emoji",
    )
    rows = {f"uniform {bits}": [t * STEPS for t in seconds[_name(p)].wall] for bits, p in uniform.items()}
    for name, counts in asked.items():
        # A visit of a schedule is the sum of its patterns' times in that visit, averaged over the prompts.
        rows[f"policy {name}"] = [
            sum(seconds[_name(p)].wall[visit] * count for p, count in counts.items()) / len(prompts)
            for visit in range(rounds)
        ]
    return {
        "prompts": len(prompts),
        "policies": {
            name: {
                "patterns": len(asked[name]),
                "fab": round(sum(feature_average_bits(blocks, run) for run in runs) / len(runs), 3),
            }
            for name, runs in schedules.items()
        },
        "rows": [
            {
                "name": name,
                "denoiser_seconds_per_image": summary(times),
                "to_uniform_16": ratio(times, rows["uniform 16"]),
                "to_uniform_8": ratio(times, rows["uniform 8"]),
            }
            for name, times in rows.items()
        ],
        **({"deciding": _deciding(ours, prompts[:8])} if of.shape == "emoji" else {}),
    }


def _name(pattern: Pattern) -> str:
    return "-".join(pattern)


def _step(ours: TextToImage, pattern: Pattern) -> Callable[[], Any]:
    latents, timestep, text = _inputs(ours)
    ours.chain.load([pattern])
    ours.chain.hold("text", text)
    return lambda: ours.chain.step(latents, timestep, pattern)


def _deciding(ours: TextToImage, prompts: Sequence[str]) -> dict[str, float]:
    """Return the median milliseconds of T2Q and table lookup, and their share of an image's seconds."""
    found = [ours(prompt, seed=0, guidance=GUIDANCE).records[0]["seconds"] for prompt in prompts]
    milliseconds = median(1000 * seconds["policy"] for seconds in found)
    return {
        "milliseconds": round(milliseconds, 3),
        "share_of_image": round(median(seconds["policy"] / seconds["total"] for seconds in found), 6),
    }
