"""Text encoders of transformers: what each class computes, as ONNX graphs, and their tokenizers."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlip_export.capture import Shapes, export_graph
from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError
from qlip_export.pipelines import TextEncoder

if TYPE_CHECKING:
    import onnx_ir as ir


def _clip(module: Any, ids: Tensor, states: str) -> dict[str, Tensor]:
    # With a projection, the encoder is a child; older versions of transformers have one without as well.
    inner = getattr(module, "text_model", module)
    penultimate = states == "penultimate"
    out = inner(input_ids=ids, output_hidden_states=penultimate)
    # Pooled *before* the projection: T2Q's first linear is the projection itself (QLIP, table S5).
    found = {
        "text": out.hidden_states[-2] if penultimate else out.last_hidden_state,
        "pooled": out.pooler_output,
    }
    if hasattr(module, "text_projection"):
        found["projected"] = module.text_projection(out.pooler_output)
    return found


def _t5(module: Any, ids: Tensor, _: str) -> dict[str, Tensor]:
    return {"text": module(input_ids=ids).last_hidden_state}


@dataclass(frozen=True)
class _Class:
    """What a class of transformers computes, and the class of its config."""

    encode: Callable[[Any, Tensor, str], dict[str, Tensor]]
    config: str
    attention: str


PART_WEIGHTS = 600_000_000
"""Numbers that an engine of a text encoder holds at most: compilers take several times their bytes."""

_LAYER = re.compile(r"(?:^|\.)(?:block|layers)\.(\d+)(?:\.|$)")
"""The number of a layer of CLIP or T5 in the path of a module or parameter."""


def parts_of(sizes: Mapping[str, int]) -> list[range]:
    """Return the layers of each engine that a text encoder becomes; none where one engine holds it.

    Args:
        sizes: Numbers in each parameter, by name. What belongs to no layer counts for the first.
    """
    if sum(sizes.values()) <= PART_WEIGHTS:
        return []
    held: dict[int, int] = {}
    for name, size in sizes.items():
        found = _LAYER.search(name)
        layer = int(found[1]) if found else 0
        held[layer] = held.get(layer, 0) + size
    starts, room = [0], PART_WEIGHTS
    for layer in range(max(held) + 1):
        size = held.get(layer, 0)
        if size > room and layer > starts[-1]:
            starts.append(layer)
            room = PART_WEIGHTS
        room -= size
    return [range(a, b) for a, b in zip(starts, (*starts[1:], max(held) + 1), strict=True)]


def part_of(scope: str, parts: list[range]) -> str | None:
    """Return the name of the engine that computes a module, or ``None`` for modules in no layer."""
    found = _LAYER.search(scope)
    if found is None:
        return None
    return next(f"part{i}" for i, layers in enumerate(parts) if int(found[1]) in layers)


_CLASSES = {
    "CLIPTextModel": _Class(_clip, "CLIPTextConfig", "sdpa"),
    "CLIPTextModelWithProjection": _Class(_clip, "CLIPTextConfig", "sdpa"),
    "T5EncoderModel": _Class(_t5, "T5Config", "eager"),
}


def encode(module: torch.nn.Module, ids: Tensor, encoder: TextEncoder) -> dict[str, Tensor]:
    """Return the outputs of a text encoder for token ids (N, L) int64, by name.

    Raises:
        QlipError: A class that is not known.
    """
    name = type(module).__name__
    if name not in _CLASSES:
        raise _unknown(name)
    found = _CLASSES[name].encode(module, ids, encoder.states)
    return {output: found[output] for output in encoder.outputs}


class _TextEncoder(torch.nn.Module):
    def __init__(self, module: torch.nn.Module, encoder: TextEncoder) -> None:
        super().__init__()
        self.module, self.encoder = module, encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(encode(self.module, input_ids, self.encoder).values())


def capture_text_encoder(checkpoint: Checkpoint, shapes: Shapes, encoder: TextEncoder) -> ir.Model:
    """Return a text encoder's graph.

    Input: input_ids (rows of the denoiser's batch, L) int64. Outputs, float32: those that ``encoder`` names.

    Raises:
        QlipError: A class that is not known, or one without an output that is needed.
    """
    name = checkpoint.class_of(encoder.name)
    if name not in _CLASSES:
        raise _unknown(name)
    projection = "CLIPTextModelWithProjection"
    if "projected" in encoder.outputs and name != projection:
        raise QlipError(
            f"{encoder.name} of {checkpoint.folder} has no projection", expected=projection, found=name
        )
    if name == projection and "projected" not in encoder.outputs:
        name = "CLIPTextModel"  # its projection goes unused
    known = _CLASSES[name]
    length = text_length(checkpoint, shapes, encoder)

    def make() -> tuple[torch.nn.Module, tuple[Tensor, ...]]:
        transformers = importlib.import_module("transformers")
        config = getattr(transformers, known.config).from_dict(checkpoint.component(encoder.name).config)
        config._attn_implementation = known.attention
        module = getattr(transformers, name)(config)
        return _TextEncoder(module, encoder), (torch.zeros(shapes.denoiser_batch, length, dtype=torch.int64),)

    return export_graph(make, ("input_ids",), encoder.outputs)


def text_length(checkpoint: Checkpoint, shapes: Shapes, encoder: TextEncoder) -> int:
    """Return how many tokens a text encoder takes: its positions, or as many as the denoiser's text has."""
    positions = checkpoint.component(encoder.name).config.get("max_position_embeddings")
    return int(positions or shapes.text_length)


@dataclass(frozen=True)
class CapturedTokenizer:
    """A tokenizer as the `tokenizers` library reads it, and how prompts are padded."""

    json: str
    max_length: int
    pad_id: int


def capture_tokenizer(checkpoint: Checkpoint, shapes: Shapes, encoder: TextEncoder) -> CapturedTokenizer:
    """Return the tokenizer of a text encoder; one that has only vocabulary and merges is converted.

    Raises:
        QlipError: A class that transformers does not have.
    """
    transformers = importlib.import_module("transformers")
    folder, name = checkpoint.folder_of(encoder.tokenizer), checkpoint.class_of(encoder.tokenizer)
    if not hasattr(transformers, name):
        raise QlipError(f"transformers has no tokenizer {name!r}", expected="e.g. CLIPTokenizer", found=name)
    tokenizer = getattr(transformers, name).from_pretrained(folder, local_files_only=True)
    return CapturedTokenizer(
        json=tokenizer.backend_tokenizer.to_str(),
        max_length=text_length(checkpoint, shapes, encoder),
        pad_id=int(tokenizer.pad_token_id),
    )


def _unknown(name: str) -> QlipError:
    return QlipError("the text encoder cannot be captured", expected=", ".join(_CLASSES), found=name)
