"""What is known of images drawn for T2Q, kept on disk as they come: drawing takes hours and may be cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors

from qlip_export.calibrate.quality import Drawn
from qlip_export.files import written_aside

PART = 512
"""Images of a file while drawing; they become one file at the end."""


def read(path: Path) -> Drawn | None:
    """Return what `path` holds, or nothing: an interrupted copy is removed, drawing again mends it."""
    from safetensors.numpy import load_file

    if not path.is_file():
        return None
    try:
        found = load_file(path)
        return Drawn(found["features"], found["complexity"])
    except (safetensors.SafetensorError, KeyError):
        path.unlink()
        return None


def keep(drawn: Drawn, path: Path) -> None:
    """Write ``drawn`` to ``path``."""
    from safetensors.numpy import save_file

    with written_aside(path) as aside:
        save_file({k: np.ascontiguousarray(v) for k, v in vars(drawn).items()}, aside)


def parts(count: int, path: Path) -> Iterator[tuple[slice, Path]]:
    """Return which of ``count`` images go together, and the file of each such part of ``path``."""
    for start in range(0, count, PART):
        yield slice(start, min(start + PART, count)), path.with_suffix(f".{start}{path.suffix}")


def drawn_in_parts(count: int, path: Path, draw: Callable[[slice], Drawn]) -> Drawn:
    """Draw ``count`` images, those excepted that an earlier run kept, and write all of them to ``path``."""
    found: list[Drawn] = []
    for part, file in parts(count, path):
        drawn = read(file)
        if drawn is None:
            drawn = draw(part)
            keep(drawn, file)
        found.append(drawn)
    whole = Drawn(*(np.concatenate([getattr(d, name) for d in found]) for name in ("features", "complexity")))
    keep(whole, path)
    for _, file in parts(count, path):
        file.unlink(missing_ok=True)
    return whole
