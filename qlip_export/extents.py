"""Shapes that follow from images per batch, height and width: their algebra, and the ranges they may take."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from pydantic import Field

from qlip_export.errors import QlipError
from qlip_export.spec import MOST_IMAGES, Frozen

Axis = Literal["batch", "height", "width"]
"""Images per batch, and their height and width in pixels."""
AXES: tuple[Axis, ...] = get_args(Axis)

_Powers = tuple[int, ...]
_NONE = (0,) * len(AXES)


@dataclass(frozen=True)
class Extent:
    """One number of a shape: a sum of products of the axes, e.g. ``height*width/64``.

    Attributes:
        terms: For each product the power of every axis, in the order of ``AXES``, and its coefficient.
    """

    terms: tuple[tuple[_Powers, Fraction], ...]

    @classmethod
    def of(cls, what: int | Axis) -> Extent:
        """Return a constant, or an axis itself."""
        if isinstance(what, int):
            return _sum([(_NONE, Fraction(what))])
        return cls(((tuple(int(axis == what) for axis in AXES), Fraction(1)),))

    @classmethod
    def parse(cls, text: str) -> Extent:
        """Return what `str` made ``text`` of."""
        total = cls(())
        for product in text.split("+"):
            term = cls.of(1)
            for sign, factor in re.findall(r"(^|[*/])(-?\w+)", product):
                if sign == "/":
                    term = term / int(factor)
                else:
                    axis = next((a for a in AXES if a == factor), None)
                    term = term * (cls.of(axis) if axis else cls.of(int(factor)))
            total = total + term
        return total

    def __str__(self) -> str:
        """Return e.g. ``2*batch``, ``height/8`` or ``77``; `parse` reads it."""
        products = []
        for powers, c in reversed(self.terms):
            names: list[str] = [axis for axis, power in zip(AXES, powers, strict=True) for _ in range(power)]
            first = [str(c.numerator)] if c.numerator != 1 or not names else []
            products.append("*".join(first + names) + (f"/{c.denominator}" if c.denominator != 1 else ""))
        return "+".join(products) or "0"

    def __add__(self, other: Extent) -> Extent:
        return _sum([*self.terms, *other.terms])

    def __sub__(self, other: Extent) -> Extent:
        return _sum([*self.terms, *((powers, -c) for powers, c in other.terms)])

    def __mul__(self, other: Extent) -> Extent:
        return _sum(
            [
                (tuple(p + q for p, q in zip(powers, more, strict=True)), c * d)
                for powers, c in self.terms
                for more, d in other.terms
            ]
        )

    def __truediv__(self, divisor: int | Fraction) -> Extent:
        return _sum([(powers, c / Fraction(divisor)) for powers, c in self.terms])

    @property
    def constant(self) -> int | None:
        """Its value where no axis is in it."""
        return int(sum(c for _, c in self.terms)) if all(p == _NONE for p, _ in self.terms) else None

    @property
    def steps(self) -> dict[Axis, int]:
        """What each axis has to be a multiple of by itself, so that the extent is whole."""
        return {
            axis: c.denominator
            for powers, c in self.terms
            for axis, power in zip(AXES, powers, strict=True)
            if power == sum(powers) == 1
        }

    def at(self, sizes: Mapping[Axis, int]) -> int:
        """Return its value where the axes have ``sizes``.

        Raises:
            QlipError: It is not whole.
        """
        value = sum(
            (c * math.prod(sizes[axis] ** p for axis, p in zip(AXES, powers, strict=True) if p))
            for powers, c in self.terms
        )
        if Fraction(value).denominator != 1:
            raise QlipError(
                f"{self} is no whole number", found=", ".join(f"{a} {n}" for a, n in sizes.items())
            )
        return int(value)


Extents = tuple[Extent, ...]
"""A shape."""


def _sum(terms: Iterable[tuple[_Powers, Fraction]]) -> Extent:
    found: dict[_Powers, Fraction] = {}
    for powers, c in terms:
        found[powers] = found.get(powers, Fraction(0)) + c
    return Extent(tuple(sorted((powers, c) for powers, c in found.items() if c)))


class AxisRange(Frozen):
    """Between which numbers an axis may lie."""

    min: int = Field(ge=1)
    opt: int = Field(description="what the engines are tuned for: the compiler chooses kernels by it")
    max: int
    step: int = Field(default=1, ge=1, description="what it has to be a multiple of")

    def __str__(self) -> str:
        """Return it as ``--profile`` takes it."""
        return f"{self.min}x{self.opt}x{self.max}"

    def __contains__(self, value: int) -> bool:
        return self.min <= value <= self.max and value % self.step == 0

    def with_size(self, size: int) -> AxisRange:
        """Return it, widened where ``size`` lies outside."""
        return self.model_copy(update={"min": min(self.min, size), "max": max(self.max, size)})

    @property
    def in_steps(self) -> AxisRange:
        """The multiples of ``step`` next to it: no narrower, but for a least of 0."""
        low = max(1, self.min // self.step) * self.step
        best = max(1, round(self.opt / self.step)) * self.step
        return self.model_copy(update={"min": low, "opt": best, "max": -(-self.max // self.step) * self.step})

    @property
    def told(self) -> str:
        """The range in words."""
        multiples = f", multiples of {self.step}" if self.step > 1 else ""
        return f"{self.min} to {self.max}{multiples}"


Profile = dict[Axis, AxisRange]
"""The axes that are not static."""


@dataclass(frozen=True)
class EngineShapes:
    """The inputs and outputs of an engine, and the profile it is compiled for.

    Attributes:
        ports: Shape of each.
        profile: The axes that vary; the extents have no others.
        own: What these are in the graph that it is made from.
    """

    ports: Mapping[str, Extents]
    profile: Profile
    own: Mapping[Axis, int]

    def at(self, which: str, port: str) -> tuple[int, ...]:
        """Return the shape of a port at the ``min``, ``opt`` or ``max`` of the profile."""
        sizes = {axis: getattr(held, which) for axis, held in self.profile.items()}
        return tuple(extent.at(sizes) for extent in self.ports[port])

    def varies(self, port: str) -> bool:
        """Return whether a port has more than one shape."""
        return any(extent.constant is None for extent in self.ports[port])


MOST: dict[Axis, int] = {"batch": MOST_IMAGES, "height": 8192, "width": 8192}
"""Where ranges end: batches as in ``--size``; sides of images far beyond what models are trained for."""


def spelt(profile: Profile) -> str:
    """Return ranges as they are typed, e.g. ``--profile batch:1x1x4 --profile height:512x768x1024``."""
    return " ".join(f"--profile {axis}:{held}" for axis, held in profile.items())


def parse_profile(texts: Iterable[str]) -> Profile:
    """Return the ranges of e.g. ``batch:1x1x4``, each ``name:MINxOPTxMAX``.

    Raises:
        QlipError: Another form, an unknown or repeated name, or numbers that do not rise or go beyond `MOST`.
    """
    profile: Profile = {}
    for text in texts:
        form = re.fullmatch(r"(\w+):(\d+)x(\d+)x(\d+)", text)
        axis = next((axis for axis in AXES if form is not None and axis == form[1]), None)
        if form is None or axis is None:
            raise QlipError(
                f"--profile {text} is no range",
                expected=f"NAME:MINxOPTxMAX, where NAME is {', '.join(AXES[:-1])} or {AXES[-1]}",
                found=text,
                fix="e.g. --profile batch:1x1x4 --profile height:512x768x1024",
            )
        low, best, high = (int(number) for number in form.groups()[1:])
        if not 1 <= low <= best <= high:
            raise QlipError(
                f"--profile {text}: the numbers do not rise",
                expected="1 <= MIN <= OPT <= MAX",
                found=f"{low}, {best}, {high}",
                fix="e.g. --profile {}:{}x{}x{}".format(axis, *sorted(max(1, n) for n in (low, best, high))),
            )
        if high > MOST[axis]:
            raise QlipError(
                f"--profile {text}: MAX is too large",
                expected=f"at most {MOST[axis]} {'images' if axis == 'batch' else 'pixels'}",
                found=str(high),
                fix=f"e.g. --profile {axis}:{min(low, MOST[axis])}x{min(best, MOST[axis])}x{MOST[axis]}",
            )
        if axis in profile:
            raise QlipError(
                f"--profile {text}: {axis} has a range already",
                expected=f"one range for {axis}",
                found=f"--profile {axis}:{profile[axis]} before it",
                fix=f"leave one of them out, e.g. --profile {text} alone",
            )
        profile[axis] = AxisRange(min=low, opt=best, max=high)
    return profile
