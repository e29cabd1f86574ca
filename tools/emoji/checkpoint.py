"""Checkpoints as safetensors shards under 16 MiB each, written aside and renamed into place.

A folder is either whole or absent: an interruption while writing leaves only a `.partial` folder behind,
which the next write removes.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SHARD_BYTES = 15 * 2**20
KEPT = 2


def shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """Group `tensors`, in order, into dictionaries of at most `limit` bytes each.

    Raises:
        ValueError: one tensor alone is larger than `limit`.
    """
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if tensor.nbytes > limit:
            raise ValueError(f"expected tensors of at most {limit} bytes, found {name} with {tensor.nbytes}")
        if group and size + tensor.nbytes > limit:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    if group:
        yield group


def write(
    folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], limit: int = SHARD_BYTES
) -> None:
    """Write `tensors` as shards and `state` as JSON to `folder`, replacing what is there in one rename."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, group in enumerate(shards(tensors, limit)):
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in group.items()}
        save_file(plain, partial / f"shard-{number:03d}.safetensors")
    (partial / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    stale = folder.with_name(folder.name + ".stale")
    shutil.rmtree(stale, ignore_errors=True)
    if folder.exists():
        folder.rename(stale)
    partial.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors (on the CPU) and the state that `write` left in `folder`."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("shard-*.safetensors")):
        tensors.update(load_file(path))
    return tensors, state


def write_step(root: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write the checkpoint of one training step under `root` and drop all but the newest two."""
    write(root / f"step-{step:07d}", tensors, {**state, "step": step})
    for old in whole_steps(root)[:-KEPT]:
        shutil.rmtree(old)


def whole_steps(root: Path) -> list[Path]:
    """Return the complete step folders under `root`, oldest first."""
    return sorted(path for path in root.glob("step-*") if path.name[len("step-") :].isdigit())


def read_latest(root: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read the newest complete checkpoint under `root`, or return None where there is none."""
    steps = whole_steps(root)
    return read(steps[-1]) if steps else None


def write_weights(folder: Path, model: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a state dictionary rounded to FP16: what the stages hand on, and what is shipped."""
    half = {name: value.to(torch.float16) for name, value in model.items() if value.is_floating_point()}
    write(folder, half, state)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read weights that `write_weights` left in `folder`, as FP32."""
    return {name: tensor.float() for name, tensor in read(folder)[0].items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of `tensors` whose names start with `prefix`, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
