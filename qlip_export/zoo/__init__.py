"""Models by name, and where their calibration lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ZooModel:
    """A model that is known by name.

    Attributes:
        name: As given on the command line.
        folder: Where its diffusers folder lies.
        calibration: Folder with its calibration results, or ``None``.
    """

    name: str
    folder: Path
    calibration: Path | None


def _calibration(name: str) -> Path | None:
    # In the wheel the calibration folder lies inside the package, in a clone beside it.
    for root in (_PACKAGE / "calibration", _PACKAGE.parent / "calibration"):
        if (root / name).is_dir():
            return root / name
    return None


EMBEDDED = {"emoji": _PACKAGE / "zoo" / "emoji"}
"""Models whose weights are part of the package."""


def find_model(name: str) -> tuple[ZooModel, Checkpoint]:
    """Return the model called ``name``: of the zoo, or a folder in the diffusers layout.

    Raises:
        QlipError: Neither; the message lists what is known.
    """
    if name in EMBEDDED:
        model = ZooModel(name, EMBEDDED[name], _calibration(name))
        return model, Checkpoint(model.folder)
    folder = Path(name)
    if not folder.exists() and len(folder.parts) == 1:
        raise QlipError(
            f"unknown model {name!r}",
            expected=f"{', '.join(EMBEDDED)}, or a folder in the diffusers layout",
            found=f"no folder {folder.resolve()}",
            fix="give a name of the zoo or a path",
        )
    checkpoint = Checkpoint(folder)
    return ZooModel(folder.resolve().name, folder, None), checkpoint
