"""Neighbouring blocks that always change together need no boundary between them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


def runs_of_one_mind(
    blocks: Sequence[str],
    serving: Mapping[str, NDArray[np.integer]],
    apart: Collection[str],
    *,
    alike: bool = False,
) -> list[list[str]]:
    """Return the chain in runs of neighbours that can be one engine each without more engines than before.

    Two neighbours can where the variant of one tells that of the other, in every state that the policy can be
    in: their variants come in pairs.

    Args:
        blocks: In the order of the chain.
        serving: For each block what runs in each state, (S,).
        apart: Blocks that stay by themselves.
        alike: Ask for the same variant, not only for one that tells the other: uniform runs need it too.
    """
    agree = np.array_equal if alike else _paired
    runs: list[list[str]] = []
    for block in blocks:
        before = runs[-1][-1] if runs else None
        if before is not None and not {before, block} & set(apart) and agree(serving[before], serving[block]):
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _paired(first: NDArray[np.integer], second: NDArray[np.integer]) -> bool:
    pairs = np.unique(np.stack([first, second], axis=1), axis=0)
    return len(pairs) == len(np.unique(first)) == len(np.unique(second))


def fused_name(run: Sequence[str]) -> str:
    """Return the name of the block that a run of blocks becomes."""
    return run[0] if len(run) == 1 else f"{run[0]}..{run[-1]}"
