"""The C library's heaps: engines come and go in them, and what is free must go back to the system."""

from __future__ import annotations

import ctypes
import os

_M_ARENA_MAX = -8


def return_free_memory() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc).

    Engines go when nothing refers to them. Python's collector is not asked: with torch loaded it takes longer
    than loading an engine.
    """
    if _C_LIBRARY is not None:
        _C_LIBRARY.malloc_trim(0)


def share_one_heap() -> None:
    """Have the threads of this process allocate from the heaps that there are (glibc).

    By default new threads get a heap each, up to eight for every core. What a library's threads allocate for
    an engine then lies between what they keep, in heaps that shrink from one end only. Where the environment
    has ``MALLOC_ARENA_MAX``, that holds.
    """
    if _C_LIBRARY is not None and "MALLOC_ARENA_MAX" not in os.environ:
        _C_LIBRARY.mallopt(_M_ARENA_MAX, 1)


def _load_c_library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        _ = library.malloc_trim, library.mallopt
    except (OSError, TypeError, AttributeError):  # not glibc
        return None
    return library


_C_LIBRARY = _load_c_library()
