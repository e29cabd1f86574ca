"""What images on the way cost: the same prompt and noise with previews and without."""

from __future__ import annotations

from typing import Any

from benchmarks.bundles import Subject, prepare
from benchmarks.timing import THREADS, interleave, ratio, summary
from qlip_export.demo.studio import PREVIEWS
from qlip_export.runtime import Previews, TextToImage

PROMPT = "a red apple"
COUNTS = (0, 1, PREVIEWS, 12)
ROUNDS, QUICK_ROUNDS = 15, 3


def run(of: Subject, *, quick: bool) -> dict[str, Any]:
    """Return seconds of an image by the number of its previews."""
    prepare(of, ("coarse",))
    pipeline = TextToImage.load(of.bundle("coarse"), threads=THREADS)

    def draw(count: int) -> None:
        pipeline(PROMPT, seed=0, previews=Previews(count, lambda images: None))

    seconds = interleave(
        {str(count): lambda count=count: draw(count) for count in COUNTS},  # type: ignore[misc]
        rounds=QUICK_ROUNDS if quick else ROUNDS,
        least_seconds=0,
        settle=False,
    )
    base = seconds["0"]
    return {
        "steps": len(pipeline.bundle.manifest.sampler.steps),
        "rows": [
            {
                "previews": count,
                "image": summary(seconds[str(count)].wall),
                "ratio": ratio(seconds[str(count)].wall, base.wall),
                "cpu_ratio": ratio(seconds[str(count)].cpu, base.cpu),
            }
            for count in COUNTS
        ],
    }
