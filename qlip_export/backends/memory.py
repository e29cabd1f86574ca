"""What an engine takes of the process's memory, measured by loading, running and dropping it."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from qlip_export.backends.base import Backend
from qlip_export.bundle import EngineEntry, EngineMemory

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def measure_engine(backend: Backend, path: Path, entry: EngineEntry) -> EngineMemory | None:
    """Return what an engine file takes when it is loaded into this process and run.

    Resident memory is read after free memory has gone back to the system, so it counts pages that are in use:
    private ones, and those of the engine file that a run reads. It is what dropping the engine gives back:
    what stays behind, in heap pages that others use too, is not in it.

    Args:
        backend: Loads and runs it; its device must be this process's memory.
        path: The engine file.
        entry: Its ports.

    Returns:
        Bytes, and the seconds of loading it; ``None`` where the system does not tell (anything but Linux).
    """
    if peak_resident_bytes() is None:
        return None
    buffers = {p.name: backend.allocate(p.shape, p.dtype) for p in (*entry.inputs, *entry.outputs)}
    return_free_memory()
    reset_peak()
    started = time.process_time()
    engine = backend.load(path, entry)
    seconds = time.process_time() - started
    engine.frugal = True
    for name, buffer in buffers.items():
        engine.bind(name, buffer)
    while_loading = _peak()
    engine.run()
    return_free_memory()
    idle = resident_bytes()
    reset_peak()
    engine.run()
    running = _peak()
    del engine
    return_free_memory()
    resident = max(0, idle - resident_bytes())
    return EngineMemory(
        resident=resident,
        scratch=max(0, running - idle),
        loading=max(0, while_loading - idle),
        seconds=round(seconds, 4),
    )


def resident_bytes() -> int:
    """Return the resident memory of this process (Linux)."""
    return _field("VmRSS") or 0


def available_memory_bytes() -> int | None:
    """Return what new allocations may take without swapping, or ``None`` where the system cannot tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def peak_resident_bytes() -> int | None:
    """Return the most that was resident since `reset_peak`, or ``None`` where the system cannot tell."""
    return _field("VmHWM") if os.access(_CLEAR, os.W_OK) else None


def reset_peak() -> None:
    """Begin a new peak."""
    _CLEAR.write_text("5")


def return_free_memory() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc).

    Engines go when nothing refers to them. Python's collector is not asked: with torch loaded it takes longer
    than loading an engine.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


def _peak() -> int:
    return peak_resident_bytes() or 0


def _field(name: str) -> int | None:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # not glibc
        return None
    return found
