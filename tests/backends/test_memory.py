"""Memory that no file backs is what engines are charged for."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from qlip_export.backends.memory import private_bytes, sampled_private_bytes, tells_memory
from tests.long_use import resident_bytes

SIZE = 64_000_000

pytestmark = pytest.mark.skipif(not tells_memory(), reason="memory is read from /proc")


def test_pages_of_files_are_not_private(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(SIZE))
    with (tmp_path / "file").open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    private, resident = private_bytes(), resident_bytes()
    for page in range(0, SIZE, mmap.PAGESIZE):
        mapping[page]
    assert resident_bytes() - resident > 0.8 * SIZE
    assert private_bytes() - private < 0.2 * SIZE


def test_a_peak_between_samples_of_the_ends_is_seen() -> None:
    before = private_bytes()
    with sampled_private_bytes() as samples:
        buffer = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for _ in range(20):
            for page in range(0, SIZE, mmap.PAGESIZE):
                buffer[page] = 1
        buffer.close()
    assert max(samples) - before > 0.8 * SIZE
    assert samples[-1] - before < 0.2 * SIZE
