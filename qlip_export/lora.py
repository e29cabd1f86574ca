"""Fuse LoRA files into a checkpoint: ``W + scale * alpha / r * B A`` (Hu et al. 2021), one weight at a time.

Read are safetensors as diffusers' ``save_lora_weights`` and PEFT write them. Weights are fused when they are
asked for: before they are quantized, and none before its turn.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlip_export.checkpoint import Checkpoint, Component, read_json
from qlip_export.errors import QlipError
from qlip_export.files import content_key, sha256_of

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and PEFT call a LoRA in a folder of its own."""

_OLD_NAMES = (
    (r"\.processor\.to_out_lora\.", ".to_out.0.lora."),
    (r"\.processor\.to_([qkv])_lora\.", r".to_\1.lora."),
    (r"\.lora_linear_layer\.", ".lora."),
    (r"\.lora\.down\.weight$", ".lora_A.weight"),
    (r"\.lora\.up\.weight$", ".lora_B.weight"),
    (r"\.lora_([AB])\.default\.weight$", r".lora_\1.weight"),
)
"""How older versions spell it, and how we read it."""


@dataclass(frozen=True)
class LoraRef:
    """A LoRA on the command line: ``PATH`` or ``PATH:SCALE``."""

    path: Path
    scale: float

    @classmethod
    def parse(cls, text: str) -> LoraRef:
        """Read ``PATH[:SCALE]``.

        Raises:
            QlipError: There is no such file, or the scale is no finite number.
        """
        head, _, tail = text.rpartition(":")
        path, scale = (Path(head), tail) if head and not Path(text).exists() else (Path(text), "1")
        try:
            value = float(scale)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise QlipError(f"--lora {text}: the scale is no number", expected="PATH:SCALE", found=scale)
        if path.is_dir():
            path = next((path / name for name in FILES if (path / name).is_file()), path)
        if not path.is_file() or path.suffix != ".safetensors":
            raise QlipError(
                f"cannot read the LoRA {path}",
                expected=f"a .safetensors file, or a folder with {' or '.join(FILES)}",
                found="a file that can run code" if path.is_file() else "no such file",
                fix="pickled LoRAs are not read; convert it to safetensors",
            )
        return cls(path.resolve(), value)

    def __str__(self) -> str:
        """Return what `parse` reads."""
        return f"{self.path}:{self.scale:g}"


