"""A diffusers folder as it lies on disk: its parts, their configs, and their weights read one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlip_export.errors import QlipError
from qlip_export.files import sha256_of

_OLD_ATTENTION_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""How autoencoders of Stable Diffusion's first versions call the parts of attention."""

_TIED_NAMES = {"encoder.embed_tokens.weight": "shared.weight"}
"""Parameters of T5 that are one, and are stored once."""


@dataclass(frozen=True)
class Component:
    """One part of a diffusers pipeline (denoiser, text encoder, VAE): a config and safetensors shards."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed `config.json`."""
        return read_json(self.folder / "config.json")

    @cached_property
    def _shard_of(self) -> dict[str, Path]:
        shards = sorted(self.folder.glob("*.safetensors"))
        # Folders may hold the same weights twice, as `model.safetensors` and `model.fp16.safetensors`.
        plain = [s for s in shards if "." not in s.name.removesuffix(".safetensors")]
        shards = plain or shards
        if not shards:
            pickles = [p.name for p in (*self.folder.glob("*.bin"), *self.folder.glob("*.ckpt"))]
            raise QlipError(
                f"no safetensors weights in {self.folder}",
                expected="*.safetensors",
                found=", ".join(pickles) or "no weight file",
                fix="convert the model to safetensors; pickled checkpoints are not read, they can run code",
            )
        from safetensors import SafetensorError, safe_open

        where: dict[str, Path] = {}
        for shard in shards:
            try:
                with safe_open(shard, framework="numpy") as file:
                    where.update(dict.fromkeys(file.keys(), shard))
            except (SafetensorError, OSError) as error:
                raise QlipError(
                    f"cannot read {shard}", found=str(error), fix="download or copy the model again"
                ) from error
        for index in self.folder.glob("*.safetensors.index.json"):
            missing = set(read_json(index)["weight_map"].values()) - {s.name for s in shards}
            if missing and index.name.split(".safetensors")[0] in {s.name.split("-")[0] for s in shards}:
                raise QlipError(
                    f"shards are missing in {self.folder}",
                    expected=", ".join(sorted(missing)),
                    fix="download or copy the model again",
                )
        return where

    def require_weights(self) -> None:
        """Open every shard, so that a broken download is found before any work is done.

        Raises:
            QlipError: No safetensors, a missing shard, or one that cannot be read.
        """
        if not self._shard_of:
            raise QlipError(f"the weights in {self.folder} hold no parameter", fix="get the model again")

    @property
    def names(self) -> Mapping[str, Any]:
        """What the parameters are called in the file, as keys."""
        return self._shard_of

    @property
    def changed(self) -> tuple[str, ...]:
        """Parameters that are not what the folder holds."""
        return ()

    def get(self, name: str, *, bfloat16: bool = False) -> NDArray[Any]:
        """Return one parameter as float16 or float32, in its stored shape.

        One that is stored in bfloat16 is widened, unless the caller takes ``bfloat16``.

        Raises:
            QlipError: The checkpoint has no such parameter, or it is not finite.
        """
        array = self._read(self._stored_name(name))
        kept = array.dtype in (np.float16, np.float32) or (bfloat16 and array.dtype.name == "bfloat16")
        if not kept:
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise QlipError(
                f"parameter {name!r} in {self.folder} is not finite",
                fix="the checkpoint is broken; get it again",
            )
        return array

    def _read(self, stored: str) -> NDArray[Any]:
        from safetensors import safe_open

        with safe_open(self._shard_of[stored], framework="numpy") as file:
            return np.asarray(file.get_tensor(stored))

    def shape_of(self, stored: str) -> tuple[int, ...]:
        """Return the shape of a parameter by its name in the file, without reading it."""
        from safetensors import safe_open

        with safe_open(self._shard_of[stored], framework="numpy") as file:
            return tuple(file.get_slice(stored).get_shape())

    def find(self, name: str) -> str | None:
        """Return what the file calls a parameter, or ``None`` where it has none.

        Old checkpoints keep the names of their day.
        """
        old = name
        for new_part, old_part in _OLD_ATTENTION_NAMES.items():
            old = old.replace(f".{new_part}.", f".{old_part}.")
        for candidate in (name, old, _TIED_NAMES.get(name, name)):
            if candidate in self.names:
                return candidate
        # transformers drops the prefix of a model's only child ("text_model.") in newer versions.
        longer = [stored for stored in self.names if stored.endswith(f".{name}")]
        return longer[0] if len(longer) == 1 else None

    def _stored_name(self, name: str) -> str:
        stored = self.find(name)
        if stored is None:
            raise QlipError(
                f"the weights in {self.folder} have no parameter {name!r}",
                fix="check that config.json and the weights belong together",
            )
        return stored

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config and weights: changes whenever anything the build reads here changes."""
        digest = hashlib.sha256()
        for path in (self.folder / "config.json", *sorted(set(self._shard_of.values()))):
            digest.update(path.name.encode())
            digest.update(sha256_of(path).encode())
        return digest.hexdigest()


class Checkpoint:
    """A model folder in the diffusers layout."""

    def __init__(self, folder: Path) -> None:
        """Read `model_index.json`.

        Raises:
            QlipError: The folder is absent or is no diffusers model.
        """
        self.folder = folder
        if not (folder / "model_index.json").is_file():
            entries = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else []
            raise QlipError(
                f"{folder} is no diffusers model",
                expected="a folder with model_index.json and one subfolder for each component",
                found=", ".join(entries) or ("an empty folder" if folder.is_dir() else "no such folder"),
                fix="name a model of the zoo or a folder written by save_pretrained()",
            )
        self.index = read_json(folder / "model_index.json")
        self._components: dict[str, Component] = {}

    @property
    def random_seed(self) -> int | None:
        """Seed of the weights, where they are random; else none."""
        return None

    def folder_of(self, name: str) -> Path:
        """Return where a component's files lie."""
        return self.folder / name

    def class_of(self, name: str) -> str:
        """Return the class that `model_index.json` names for a component.

        Raises:
            QlipError: The component is not listed.
        """
        return self._entry(name)[1]

    def library_of(self, name: str) -> str:
        """Return the library of that class, ``diffusers`` or ``transformers``.

        Raises:
            QlipError: The component is not listed.
        """
        return self._entry(name)[0]

    def _entry(self, name: str) -> tuple[str, str]:
        entry = self.index.get(name)
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
            raise QlipError(
                f"{self.folder / 'model_index.json'} lists no {name}",
                expected=f'"{name}": ["library", "ClassName"]',
                found=json.dumps(entry),
                fix="use a text-to-image model in the diffusers layout",
            )
        return str(entry[0]), entry[1]

    def component(self, name: str) -> Component:
        """Return a component by its folder name."""
        self.class_of(name)
        # One object for each: reading headers and hashing gigabytes is done once.
        return self._components.setdefault(name, Component(self.folder_of(name)))

    def replace(self, name: str, component: Component) -> None:
        """Have `component` return another part from now on."""
        self._components[name] = component

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the listed components."""
        return (k for k, v in self.index.items() if isinstance(v, list) and len(v) == 2 and v[1])


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file.

    Raises:
        QlipError: The file is missing or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QlipError(f"cannot read {path}", expected="a JSON file", found=str(error)) from error
    if not isinstance(value, dict):
        raise QlipError(f"cannot read {path}", expected="a JSON object", found=type(value).__name__)
    return value
