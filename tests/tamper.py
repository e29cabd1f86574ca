"""Ways to damage a copy of a bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlip_export.bundle import Bundle
from qlip_export.compiled import EngineEntry
from qlip_export.files import sha256_of


def copy_of(bundle: Path, folder: Path) -> Path:
    return Path(shutil.copytree(bundle, folder / "bundle"))


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    edit(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def accept(bundle: Path, path: str) -> None:
    """Make the manifest agree with what `path` holds now."""

    def edit(manifest: dict[str, Any]) -> None:
        manifest["files"][path] |= {
            "sha256": sha256_of(bundle / path),
            "size": (bundle / path).stat().st_size,
        }

    edit_manifest(bundle, edit)


def engine_entry(bundle: Path, block: str, bits: int, target: str = "openvino") -> EngineEntry:
    opened = Bundle.open(bundle)
    (entry,) = [b for b in opened.manifest.blocks if b.name == block]
    return opened.engine(opened.manifest.targets[target], entry.variants[f"a{bits}"].onnx)


def flip_byte(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def truncate_text(path: Path) -> None:
    """Cut more than a final newline off."""
    path.write_bytes(path.read_bytes()[:-10])


def alter_engine(
    bundle: Path, block: str, bits: int, change: Callable[[Any], Any], target: str = "openvino"
) -> None:
    """Compile a block with other biases and vouch for it in the manifest: whole, but wrong."""
    import numpy as np
    import onnx_ir as ir

    from qlip_export.backends import get_backend

    (entry,) = [b for b in Bundle.open(bundle).manifest.blocks if b.name == block]
    engine = engine_entry(bundle, block, bits, target)
    model = ir.load(bundle / entry.variants[f"a{bits}"].onnx)
    biases = [v for n, v in model.graph.initializers.items() if n.removesuffix(".half").endswith(".bias")]
    for value in biases:
        assert value.const_value is not None
        array = value.const_value.numpy()
        value.const_value = ir.tensor(np.asarray(change(array), dtype=array.dtype), name=value.name)
    altered = bundle / "altered.onnx"
    ir.save(model, altered, external_data="altered.data")
    get_backend(target).compile(altered, bundle / engine.path, engine.container)
    for path in bundle.glob("altered.*"):
        path.unlink()
    accept(bundle, engine.path)
