"""From the variant that was chosen to the one that runs: at least as precise, and no slower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlip_export.manifest import BlockEntry
from qlip_export.runtime.chain import Pattern


def dispatch(
    instead: Mapping[str, Mapping[str, str]], blocks: Sequence[BlockEntry], patterns: Sequence[Pattern]
) -> list[Pattern]:
    """Return ``patterns`` with every dominated variant replaced by the faster one.

    Args:
        instead: What runs instead of a variant, by block, as a target's timing has it.
        blocks: The denoiser's.
        patterns: Variant of every block, one pattern for each step.
    """
    none: Mapping[str, str] = {}
    names = [instead.get(block.name, none) for block in blocks]
    return [
        tuple(of.get(variant, variant) for of, variant in zip(names, pattern, strict=True))
        for pattern in patterns
    ]
