"""What an engine takes of the process's memory, measured by loading, running and dropping it."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlip_export.backends.base import Backend
from qlip_export.backends.heap import return_free_memory
from qlip_export.compiled import EngineEntry, EngineMemory

_STATM = Path("/proc/self/statm")
_PAGE = mmap.PAGESIZE
_SAMPLE = 0.001


def measure_engine(backend: Backend, path: Path, entry: EngineEntry) -> EngineMemory | None:
    """Return what an engine file takes when it is loaded into this process and run.

    Private memory is read after free memory has gone back to the system. It is what dropping the engine gives
    back: what stays behind, in heap pages that others use too, is not in it. Nor are pages of the engine file
    that is mapped: the system drops them when memory runs short, and how many it maps around one that is read
    is its own choice.

    Args:
        backend: Loads and runs it; its device must be this process's memory.
        path: The engine file.
        entry: Its ports.

    Returns:
        Bytes, and the seconds of loading it; ``None`` where the system does not tell (anything but Linux).
    """
    if not tells_memory():
        return None
    buffers = {p.name: backend.allocate(p.shape, p.dtype) for p in (*entry.inputs, *entry.outputs)}
    return_free_memory()
    before = private_bytes()
    with sampled_private_bytes() as while_loading:
        started = time.process_time()
        engine = backend.load(path, entry)
        seconds = time.process_time() - started
    engine.frugal = True
    for name, buffer in buffers.items():
        engine.bind(name, buffer)
    return_free_memory()
    with sampled_private_bytes() as running:
        engine.run()
        return_free_memory()
        idle = private_bytes()
        engine.run()
    del engine
    return_free_memory()
    resident = max(0, idle - private_bytes())
    return EngineMemory(
        resident=resident,
        scratch=max(0, max(running) - idle),
        loading=max(0, max(while_loading) - before - resident),
        seconds=round(seconds, 4),
    )


def tells_memory() -> bool:
    """Return whether the system tells what this process takes (Linux)."""
    return _STATM.is_file()


def private_bytes() -> int:
    """Return the resident memory of this process that no file backs (Linux).

    Raises:
        OSError: The system does not tell; see `tells_memory`.
    """
    _, resident, shared, *_ = _STATM.read_text(encoding="ascii").split()
    return (int(resident) - int(shared)) * _PAGE


def available_memory_bytes() -> int | None:
    """Return what new allocations may take without swapping, or ``None`` where the system cannot tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


@contextmanager
def sampled_private_bytes() -> Iterator[list[int]]:
    """Yield a list of what `private_bytes` is from now on, every millisecond."""
    samples = [private_bytes()]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(_SAMPLE):
            samples.append(private_bytes())

    sampler = threading.Thread(target=sample, name="qlip-memory")
    sampler.start()
    try:
        yield samples
    finally:
        done.set()
        sampler.join()
        samples.append(private_bytes())
