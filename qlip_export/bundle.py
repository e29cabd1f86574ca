"""A bundle: a directory with a manifest that accounts for every file in it.

JSON, ONNX, raw tensors and engine files only; nothing in a bundle is ever unpickled or executed as code.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from qlip_export.compiled import EngineEntry, TargetEntry
from qlip_export.errors import QlipError
from qlip_export.files import sha256_of
from qlip_export.manifest import SCHEMA_VERSION, Manifest
from qlip_export.spec import Frozen

MANIFEST = "manifest.json"


def best_fast_option(options: Sequence[int]) -> int:
    """Return the largest of ``options`` up to 16 bits, or the smallest where all are larger."""
    return max((bits for bits in options if bits <= 16), default=min(options))


def compile_command(root: Path, backend: str = "openvino") -> str:
    """Return the command that adds engines to the bundle ``root``."""
    return f"qlip-export compile {root} --backend {backend}"


def building_folder(out: Path) -> Path:
    """Return where a build of the bundle ``out`` works: hidden, and named so that no one else uses it."""
    out = out.absolute()
    return out.with_name(f".{out.name}.qlip-building")


class Bundle:
    """A bundle opened for reading; files are checked against their hashes when they are asked for.

    Attributes:
        root: The folder.
        manifest: Of all that is in it, or what `narrowed` left of that.
        whole: Of all that is in it, as it was read.
    """

    def __init__(self, root: Path, manifest: Manifest, whole: Manifest | None = None) -> None:
        """Use `Bundle.open` instead."""
        self.root = root
        self.manifest = manifest
        self.whole = whole or manifest

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> Bundle:
        """Read and check the manifest.

        Raises:
            QlipError: No bundle there, another schema version, unknown keys, a path that leaves the bundle.
        """
        folder = Path(root)
        path = folder / MANIFEST
        if not path.is_file():
            hint = "; its build was interrupted" if building_folder(folder).is_dir() else ""
            raise QlipError(
                f"{folder} is no bundle{hint}",
                expected=f"a folder with {MANIFEST}",
                found="no such folder" if not folder.exists() else f"no {MANIFEST} in it",
                fix=f"qlip-export build --model emoji -o {folder}",
            )
        try:
            text = path.read_text(encoding="utf-8")
            version = _Versioned.model_validate_json(text).schema_version
            if version != SCHEMA_VERSION:
                raise QlipError(
                    f"{path} has another schema version",
                    expected=str(SCHEMA_VERSION),
                    found=str(version),
                    fix="build the bundle again with this version of qlip-export",
                )
            return cls(folder, Manifest.model_validate_json(text))
        except (ValidationError, OSError, UnicodeDecodeError) as error:
            raise QlipError(
                f"{path} is not a valid manifest", found=_first_line(error), fix="build the bundle again"
            ) from error

    def narrowed(self, manifest: Manifest) -> Bundle:
        """Return this bundle as one of ``manifest``: a single size of its own, or some of its targets."""
        return Bundle(self.root, manifest, self.whole)

    def file(self, path: str) -> Path:
        """Return the absolute path of a file of the bundle, after checking its size and SHA-256.

        Raises:
            QlipError: The file is missing, truncated or altered, or is not listed.
        """
        entry = self.manifest.files.get(path)
        full = self.root / path
        if entry is None:
            raise QlipError(
                f"the manifest of {self.root} lists no file {path!r}", fix="build the bundle again"
            )
        if not full.resolve().is_relative_to(self.root.resolve()):
            raise QlipError(
                f"{path!r} leaves the bundle", found=str(full.resolve()), fix="build the bundle again"
            )
        if not full.is_file():
            raise QlipError(f"{full} is missing", fix="build the bundle again")
        size = full.stat().st_size
        if size != entry.size:
            raise QlipError(
                f"{full} has the wrong size",
                expected=f"{entry.size} bytes",
                found=f"{size} bytes",
                fix="build the bundle again",
            )
        digest = sha256_of(full)
        if digest != entry.sha256:
            raise QlipError(
                f"{full} was altered after the build",
                expected=f"SHA-256 {entry.sha256}",
                found=digest,
                fix="build the bundle again",
            )
        return full

    def engine(self, target: TargetEntry, onnx: str) -> EngineEntry:
        """Return the engine that ``target`` has of an ONNX file.

        Raises:
            QlipError: It has none.
        """
        entry = target.engines.get(onnx)
        if entry is None:
            raise QlipError(
                f"{self.root} holds no {target.backend} engine of {onnx}",
                fix=compile_command(self.root, target.backend),
            )
        return entry

    @property
    def uniform(self) -> tuple[int, ...]:
        """See `Manifest.uniform`."""
        return self.manifest.uniform

    def bits(self, requested: int | None = None) -> int:
        """Return the bit option of a uniform run: the requested one, else the best that runs fast.

        Without a request that is the largest option up to 16 bits, which no one can tell from FP32 by eye.

        Raises:
            QlipError: The bundle has no such option.
        """
        options = self.uniform
        if not options or (requested in self.manifest.bits and requested not in options):
            raise QlipError(
                "the engines of this bundle run what its policy asks for, and no uniform bits",
                found=None if requested is None else str(requested),
                fix="build it with --granularity block",
            )
        if requested is None:
            return best_fast_option(options)
        if requested not in options:
            raise QlipError(
                f"the bundle has no {requested}-bit engines",
                expected=" or ".join(map(str, options)),
                found=str(requested),
                fix=f"qlip-export build --bits {','.join(map(str, sorted({*options, requested})))} ...",
            )
        return requested

    def guidance(self, requested: float | None = None) -> float:
        """Return the guidance scale of a run: the requested one, else the model's own.

        Raises:
            QlipError: Not finite, or the model has no such scale.
        """
        own = self.manifest.guidance
        if requested is None:
            return own.scale
        if not math.isfinite(requested):
            raise QlipError("the guidance scale is not finite", expected="a number", found=str(requested))
        if own.kind == "none" and requested != own.scale:
            raise QlipError(
                f"{self.manifest.model.name} takes no guidance scale",
                expected="none: guidance was distilled into its denoiser at one scale",
                found=str(requested),
                fix="leave --guidance away",
            )
        return float(requested)


class _Versioned(Frozen, extra="ignore"):
    schema_version: int


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}{more}"
    return str(error)
