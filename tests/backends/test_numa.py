"""Memory that was bound to the only NUMA node and freed merges again with what lies beside it."""

from __future__ import annotations

import ctypes
import mmap
import platform
from pathlib import Path

import pytest

from qlip_export.backends import numa

PAGES = 64


def pieces(start: int) -> int:
    """Return in how many mappings the pages from ``start`` on lie."""
    spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    return sum(start <= int(first, 16) < start + PAGES * mmap.PAGESIZE for first, _ in spans)


@pytest.mark.skipif(not numa._has_one_node(), reason="not Linux, or not exactly one NUMA node")
def test_bound_pages_merge_again() -> None:
    memory = mmap.mmap(-1, PAGES * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    call = ctypes.CDLL(None).syscall
    call.argtypes = [ctypes.c_long] * 7
    to_node = ctypes.c_ulong(1)
    before = pieces(start)
    for page in range(1, PAGES, 2):
        bind, mask = 2, ctypes.addressof(to_node)
        number = numa._MBIND[platform.machine()]
        assert call(number, start + page * mmap.PAGESIZE, mmap.PAGESIZE, bind, mask, 64, 0) == 0
    assert pieces(start) >= PAGES - 1
    numa.unbind_memory()
    assert pieces(start) <= before + 1
    memory[:] = bytes(len(memory))


def test_where_there_are_several_nodes_nothing_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = tmp_path / "possible"
    nodes.write_text("0-1\n")
    monkeypatch.setattr(numa, "_NODES", nodes)
    monkeypatch.setattr(numa, "_MAPS", tmp_path / "never read")
    numa._has_one_node.cache_clear()
    try:
        numa.unbind_memory()
    finally:
        numa._has_one_node.cache_clear()
