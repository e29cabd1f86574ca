"""Models by name: what is part of the package, what lies on the Hugging Face Hub, and any folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError
from qlip_export.manifest import ModelEntry

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ZooModel:
    """A model, and where it was found.

    Attributes:
        name: Short name, e.g. of the bundle's folder.
        source: As it is found again: a name of the zoo, an id of the Hub, or an absolute path.
        folder: Where its diffusers folder lies.
        calibration: Folder with its calibration results, or ``None``.
        revision: Commit of a model from the Hub, else ``None``.
    """

    name: str
    source: str
    folder: Path
    calibration: Path | None = None
    revision: str | None = None


def _calibration(name: str) -> Path | None:
    # In the wheel the calibration folder lies inside the package, in a clone beside it.
    for root in (_PACKAGE / "calibration", _PACKAGE.parent / "calibration"):
        if (root / name).is_dir():
            return root / name
    return None


EMBEDDED = {"emoji": _PACKAGE / "zoo" / "emoji"}
"""Models whose weights are part of the package."""

HUB = {
    "bk-sdm-tiny": "nota-ai/bk-sdm-tiny-2m",
    "bk-sdm-small": "nota-ai/bk-sdm-small-2m",
    "bk-sdm-base": "nota-ai/bk-sdm-base-2m",
    "sd-v1-4": "CompVis/stable-diffusion-v1-4",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "flux-dev": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
}
"""Models of the Hub whose configs are part of the package: `plan` and random weights need nothing else."""

CONFIGS = _PACKAGE / "zoo" / "configs"


def find_model(
    name: str, *, revision: str | None = None, random_weights: int | None = None, lora: Sequence[str] = ()
) -> tuple[ZooModel, Checkpoint]:
    """Return a model: of the zoo, a folder in the diffusers layout, or an id of the Hub.

    Args:
        name: What to look for, in this order.
        revision: Branch, tag or commit of a model from the Hub.
        random_weights: Seed of random weights instead of the model's own; only configs are read.
        lora: ``PATH[:SCALE]`` of LoRAs to fuse into the weights.

    Raises:
        QlipError: None of these, or a download that failed; the message says what to do.
    """
    if revision is not None and (name in EMBEDDED or Path(name).is_dir()):
        raise QlipError(
            f"{name} has no revisions", expected="--revision with a model of the Hub", found=revision
        )
    model = _located(name, revision) if random_weights is None else _configs_of(name, revision)
    checkpoint = Checkpoint(model.folder)
    if random_weights is not None:
        from qlip_export.random_weights import RandomCheckpoint

        checkpoint = RandomCheckpoint(model.folder, random_weights, EMBEDDED["emoji"] / "tokenizer")
    if lora:
        from qlip_export.lora import LoraRef, fuse

        denoiser = "transformer" if "transformer" in checkpoint else "unet"
        fuse(checkpoint, [LoraRef.parse(text) for text in lora], denoiser)
    return model, checkpoint


def model_of(entry: ModelEntry, instead: str | None = None) -> tuple[ZooModel, Checkpoint]:
    """Return the model that a bundle was built from, or the one called ``instead``.

    Raises:
        QlipError: As `find_model`.
    """
    if instead is not None:
        return find_model(instead)
    return find_model(
        entry.source, revision=entry.revision, random_weights=entry.random_weights, lora=entry.lora
    )


def calibration_of(entry: ModelEntry) -> Path | None:
    """Return the calibration folder of the model that a bundle was built from; looks nowhere but here."""
    return _calibration(entry.source) if entry.source in EMBEDDED or entry.source in HUB else None


def find_configs(name: str, *, revision: str | None = None) -> tuple[ZooModel, Checkpoint]:
    """As `find_model`, but without weights: nothing is downloaded for a model of the zoo.

    Raises:
        QlipError: As `find_model`.
    """
    model = _configs_of(name, revision)
    return model, Checkpoint(model.folder)


def _configs_of(name: str, revision: str | None) -> ZooModel:
    if name in HUB and revision is None:
        return ZooModel(name, name, CONFIGS / name, _calibration(name))
    return _located(name, revision, weights=False)


def _located(name: str, revision: str | None, *, weights: bool = True) -> ZooModel:
    if name in EMBEDDED:
        return ZooModel(name, name, EMBEDDED[name], _calibration(name))
    folder = Path(name)
    if name not in HUB and (folder.exists() or name.count("/") != 1 or name.startswith(("/", ".", "~"))):
        if not folder.exists() and len(folder.parts) == 1:
            close = get_close_matches(name, [*EMBEDDED, *HUB], 1)
            raise QlipError(
                f"unknown model {name!r}",
                expected=f"{', '.join([*EMBEDDED, *HUB])}, a diffusers folder, or an id of the Hub",
                found=f"no folder {folder.resolve()}",
                fix=f"--model {close[0]}"
                if close
                else "give a name of the zoo, a path, or ORGANISATION/MODEL",
            )
        return ZooModel(folder.resolve().name, str(folder.resolve()), folder)
    from qlip_export.zoo.hub import download

    found = download(HUB.get(name, name), revision, weights=weights)
    short = name.rsplit("/", 1)[-1]
    return ZooModel(short, name, found, _calibration(name) if name in HUB else None, revision=found.name)
