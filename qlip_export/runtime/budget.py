"""Amounts of memory as people write them."""

from __future__ import annotations

import re

from qlip_export.errors import QlipError

_UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}IB": 1024**i for i, prefix in enumerate("KMGT", 1)},
}
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?((?:[KMGT]I?)?B)", re.IGNORECASE)


def parse_budget(amount: str | int) -> int:
    """Return bytes: ``600MB`` (10**6 bytes each), ``1.5GiB`` (2**30), or a number of bytes.

    Raises:
        QlipError: No such amount, or not above zero.
    """
    if isinstance(amount, int):
        size = amount
    else:
        match = _AMOUNT.fullmatch(amount.strip())
        if match is None:
            raise QlipError(
                "the memory budget is no amount of memory", expected="e.g. 600MB or 1.5GiB", found=amount
            )
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size <= 0:
        raise QlipError("the memory budget is not above zero", expected="e.g. 600MB", found=str(amount))
    return size
