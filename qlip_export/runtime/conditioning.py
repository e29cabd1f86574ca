"""Prompts to what the denoiser is given over a run, as the manifest's recipes say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlip_export.bundle import Bundle
from qlip_export.conditioning import Constant, Encoded, GuidanceScale
from qlip_export.errors import QlipError
from qlip_export.manifest import TextEncoderEntry
from qlip_export.runtime.tokenizer import PromptTokenizer

Arrays = dict[str, NDArray[Any]]
Engine = Callable[..., Arrays]


@dataclass(frozen=True)
class Conditioned:
    """A batch of prompts as the denoiser and the policy take them.

    Attributes:
        inputs: Of the denoiser but latents and timestep, float32, by name; the negative half comes first.
        pooled: (N, C_clip) float32, the prompts' embeddings that the policy reads.
        warnings: What did not fit into a text encoder.
    """

    inputs: Arrays
    pooled: NDArray[np.float32]
    warnings: tuple[str, ...]


class Conditioner:
    """Tokenizers and text encoders of a bundle, and what is made of their outputs."""

    def __init__(self, bundle: Bundle, encoders: Mapping[str, Engine]) -> None:
        """Load the tokenizers; ``encoders`` run the text encoders, by name."""
        self._manifest = bundle.manifest
        self._encoders = encoders
        self._tokenizers = {
            entry.name: PromptTokenizer(bundle, entry.tokenizer) for entry in bundle.manifest.text_encoders
        }

    def check(self, negative: str | None) -> None:
        """Refuse a negative prompt that the model has no use for.

        Raises:
            QlipError: The model is not steered by classifier-free guidance.
        """
        if negative and self._manifest.guidance.kind != "classifier-free":
            raise QlipError(
                f"{self._manifest.model.name} takes no negative prompt",
                expected="none: its denoiser runs on the prompt alone, guidance was distilled into it",
                found=repr(negative),
                fix="leave --negative-prompt away",
            )

    def __call__(
        self, prompts: Sequence[str], negative: str | None, guidance: float, counted: int
    ) -> Conditioned:
        """Encode a batch.

        Args:
            prompts: As many as the bundle's batch size.
            negative: What to steer away from; ``None`` stands for the model's own way of saying nothing.
            guidance: Guidance scale.
            counted: Prompts whose cuts are worth a warning; the rest pads the batch.
        """
        half = len(prompts) * (self._manifest.guidance.rows - 1)
        texts = [negative or ""] * half + list(prompts)
        encoded: dict[str, Arrays] = {}
        warnings: dict[str, None] = {}
        for entry in self._manifest.text_encoders:
            tokens = self._tokenizers[entry.name](texts)
            for what, text, cut in [
                *zip(["negative prompt"] * min(half, 1), texts, tokens.cut, strict=False),
                *(("prompt", texts[i], tokens.cut[i]) for i in range(half, half + counted)),
            ]:
                if cut:
                    warnings[self._cut(entry, what, text, cut)] = None
            encoded[entry.name] = self._encoders[entry.name](input_ids=tokens.ids)
        pooled = encoded[self._manifest.quality_encoder]["pooled"][half:]
        inputs = self._inputs(encoded, guidance)
        if half and negative is None and self._manifest.guidance.zeros:
            for name, recipe in self._manifest.conditioning.items():
                if isinstance(recipe, Encoded):
                    inputs[name][:half] = 0
        return Conditioned(inputs, pooled, tuple(warnings))

    def pooled(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Return the embeddings that the policy reads of one batch of prompts, (N, C_clip) float32."""
        half = len(prompts) * (self._manifest.guidance.rows - 1)
        name = self._manifest.quality_encoder
        ids = self._tokenizers[name]([""] * half + list(prompts)).ids
        found: NDArray[np.float32] = self._encoders[name](input_ids=ids)["pooled"][half:]
        return found

    def _inputs(self, encoded: Mapping[str, Arrays], guidance: float) -> Arrays:
        shapes = {tensor.name: tensor.shape for tensor in self._manifest.inputs}
        made: Arrays = {}
        for name, recipe in self._manifest.conditioning.items():
            match recipe:
                case Encoded():
                    made[name] = np.concatenate([encoded[e][recipe.output] for e in recipe.encoders], axis=-1)
                case Constant():
                    row = np.array(recipe.at(self._manifest.shapes.image), np.float32)
                    made[name] = np.broadcast_to(row, shapes[name]).copy()
                case GuidanceScale():
                    made[name] = np.full(shapes[name], guidance, np.float32)
        return made

    def _cut(self, entry: TextEncoderEntry, what: str, text: str, cut: str) -> str:
        name = "the text encoder" if len(self._manifest.text_encoders) == 1 else entry.name
        return (
            f"the {what} is longer than {name} takes "
            f"({entry.tokenizer.max_length} tokens); cut: {cut!r} (of {text[:40]!r}...)"
        )
