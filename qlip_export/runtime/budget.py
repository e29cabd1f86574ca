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


def parse_size(amount: str, *, bare: bool = False) -> int | None:
    """Return the bytes of an amount of memory: ``600MB`` (10**6 bytes each), ``1.5GiB`` (2**30).

    Args:
        amount: The text.
        bare: Take a number without a unit as bytes.

    Returns:
        The bytes; ``None`` where it is no such amount.
    """
    text = amount.strip()
    match = _AMOUNT.fullmatch(f"{text}B" if bare and text[-1:].isdigit() else text)
    return None if match is None else int(float(match[1]) * _UNITS[match[2].upper()])


def parse_budget(amount: str | int) -> int:
    """Return the bytes of a budget: text as `parse_size` reads it, or a number of bytes.

    Raises:
        QlipError: No such amount, or not above zero.
    """
    size = amount if isinstance(amount, int) else parse_size(amount)
    if size is None:
        raise QlipError(
            "the memory budget is no amount of memory", expected="e.g. 600MB or 1.5GiB", found=str(amount)
        )
    if size <= 0:
        raise QlipError("the memory budget is not above zero", expected="e.g. 600MB", found=str(amount))
    return size
