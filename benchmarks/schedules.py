"""Seconds per image of the policy's schedules against uniform bits, and what deciding costs.

On the BK-SDM-Tiny shape, whose weights are random, the denoiser runs the schedules that emoji's policy
chooses: same blocks, same layers, but large enough for INT8 to show its speed.
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
from qlip_export.runtime import TextToImage
from qlip_export.runtime.chain import Pattern
from qlip_export.runtime.schedule import Scheduler, feature_average_bits

PROMPTS = 200
ROUNDS = {"emoji": 15, "bk-sdm-tiny": 3}
EVALUATION = Path("calibration/emoji/evaluation.txt")


def run(of: Subject, *, quick: bool) -> dict[str, Any]:
    """Time every pattern that a prompt asks for, and add up the steps of each prompt's schedule."""
    emoji = subject("emoji")
    for each in {of.shape: of, "emoji": emoji}.values():
        prepare(each, ("coarse",))
    chooser = TextToImage.load(emoji.bundle("coarse"), threads=THREADS)
    prompts = EVALUATION.read_text(encoding="utf-8").splitlines()[:PROMPTS]
    policy = chooser.bundle.manifest.policy
    assert policy is not None
    blocks = chooser.chain.blocks
    schedule = Scheduler(policy.table, blocks)
    schedules = [schedule([q]) for q in chooser.qualities(prompts)]
    ours = TextToImage.load(of.bundle("coarse"), threads=THREADS)
    uniform = {bits: ours.chain.uniform(bits) for bits in BITS}
    asked = Counter(pattern for patterns in schedules for pattern in patterns)
    patterns = list(dict.fromkeys([*uniform.values(), *asked]))
    rounds = 2 if quick else ROUNDS[of.shape]
    seconds = interleave(
        {_name(pattern): _step(ours, pattern) for pattern in patterns},
        rounds=rounds,
        settle=of.shape == "emoji",
    )
    # A visit of a schedule is the sum of its patterns' times in that visit, averaged over the prompts.
    of_policy = [
        sum(seconds[_name(p)].wall[visit] * count for p, count in asked.items()) / len(prompts)
        for visit in range(rounds)
    ]
    rows = {f"uniform {bits}": [t * STEPS for t in seconds[_name(p)].wall] for bits, p in uniform.items()}
    rows[f"policy {policy.name}"] = of_policy
    fab = sum(feature_average_bits(blocks, patterns) for patterns in schedules) / len(schedules)
    return {
        "prompts": len(prompts),
        "patterns": len(asked),
        "fab": round(fab, 3),
        "policy": policy.name,
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
