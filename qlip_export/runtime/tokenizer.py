"""Prompts to token ids, as the model's own tokenizer does it, by the `tokenizers` library alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from qlip_export.bundle import Bundle
from qlip_export.manifest import TokenizerEntry


@dataclass(frozen=True)
class TokenizedPrompts:
    """Token ids (N, L) int64, and for each prompt the part that did not fit ('' if all did)."""

    ids: NDArray[np.int64]
    cut: tuple[str, ...]


class PromptTokenizer:
    """The tokenizer of one of a bundle's text encoders."""

    def __init__(self, bundle: Bundle, entry: TokenizerEntry) -> None:
        """Load its JSON file, pad and truncate to the text encoder's length."""
        self._tokenizer = Tokenizer.from_file(str(bundle.file(entry.path)))
        self._tokenizer.enable_truncation(entry.max_length)
        self._tokenizer.enable_padding(length=entry.max_length, pad_id=entry.pad_id)

    def __call__(self, prompts: list[str]) -> TokenizedPrompts:
        """Tokenize ``prompts``; what is longer than the text encoder takes is cut, as diffusers does."""
        encodings = self._tokenizer.encode_batch(prompts)
        cut = []
        for prompt, encoding in zip(prompts, encodings, strict=True):
            ends = [end for _, end in encoding.offsets if end]
            cut.append(prompt[max(ends, default=0) :].strip() if encoding.overflowing else "")
        return TokenizedPrompts(np.array([e.ids for e in encodings], dtype=np.int64), tuple(cut))
