"""What everything costs in bytes, as the paper's section F accounts for it, and what lies on the disk.

The paper's MB and KB are 2**20 and 2**10 bytes: `mebibytes` and `kibibytes` give its numbers.
"""

from __future__ import annotations

from pydantic import Field

from qlip_export.manifest import Manifest
from qlip_export.spec import T2Q_HIDDEN, Frozen

FLOAT = 4
"""Bytes of a float32."""


class MemoryRow(Frozen):
    """One part and its bytes."""

    group: str
    part: str
    bytes: int
    note: str = Field(description="how the number comes about")


def t2q_bytes(projected: int) -> int:
    """Return the size of T2Q's trained linears, float32, for a text projection of ``projected`` outputs.

    The frozen projection belongs to the text encoder and is not counted: for 768 these are 1.5 MB.
    """
    return FLOAT * (projected * T2Q_HIDDEN + T2Q_HIDDEN + T2Q_HIDDEN + 1)


def q2b_bytes(units: int, groups: int, per_group: int) -> int:
    """Return the size of Q2B, float32: s and o of each unit, and ``per_group`` logits of each unit and group.

    For 141 layers, 10 timestep groups and both p_m and p_h: 12.1 KB.
    """
    return FLOAT * (2 * units + per_group * units * groups)


def activation_grid_bytes(layers: int, options: int) -> int:
    """Return the size of a scale and a zero point for each layer and quantized bit option, float32.

    For 141 layers and two options: 2.2 KB.
    """
    return FLOAT * 2 * layers * options


def weight_bytes(parameters: int, bits: int) -> int:
    """Return the size of ``parameters`` numbers of ``bits`` bits; BK-SDM-Tiny's at 4 bits: 154.2 MB."""
    return -(-parameters * bits // 8)


def mebibytes(size: int) -> float:
    """Return bytes in the paper's MB."""
    return size / 2**20


def kibibytes(size: int) -> float:
    """Return bytes in the paper's KB."""
    return size / 2**10


def account(manifest: Manifest) -> list[MemoryRow]:
    """Return the account of a bundle: what QLIP adds, the model, its weights, the files, loaded engines."""
    return [
        *_policy(manifest),
        *_model(manifest),
        *_weights(manifest),
        *_files(manifest),
        *_loaded(manifest),
    ]


def _policy(manifest: Manifest) -> list[MemoryRow]:
    layers = sum(layer.quantized for block in manifest.blocks for layer in block.layers)
    options = sum(bits < 32 for bits in manifest.bits)
    rows = []
    if (policy := manifest.policy) is not None:
        projected, pooled = policy.projection
        units, groups = len(policy.table.units), len(policy.table.choices)
        learned = len(set(policy.parts) - {"q"})
        rows = [
            ("T2Q", t2q_bytes(projected), f"linears {projected} to {T2Q_HIDDEN} to 1"),
            (
                "Q2B",
                q2b_bytes(units, groups, learned),
                f"{units} {policy.unit}s, {groups} timestep groups, parts {', '.join(policy.parts)}",
            ),
            ("T2Q's projection", FLOAT * projected * pooled, "the text encoder's own, not section F's"),
        ]
    rows.append(
        (
            "activation scales and zero points",
            activation_grid_bytes(layers, options),
            f"{layers} layers, {options} options below 32 bits",
        )
    )
    return [MemoryRow(group="QLIP", part=part, bytes=size, note=note) for part, size, note in rows]


def _model(manifest: Manifest) -> list[MemoryRow]:
    bits, count = manifest.quantization.weight_bits, manifest.model.parameters
    rows = [("denoiser", weight_bytes(count, bits), f"{count:,} parameters at {bits} bits")]
    parts = [(encoder.name.replace("_", " "), encoder.name) for encoder in manifest.text_encoders]
    for part, name in (*parts, ("VAE decoder", "vae_decoder")):
        rows.append((part, manifest.files[f"onnx/{name}.weights.bin"].size, "as the checkpoint stores it"))
    return [MemoryRow(group="model", part=part, bytes=size, note=note) for part, size, note in rows]


class _Stored(Frozen, extra="ignore"):
    dtype: str
    length: int


class _Index(Frozen, extra="ignore"):
    tensors: dict[str, _Stored]


def _weights(manifest: Manifest) -> list[MemoryRow]:
    """Account for what lies in the weight files, by what it is."""
    sizes: dict[str, list[int]] = {}
    for path, entry in manifest.files.items():
        if not path.endswith(".weights.bin") or entry.facts is None:
            continue
        for name, tensor in _Index.model_validate(entry.facts).tensors.items():
            if name.endswith(".codes"):
                kind = f"{_CODE_BITS.get(tensor.dtype, tensor.dtype)}-bit weights"
            elif name.removesuffix(".half").endswith(".scale"):
                kind = "scales"
            else:
                kind = f"unquantized, {path.removeprefix('onnx/').removesuffix('.weights.bin')}"
            sizes.setdefault(kind, []).append(tensor.length)
    return [
        MemoryRow(group="weights", part=kind, bytes=sum(found), note=f"{len(found)} tensors")
        for kind, found in sizes.items()
    ]


_CODE_BITS = {"INT4": "4", "INT8": "8"}


def _loaded(manifest: Manifest) -> list[MemoryRow]:
    """Account for what the engines of each target take when all of them are loaded."""
    rows = []
    for name, target in manifest.targets.items():
        known = [engine.memory for engine in target.engines.values() if engine.memory is not None]
        note = f"{len(known)} of {len(target.engines)} engines, measured where they were compiled"
        for part, size in (
            ("resident", sum(memory.resident for memory in known)),
            ("scratch", sum(memory.scratch for memory in known)),
        ):
            if known:
                rows.append(MemoryRow(group="loaded", part=f"{name}, {part}", bytes=size, note=note))
    return rows


def _files(manifest: Manifest) -> list[MemoryRow]:
    sizes: dict[str, list[int]] = {}
    for path, entry in manifest.files.items():
        folder, _, rest = path.partition("/")
        if folder == "engines":
            kind = f"engines of {rest.partition('/')[0]}"
        elif path.endswith(".onnx"):
            kind = "ONNX graphs"
        else:
            kind = "ONNX weights" if path.endswith(".bin") else "other"
        sizes.setdefault(kind, []).append(entry.size)
    return [
        MemoryRow(group="files", part=kind, bytes=sum(found), note=f"{len(found)} files")
        for kind, found in sorted(sizes.items())
    ]
