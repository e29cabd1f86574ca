"""Undo OpenVINO's binding of memory to a NUMA node where there is only one: it splits mappings for good.

OpenVINO binds its weights and kernels to the node that it runs on, page range by page range, in memory of the
C library's heaps. A range keeps its binding when it is freed, and Linux merges no mappings whose bindings
differ. So a process that loads and drops engines for days would come to the 65,530 mappings that it may have.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

_MBIND = {"x86_64": 237, "aarch64": 235}
"""Numbers of the system call, for which the C library has no function."""
_NODES = Path("/sys/devices/system/node/possible")
_MAPS = Path("/proc/self/maps")


def unbind_memory() -> None:
    """Let all anonymous memory of this process follow its default policy, so that mappings merge.

    Where there are several nodes a binding means something, and where the system tells of none there is
    nothing to undo: then this does nothing.
    """
    if not _has_one_node():
        return
    call = ctypes.CDLL(None).syscall
    call.argtypes = [ctypes.c_long] * 7
    number, default = _MBIND[platform.machine()], 0
    for start, end in _anonymous():
        # What another thread has unmapped meanwhile is an error that changes nothing.
        call(number, start, end - start, default, 0, 0, 0)


@cache
def _has_one_node() -> bool:
    if platform.system() != "Linux" or platform.machine() not in _MBIND:
        return False
    return _NODES.is_file() and _NODES.read_text().strip() == "0"


def _anonymous() -> list[tuple[int, int]]:
    """Return the private anonymous memory of this process, neighbours joined."""
    found: list[tuple[int, int]] = []
    for line in _MAPS.read_text().splitlines():
        span, mode, _, _, _, *path = line.split(maxsplit=5)
        if not mode.endswith("p") or (path and path[0].strip() != "[heap]"):
            continue
        start, end = (int(address, 16) for address in span.split("-"))
        if found and found[-1][1] == start:
            start, _ = found.pop()
        found.append((start, end))
    return found
