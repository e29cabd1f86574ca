"""The chain of block engines against one engine of the whole denoiser: same backend, precision, weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.bundles import BITS, Subject, prepare
from benchmarks.timing import THREADS, interleave, ratio, summary
from qlip_export.runtime import TextToImage
from qlip_export.runtime.chain import Chain

TARGETS = {"emoji": 1.10, "bk-sdm-tiny": 1.03}
ROUNDS = {"emoji": 21, "bk-sdm-tiny": 9}
QUICK_ROUNDS = 3


def run(of: Subject, *, quick: bool) -> dict[str, Any]:
    """Return seconds per denoiser step of both sides at every bit option, batch 2, and their ratios."""
    prepare(of)
    rounds = QUICK_ROUNDS if quick else ROUNDS[of.shape]
    chains = {g: TextToImage.load(of.bundle(g), backend="openvino", threads=THREADS).chain for g in SIDES}
    rows = []
    # One bit option after the other: only its two sides have to be compared, and to fit into memory.
    for bits in BITS:
        sides = {g: stepper(chain, bits) for g, chain in chains.items()}
        difference = float(np.abs(sides["coarse"]() - sides["whole"]()).max())
        seconds = interleave(sides, rounds=rounds, settle=of.shape == "emoji")
        rows.append(
            {
                "bits": bits,
                "chain": summary(seconds["coarse"].wall),
                "whole": summary(seconds["whole"].wall),
                "ratio": ratio(seconds["coarse"].wall, seconds["whole"].wall),
                "cpu_ratio": ratio(seconds["coarse"].cpu, seconds["whole"].cpu),
                "target": TARGETS[of.shape],
                "largest_difference": difference,
                "largest_value": float(np.abs(sides["whole"]()).max()),
            }
        )
    return {
        "blocks": len(chains["coarse"].blocks),
        "engines_of_whole": len(chains["whole"].blocks),
        "rows": rows,
    }


SIDES = ("coarse", "whole")


def stepper(chain: Chain, bits: int) -> Callable[[], Any]:
    """Return a call that runs one denoiser step of ``chain`` on fixed random inputs."""
    pattern = chain.uniform(bits)
    chain.load([pattern])
    rng = np.random.default_rng(0)
    shapes = {t.name: t.shape for t in chain._bundle.manifest.inputs}
    latents = rng.standard_normal(shapes["latents"], dtype=np.float32)
    chain.hold("text", rng.standard_normal(shapes["text"], dtype=np.float32))
    return lambda: chain.step(latents, 500.0, pattern)
