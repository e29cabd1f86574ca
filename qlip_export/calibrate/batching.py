"""Many samples in parts that fit the device, and their results in one tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def slices(count: int, at_once: int) -> Iterator[slice]:
    """Return the slices of ``count`` samples, ``at_once`` in each but perhaps the last."""
    return (slice(start, min(start + at_once, count)) for start in range(0, count, at_once))


class Stack:
    """Rows of many calls in one FP16 tensor, there from the first on: joining them would hold all twice.

    Attributes:
        values: (count, ...) float16, on the device of the rows; filled by `add` from the first row on.
    """

    def __init__(self, count: int) -> None:
        """Allocate nothing yet: the first rows tell the shape and the device."""
        self._count, self._filled = count, 0
        self.values = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """Append ``rows`` (n, ...), any float dtype."""
        if not self._filled:
            self.values = rows.new_empty(self._count, *rows.shape[1:], dtype=torch.float16)
        self.values[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)
