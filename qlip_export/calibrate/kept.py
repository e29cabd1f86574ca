"""What the long stages keep on disk as it comes, so that a run that is cut loses little.

Drawing 12,000 images and learning a model's blocks takes from half an hour to days.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from qlip_export.calibrate.batching import slices
from qlip_export.calibrate.quality import Drawn
from qlip_export.files import written_aside

PART = 512
"""Images of a file while drawing; they become one file at the end."""


def read_drawn(path: Path) -> Drawn | None:
    """Return what is known of the images of ``path``, if it is there and whole."""
    found = _read(path)
    return None if found is None else Drawn(found["features"], found["complexity"])


def part_files(count: int, path: Path) -> Iterator[tuple[slice, Path]]:
    """Return which of ``count`` images go together, and the file of each such part of ``path``."""
    for part in slices(count, PART):
        yield part, path.with_suffix(f".{part.start}-{part.stop}{path.suffix}")


def drawn_in_parts(count: int, path: Path, draw: Callable[[slice], Drawn]) -> Drawn:
    """Draw ``count`` images, those excepted that an earlier run kept, and write all of them to ``path``.

    Args:
        count: Of all images.
        path: For all of them; it stays, for other criteria and epochs.
        draw: Draws a part.
    """
    found: list[Drawn] = []
    for part, file in part_files(count, path):
        drawn = read_drawn(file)
        if drawn is None:
            drawn = draw(part)
            _write(vars(drawn), file)
        found.append(drawn)
    whole = Drawn(*(np.concatenate([getattr(d, name) for d in found]) for name in ("features", "complexity")))
    _write(vars(whole), path)
    for _, file in part_files(count, path):
        file.unlink(missing_ok=True)
    return whole


@dataclass(frozen=True)
class LearnedBlock:
    """Learned rounding of one block.

    Attributes:
        up: By layer, which weights go to the code above, shape of the weight.
        error_nearest: Squared error of the block's outputs with rounding to nearest, relative to the outputs.
        error_learned: The same with what was learned.
        flipped: Weights that do not go to the nearest code.
    """

    up: dict[str, NDArray[np.bool_]]
    error_nearest: float
    error_learned: float
    flipped: int


class KeptBlocks:
    """Learned blocks in a folder, a file for each."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read or written yet."""
        self._folder = folder

    def get(self, name: str) -> LearnedBlock | None:
        """Return a block that an earlier run learned."""
        found = _read(self._path(name))
        if found is None:
            return None
        layers = [key.removesuffix(".up") for key in found if key.endswith(".up")]
        nearest, learned, flipped = found["measured"].tolist()
        return LearnedBlock(
            up={layer: _unpacked(found[f"{layer}.up"], found[f"{layer}.shape"]) for layer in layers},
            error_nearest=nearest,
            error_learned=learned,
            flipped=int(flipped),
        )

    def put(self, name: str, block: LearnedBlock) -> None:
        """Keep a block."""
        tensors = {"measured": np.array([block.error_nearest, block.error_learned, block.flipped])}
        for layer, up in block.up.items():
            tensors[f"{layer}.up"] = np.packbits(up.ravel())
            tensors[f"{layer}.shape"] = np.array(up.shape)
        _write(tensors, self._path(name))

    def remove(self) -> None:
        """Forget all blocks: the stage has its result."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


def _unpacked(up: NDArray[np.uint8], shape: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.unpackbits(up, count=int(shape.prod())).reshape(shape).astype(np.bool_)


def _read(path: Path) -> dict[str, NDArray[Any]] | None:
    """Return the tensors of ``path``; an interrupted copy is removed, its work is done again."""
    from safetensors.numpy import load_file

    if not path.is_file():
        return None
    try:
        return load_file(path)
    except safetensors.SafetensorError:
        path.unlink(missing_ok=True)
        return None


def _write(tensors: dict[str, NDArray[Any]], path: Path) -> None:
    from safetensors.numpy import save_file

    with written_aside(path) as aside:
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, aside)