@dataclass(frozen=True)
class LowRank:
    """The change of one weight: ``scale * up @ down``, both float32; down (r, inputs), up (outputs, r)."""

    down: NDArray[np.float32]
    up: NDArray[np.float32]
    scale: float

    def delta(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return the change in the shape of the weight, (out, in, ...)."""
        change: NDArray[np.float32] = np.float32(self.scale) * (self.up @ self.down)
        return change.reshape(shape)


@dataclass(frozen=True)
class FusedComponent(Component):
    """A part of a model whose weights have LoRAs added, by the names of the checkpoint."""

    base: Component
    changes: Mapping[str, tuple[LowRank, ...]]
    key: str

    @property
    def names(self) -> Mapping[str, Any]:
        """What the parameters are called in the file, as keys."""
        return self.base.names

    @property
    def changed(self) -> tuple[str, ...]:
        """Parameters that are not what the folder holds."""
        return tuple(self.changes)

    def require_weights(self) -> None:
        """As the model's own."""
        self.base.require_weights()

    def _read(self, stored: str) -> NDArray[Any]:
        array = self.base._read(stored)
        if stored not in self.changes:
            return array
        fused = array.astype(np.float32)
        for change in self.changes[stored]:
            fused += change.delta(fused.shape)
        return fused.astype(array.dtype if array.dtype == np.float16 else np.float32)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the model and with every LoRA and scale."""
        return content_key("lora", self.base.fingerprint, self.key)


def fuse(checkpoint: Checkpoint, loras: Sequence[LoraRef], denoiser: str) -> None:
    """Add LoRAs to the components of ``checkpoint``, in place; ``denoiser`` is its folder.

    Raises:
        QlipError: A file that is no LoRA, or one for another model.
    """
    key = content_key(*((sha256_of(lora.path), lora.scale) for lora in loras))
    changes: dict[str, dict[str, tuple[LowRank, ...]]] = {}
    for lora in loras:
        for module, change in _read(lora).items():
            part, stored = _target(checkpoint, lora, module, change, denoiser)
            found = changes.setdefault(part, {})
            found[stored] = (*found.get(stored, ()), change)
    for part, found in changes.items():
        base = checkpoint.component(part)
        checkpoint.replace(part, FusedComponent(base.folder, base, found, key))


def _target(
    checkpoint: Checkpoint, lora: LoraRef, module: str, change: LowRank, denoiser: str
) -> tuple[str, str]:
    """Return the component that a module is of, and what the checkpoint calls its weight."""
    first, _, rest = module.partition(".")
    part, path = (first, rest) if first in checkpoint else (denoiser, module)
    component = checkpoint.component(part)
    stored = component.find(f"{path}.weight")
    size = (change.up.shape[0], change.down.shape[1])
    shape = component.shape_of(stored) if stored is not None else None
    if stored is None or shape is None or (shape[0], math.prod(shape[1:])) != size:
        raise QlipError(
            f"the LoRA {lora.path} is for another model than {checkpoint.folder}",
            expected=f"a weight of {size[0]} outputs and {size[1]} inputs in {part} for {path}",
            found="no such weight" if shape is None else f"shape {tuple(shape)}",
            fix="give the LoRA of this model",
        )
    return part, stored


def _read(lora: LoraRef) -> dict[str, LowRank]:
    """Return the changes of a LoRA file by module, e.g. ``unet.mid_block.attentions.0.proj_in``."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(lora.path, framework="numpy") as file:
            tensors = {_name(k): np.asarray(file.get_tensor(k)).astype(np.float32) for k in list(file.keys())}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise QlipError(f"cannot read the LoRA {lora.path}", found=str(error), fix="get it again") from error
    settings = _settings(lora.path, metadata)
    modules = [k.removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight")]
    known = {f"{m}.{end}" for m in modules for end in ("lora_A.weight", "lora_B.weight", "alpha")}
    unknown = sorted(set(tensors) - known)
    if unknown or not modules or not all(f"{m}.lora_B.weight" in tensors for m in modules):
        raise QlipError(
            f"{lora.path} is no LoRA in the format of diffusers or PEFT",
            expected="pairs of lora_A and lora_B, or lora.down and lora.up",
            found=unknown[0] if unknown else "no such pair",
            fix="convert it with diffusers: load_lora_weights, then save_lora_weights",
        )
    changes = {}
    for module in modules:
        down, up = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        rank = down.shape[0]
        alpha = float(tensors.get(f"{module}.alpha", np.float32(_alpha(settings, module, rank))))
        factor = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        down, up = down.reshape(rank, -1), up.reshape(up.shape[0], -1)
        if up.shape[1] != rank or not (np.isfinite(down).all() and np.isfinite(up).all()):
            raise QlipError(f"the LoRA {lora.path} is broken at {module}", fix="get it again")
        changes[module] = LowRank(down, up, lora.scale * factor)
    return changes


def _name(stored: str) -> str:
    name = stored.removeprefix("base_model.model.")
    for old, new in _OLD_NAMES:
        name = re.sub(old, new, name)
    return name


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return PEFT's configuration of a LoRA: beside the file, or in its metadata as diffusers keeps it."""
    config = path.parent / "adapter_config.json"
    if config.is_file():
        settings = read_json(config)
    else:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        # diffusers names the component before each key; its LoRAs have one configuration for each.
        settings = {k.rpartition(".")[2]: v for k, v in settings.items()}
    if settings.get("use_dora"):
        raise QlipError(f"{path} is a DoRA", expected="a LoRA", fix="fuse it with PEFT and build from that")
    return settings


def _alpha(settings: Mapping[str, Any], module: str, rank: int) -> float:
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(alpha)
    return float(settings.get("lora_alpha") or rank)
