"""The decision table: Q2B compiled to the few values of q at which a unit's bits change.

For fixed p_m and p_h the probability of each bit option is linear in p_q, and p_q is monotone in q (QLIP,
figure S2). The option of highest probability is therefore the upper envelope of a few lines: as q runs from 0
to 1 a unit changes its bits at no more than (number of options - 1) values of q, known in closed form.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from qlip_export.spec import Frozen

Lines = NDArray[np.float64]
"""(options, 2): probability of option i is ``lines[i, 0] + lines[i, 1] * p_q``."""


class UnitChoice(Frozen):
    """Bits of one unit in one timestep group, as a step function of q.

    The unit runs at ``bits[i]`` where exactly ``i`` thresholds are at most q.
    """

    thresholds: tuple[float, ...] = Field(description="increasing; float32 values of q in (0, 1]")
    bits: tuple[int, ...] = Field(min_length=1)
    forced: int = Field(description="bits in the first sampling steps, where p_q is 1")

    @model_validator(mode="after")
    def _consistent(self) -> UnitChoice:
        if len(self.bits) != len(self.thresholds) + 1 or list(self.thresholds) != sorted(
            set(self.thresholds)
        ):
            raise ValueError("thresholds must increase and separate the bits")
        return self

    def at(self, q: float) -> int:
        """Return the bits at quality ``q``, rounded to float32 first."""
        return self.bits[bisect_right(self.thresholds, float(np.float32(q)))]


class DecisionTable(Frozen):
    """Everything the policy can ever ask for.

    Attributes:
        options: Bit options, increasing.
        units: Names of the units: engine blocks or layers.
        group_of_step: Timestep group of every sampling step.
        forced_steps: The first so many steps run at each unit's ``forced`` bits.
        choices: ``choices[group][unit]``.
    """

    options: tuple[int, ...]
    units: tuple[str, ...]
    group_of_step: tuple[int, ...]
    forced_steps: int = Field(ge=0)
    choices: tuple[tuple[UnitChoice, ...], ...]

    def bits(self, q: float, step: int) -> tuple[int, ...]:
        """Return the bits of every unit at sampling step ``step`` for quality ``q``."""
        row = self.choices[self.group_of_step[step]]
        if step < self.forced_steps:
            return tuple(choice.forced for choice in row)
        return tuple(choice.at(q) for choice in row)

    def batch_bits(self, qualities: Sequence[float], step: int) -> tuple[int, ...]:
        """Return, for each unit, the highest bits that any prompt of a batch asks for (QLIP, section E)."""
        return tuple(max(options) for options in zip(*(self.bits(q, step) for q in qualities), strict=True))


def unit_choice(lines: Lines, s: float, o: float, options: Sequence[int]) -> UnitChoice:
    """Compile one unit in one group.

    Args:
        lines: Probability of each option as a line in p_q.
        s: Slope of the logit of p_q: ``p_q = sigmoid((q - 0.5) * s + o)``.
        o: Its offset.
        options: Bits of each line, increasing.

    Returns:
        The step function; its thresholds are exact in float32: `decide` changes there and nowhere else.
    """

    def decide(q: np.float32) -> int:
        return decision(lines, quality_probability(q, s, o))

    candidates = sorted({q for p in _crossings(lines) if (q := _inverse(p, s, o)) is not None})
    changes: list[np.float32] = []
    bits = [options[decide(np.float32(0))]]
    edges = [np.float32(0), *(np.float32(q) for q in candidates), np.float32(1)]
    # Between two neighbouring crossings the choice is constant; a change can only lie within rounding of one.
    middles = [np.float32((float(a) + float(b)) / 2) for a, b in pairwise(edges)]
    points = [np.float32(0), *middles, np.float32(1)]
    for low, high in pairwise(points):
        while decide(low) != decide(high):
            change = _first_change(decide, low, high)
            changes.append(change)
            bits.append(options[decide(change)])
            low = change
    return UnitChoice(
        thresholds=tuple(float(c) for c in changes), bits=tuple(bits), forced=options[decision(lines, 1.0)]
    )


def quality_probability(q: float | np.float32, s: float, o: float) -> float:
    """Return p_q for quality ``q``, in float64."""
    logit = (float(np.float32(q)) - 0.5) * s + o
    return float(1 / (1 + np.exp(-logit))) if logit >= 0 else float(np.exp(logit) / (1 + np.exp(logit)))


def decision(lines: Lines, p: float) -> int:
    """Return the index of the most probable option at ``p``; the lowest bits win a tie."""
    return int(np.argmax(lines[:, 0] + lines[:, 1] * p))


def _crossings(lines: Lines) -> list[float]:
    """Return the values of p_q in (0, 1) at which two of the lines cross."""
    found = []
    for i in range(len(lines)):
        for j in range(i):
            slope = lines[i, 1] - lines[j, 1]
            if slope != 0:
                p = float((lines[j, 0] - lines[i, 0]) / slope)
                if 0 < p < 1:
                    found.append(p)
    return found


def _inverse(p: float, s: float, o: float) -> float | None:
    """Return the q in (0, 1) with p_q = ``p``, or ``None`` where there is none."""
    if s == 0:
        return None
    q = 0.5 + (np.log(p) - np.log1p(-p) - o) / s
    return float(q) if 0 < q < 1 else None


def _first_change(decide: Callable[[np.float32], int], low: np.float32, high: np.float32) -> np.float32:
    """Return the smallest float32 above ``low`` at which the decision is no longer that of ``low``."""
    start = decide(low)
    # Non-negative floats are ordered as their bit patterns are, so halving those visits every float32.
    a, b = int(low.view(np.uint32)), int(high.view(np.uint32))
    while b - a > 1:
        middle = (a + b) // 2
        if decide(_float_of(middle)) == start:
            a = middle
        else:
            b = middle
    return _float_of(b)


def _float_of(pattern: int) -> np.float32:
    value: np.float32 = np.uint32(pattern).view(np.float32)
    return value
