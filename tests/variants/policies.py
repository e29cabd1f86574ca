"""Random policies, as a `DecisionTable` each."""

from __future__ import annotations

import torch

from qlip_export.policy.q2b import QualityToBits, timestep_groups
from qlip_export.policy.table import DecisionTable


def random_table(
    layers: int,
    groups: int = 2,
    *,
    steps: int = 8,
    forced_steps: int = 2,
    seed: int = 0,
    rising: bool = False,
) -> DecisionTable:
    """Return a policy over layers l0, l1...; a ``rising`` one never asks for fewer bits at a higher q."""
    generator = torch.Generator().manual_seed(seed)
    q2b = QualityToBits((8, 16, 32), layers, groups, frozenset("qmh"))
    for parameter, spread in zip(q2b.parameters(), (12.0, 1.0, 2.0, 2.0), strict=True):
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread
    if rising:
        q2b.slope.data.abs_()
    names = [f"l{i}" for i in range(layers)]
    return q2b.table(names, timestep_groups(steps, groups), forced_steps)
