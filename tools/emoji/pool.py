"""The training examples in tensors: images on the device, and captions drawn ahead and tokenized."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tools.emoji import tokenizer as bpe
from tools.emoji.captions import STYLES, canonical_caption, draw_caption
from tools.emoji.data import Dataset

STYLE_BY_KEY = {style.key: style for style in STYLES}
CAPTIONS_PER_IMAGE = 32


@dataclass(frozen=True)
class Pool:
    """One side of the split, image by image.

    `pixels` is (images, side, side, 3) uint8; `concept` and `style` are (images,) int64; `ids` is
    (images, captions, 77) int16 and `styled` (images, captions) bool says which captions name the style;
    `canonical` is (images, 77) int64, the captions of evaluation.
    """

    pixels: Tensor
    concept: Tensor
    style: Tensor
    ids: Tensor
    styled: Tensor
    canonical: Tensor
    captions: list[str]

    def __len__(self) -> int:
        """Return the number of images."""
        return int(self.pixels.shape[0])

    def to(self, device: torch.device) -> "Pool":
        """Return the pool with its tensors on `device`."""
        return Pool(
            **{
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in vars(self).items()
            }
        )

    def first(self, count: int) -> "Pool":
        """Return the pool of the first `count` images."""
        return Pool(**{name: value[:count] for name, value in vars(self).items()})


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of the data set or of the model in `folder`."""
    return Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))


def make_pool(
    dataset: Dataset, tokenizer: Tokenizer, held_out: bool, seed: int, captions: int = CAPTIONS_PER_IMAGE
) -> Pool:
    """Gather the images of one side of the split and draw `captions` captions for each, on the CPU."""
    rng = random.Random(seed)
    chosen = [number for number, record in enumerate(dataset.records) if record.held_out == held_out]
    texts: list[str] = []
    styled: list[bool] = []
    canonical = []
    for number in chosen:
        record = dataset.records[number]
        concept, style = dataset.concepts[record.concept], STYLE_BY_KEY[record.style]
        canonical.append(canonical_caption(concept, style))
        for _ in range(captions):
            text, names_style = draw_caption(concept, style, rng)
            texts.append(text)
            styled.append(names_style)
    ids = numpy.array(list(bpe.encode(tokenizer, texts)), dtype=numpy.int16)
    keys = list(STYLE_BY_KEY)
    return Pool(
        pixels=torch.from_numpy(dataset.pixels[chosen]),
        concept=torch.tensor([dataset.records[number].concept for number in chosen]),
        style=torch.tensor([keys.index(dataset.records[number].style) for number in chosen]),
        ids=torch.from_numpy(ids.reshape(len(chosen), captions, bpe.MAX_TOKENS)),
        styled=torch.tensor(styled).view(len(chosen), captions),
        canonical=torch.tensor(list(bpe.encode(tokenizer, canonical))),
        captions=canonical,
    )


def pick(total: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` distinct numbers below `total`, or with repeats where `count` is larger."""
    if count > total:
        return torch.randint(total, (count,), generator=generator, device=generator.device)
    return torch.randperm(total, generator=generator, device=generator.device)[:count]
