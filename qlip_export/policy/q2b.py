"""Q2B: turns quality into activation bits for every unit and timestep group (QLIP, figure S2)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlip_export.errors import QlipError
from qlip_export.policy.table import DecisionTable, UnitChoice, unit_choice

Part = Literal["q", "m", "h"]


class QualityToBits(nn.Module):
    """Learned thresholds on quality, one set for each unit.

    With p_q = sigmoid((q - 0.5) s + o), and p_m, p_h learned for each timestep group, the options have these
    probabilities (the five variants of figure S2; every one is linear in p_q):

    - two options: ``1 - p_q``, ``p_q``
    - three, parts q and h: ``1 - p_q``, ``p_q (1 - p_h)``, ``p_q p_h``
    - three, parts q and m: ``(1 - p_q)(1 - p_m)``, ``(1 - p_q) p_m``, ``p_q``
    - three, parts q, m and h (the default):
      ``(1 - p_q)(1 - p_m)``, ``(1 - p_q) p_m + p_q (1 - p_h)``, ``p_q p_h``
    - four: ``(1 - p_q)(1 - p_m)``, ``(1 - p_q) p_m``, ``p_q (1 - p_h)``, ``p_q p_h``

    Learned floats with three options and all parts: 2K + 2KG; for K = 141 and G = 10 that is 3,102, the
    paper's 12.1 KB (section F).
    """

    def __init__(self, options: Sequence[int], units: int, groups: int, parts: frozenset[Part]) -> None:
        """Start undecided: every learned value is such that p_q = q-dependent 0.5 and p_m = p_h = 0.5.

        Args:
            options: Two to four bit options, increasing.
            units: Number of units K.
            groups: Number of timestep groups G.
            parts: Which of p_q, p_m, p_h are learned; p_q always is.

        Raises:
            QlipError: Options that do not increase, or parts that do not fit their number.
        """
        super().__init__()
        check_parts(options, parts)
        self.options = tuple(options)
        self.parts = parts
        self.slope = nn.Parameter(torch.full((units,), 4.0))
        self.offset = nn.Parameter(torch.zeros(units))
        self.middle = nn.Parameter(torch.zeros(groups, units)) if "m" in parts else None
        self.high = nn.Parameter(torch.zeros(groups, units)) if "h" in parts else None

    def lines(self) -> Tensor:
        """Return the probabilities as lines in p_q, (G or 1, K, options, 2)."""
        one = torch.ones(1, len(self.slope), dtype=self.slope.dtype, device=self.slope.device)
        zero = torch.zeros_like(one)
        m = torch.sigmoid(self.middle) if self.middle is not None else one
        h = torch.sigmoid(self.high) if self.high is not None else one
        m, h = torch.broadcast_tensors(m, h)
        one, zero = one.expand_as(m), zero.expand_as(m)
        low_half = [(1 - m, m - 1)] if self.middle is not None else [(one, -one)]
        if len(self.options) == 2:
            pairs = [(one, -one), (zero, one)]
        elif len(self.options) == 4:
            pairs = [*low_half, (m, -m), (zero, 1 - h), (zero, h)]
        elif self.middle is None:
            pairs = [(one, -one), (zero, 1 - h), (zero, h)]
        elif self.high is None:
            pairs = [*low_half, (m, -m), (zero, one)]
        else:
            pairs = [*low_half, (m, 1 - h - m), (zero, h)]
        return torch.stack([torch.stack(pair, dim=-1) for pair in pairs], dim=-2)

    def probabilities(self, q: Tensor, group: int | Tensor, forced: bool | Tensor = False) -> Tensor:
        """Return the probability of each option, (N, K, options), for qualities ``q`` (N,).

        Args:
            q: Qualities.
            group: Timestep group, of all or of each, (N,) int64.
            forced: Set p_q to 1, as in the first sampling steps, for all or for each, (N,) bool.
        """
        p = torch.sigmoid((q[:, None] - 0.5) * self.slope + self.offset)
        p = torch.where(torch.as_tensor(forced, device=p.device).reshape(-1, 1), 1.0, p)
        lines = self.lines()
        lines = lines[group] if len(lines) > 1 else lines[0]
        return lines[..., 0] + lines[..., 1] * p[..., None]

    def forward(self, q: Tensor, group: int | Tensor, forced: bool | Tensor = False) -> tuple[Tensor, Tensor]:
        """Return the one-hot choice and the probabilities, both (N, K, options).

        The choice is the most probable option; its gradient is that of the probabilities (straight through).
        """
        probabilities = self.probabilities(q, group, forced)
        hard = nn.functional.one_hot(probabilities.argmax(-1), len(self.options)).to(probabilities.dtype)
        return hard + probabilities - probabilities.detach(), probabilities

    @torch.no_grad()
    def run(self, q: Tensor, group_of_step: Sequence[int], forced_steps: int) -> Tensor:
        """Return the index of the most probable option over a whole run, (N, steps, K) int64."""
        return torch.stack(
            [
                self.probabilities(q, group, step < forced_steps).argmax(-1)
                for step, group in enumerate(group_of_step)
            ],
            1,
        )

    @torch.no_grad()
    def table(self, units: Sequence[str], group_of_step: Sequence[int], forced_steps: int) -> DecisionTable:
        """Compile the learned values into a decision table; what decides is `forward` in float64.

        Args:
            units: Names of the K units.
            group_of_step: Timestep group of every sampling step.
            forced_steps: Number of first steps at which p_q is 1.
        """
        exact = copy.deepcopy(self).double().cpu()
        lines: NDArray[np.float64] = exact.lines().numpy()
        slope, offset = exact.slope.numpy(), exact.offset.numpy()
        groups = max(group_of_step) + 1
        choices: list[tuple[UnitChoice, ...]] = []
        for group in range(groups):
            row = lines[group if len(lines) > 1 else 0]
            choices.append(
                tuple(
                    unit_choice(row[k], float(slope[k]), float(offset[k]), self.options)
                    for k in range(len(units))
                )
            )
        return DecisionTable(
            options=tuple(self.options),
            units=tuple(units),
            group_of_step=tuple(group_of_step),
            forced_steps=forced_steps,
            choices=tuple(choices),
        )


_PARTS: dict[int, tuple[frozenset[Part], ...]] = {
    2: (frozenset({"q"}),),
    3: (frozenset({"q", "m", "h"}), frozenset({"q", "m"}), frozenset({"q", "h"})),
    4: (frozenset({"q", "m", "h"}),),
}


def check_parts(options: Sequence[int], parts: frozenset[Part]) -> None:
    """Refuse bit options and learned parts of which no policy can be made.

    Raises:
        QlipError: Options that are too few, too many or do not increase, or parts that do not fit them.
    """
    if not 2 <= len(options) <= 4 or list(options) != sorted(set(options)):
        raise QlipError(
            "two to four increasing bit options are needed",
            expected="e.g. 8,16,32",
            found=",".join(map(str, options)),
        )
    allowed = _PARTS[len(options)]
    if parts not in allowed:
        raise QlipError(
            f"these parts do not give {len(options)} options",
            expected=" or ".join(",".join(sorted(p, key="qmh".index)) for p in allowed),
            found=",".join(sorted(parts, key="qmh".index)),
        )


def timestep_groups(steps: int, groups: int) -> tuple[int, ...]:
    """Return the group of every sampling step: neighbouring steps share p_m and p_h."""
    return tuple(step * groups // steps for step in range(steps))
