"""Engine files mapped instead of read: weights that the engine repacks need no second copy in memory."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SWEEP = 0.002
"""Seconds between two sweeps: at 2 GB/s about 4 MB are read in that time."""


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[tuple[Any, NDArray[np.uint8]]]:
    """Yield a private mapping of ``path`` and its bytes, and keep pages that were read from piling up.

    A library that loads an engine reads the whole file and copies most of it into the layout of its kernels.
    Pages that were read stay in the process until memory runs short; here they are returned as they come. One
    that is wanted again comes back from the file. Both values must live as long as what uses the bytes.
    """
    with path.open("rb") as file:
        # Copy on write, because OpenVINO takes no read-only arrays; it writes nothing.
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    done = threading.Event()

    def sweep() -> None:
        while not done.wait(SWEEP):
            _return_pages(mapping)

    sweeper = threading.Thread(target=sweep, name="qlip-sweep")
    sweeper.start()
    try:
        yield mapping, np.frombuffer(mapping, dtype=np.uint8)
    finally:
        done.set()
        sweeper.join()
        _return_pages(mapping)


def _return_pages(mapping: mmap.mmap) -> None:
    if hasattr(mapping, "madvise"):  # not on Windows: there the system takes pages back when it needs them
        mapping.madvise(mmap.MADV_DONTNEED)
