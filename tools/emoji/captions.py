"""Concepts, styles and the captions drawn from them, at four levels of richness."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

LEVELS = ("name", "keywords", "style", "sentence")
LEVEL_WEIGHTS = (0.2, 0.2, 0.3, 0.3)
MAX_CHARACTERS = 160
MAX_KEYWORDS = 4
QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'"})

# No template needs an article before the name: names are singular, plural and proper alike.
SENTENCES = (
    "an emoji of {name} in {style}",
    "an emoji showing {name}, drawn in {style}",
    "a {style} emoji of {name} on a white background",
    "a picture of {name} in {style}, centered on white",
    "an icon of {name}{extra}, drawn in {style}",
    "an emoji of {name}{extra} in {style} on a white background",
)
CANONICAL_SENTENCE = SENTENCES[0]


@dataclass(frozen=True)
class Style:
    """One drawing style: its key, the phrase captions use, and the npm package that holds its art."""

    key: str
    phrase: str
    package: str
    version: str
    licence: str


STYLES = (
    Style("noto", "noto style", "@iconify-json/noto", "1.2.9", "Apache-2.0"),
    Style("twemoji", "twemoji style", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0"),
    Style("fluent-flat", "fluent flat style", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    Style("fluent-color", "fluent color style", "@iconify-json/fluent-emoji", "1.2.7", "MIT"),
)


@dataclass(frozen=True)
class Concept:
    """One emoji, whatever its style: hexcode, English name and keywords (lower case, alphabetical)."""

    hexcode: str
    name: str
    keywords: tuple[str, ...]
    group: str


def clean(text: str) -> str:
    """Return `text` in lower case, with plain quotes and single spaces."""
    return re.sub(r"\s+", " ", text.translate(QUOTES)).strip().lower()


def merge_keywords(name: str, *sources: Sequence[str]) -> tuple[str, ...]:
    """Return the distinct cleaned keywords of all `sources`, alphabetically, without the name itself."""
    found = {clean(keyword) for source in sources for keyword in source}
    return tuple(sorted(keyword for keyword in found if keyword and keyword != clean(name)))


def draw_keywords(concept: Concept, rng: random.Random, at_most: int = MAX_KEYWORDS) -> list[str]:
    """Draw one to `at_most` keywords in random order; none where the concept has none.

    The sources store keywords alphabetically: taking the first few would always show the same letters.
    """
    if not concept.keywords:
        return []
    return rng.sample(concept.keywords, min(len(concept.keywords), rng.randint(1, at_most)))


def caption(concept: Concept, style: Style, level: str, rng: random.Random) -> str:
    """Draw one caption of `concept` in `style` at `level`, one of `LEVELS`, at most 160 characters long.

    A caption that would be too long loses whole keywords, never a part of a word.

    Raises:
        ValueError: `level` is not one of `LEVELS`, or the name alone is too long.
    """
    if level not in LEVELS:
        raise ValueError(f"expected a caption level among {', '.join(LEVELS)}, found {level!r}")
    keywords = draw_keywords(concept, rng)
    template = rng.choice(SENTENCES)
    # Half of the styled captions carry keywords: a style alone must be enough of a prompt too.
    plain = rng.random() < 0.5
    while True:
        text = compose(concept.name, keywords, style, level, template, plain)
        if len(text) <= MAX_CHARACTERS:
            return text
        if not keywords:
            raise ValueError(
                f"expected a name shorter than {MAX_CHARACTERS} characters, found {concept.name!r}"
            )
        keywords = keywords[:-1]


def compose(name: str, keywords: Sequence[str], style: Style, level: str, template: str, plain: bool) -> str:
    """Write the caption of one level from its parts; `plain` leaves the keywords out of a styled caption."""
    if level == "name":
        return name
    if level == "keywords":
        return ", ".join([name, *keywords])
    if level == "style":
        return ", ".join([name, *([] if plain else keywords), style.phrase])
    extra = f" with {' and '.join(keywords[:2])}" if keywords else ""
    return template.format(name=name, style=style.phrase, extra=extra)


def draw_caption(concept: Concept, style: Style, rng: random.Random) -> tuple[str, bool]:
    """Draw a caption at a random level; the second value says whether it names the style."""
    level = rng.choices(LEVELS, LEVEL_WEIGHTS)[0]
    return caption(concept, style, level, rng), level in ("style", "sentence")


def canonical_caption(concept: Concept, style: Style) -> str:
    """Return the one caption that evaluation uses: name and style in a sentence, no keywords."""
    return CANONICAL_SENTENCE.format(name=concept.name, style=style.phrase)


def split(concepts: Sequence[Concept], held_out: int, seed: int) -> tuple[list[Concept], list[Concept]]:
    """Split `concepts` into those to train on and `held_out` others, whole emoji at a time.

    The draw depends on the set of hexcodes and on `seed` alone, not on the order of `concepts`.
    """
    if not 0 < held_out < len(concepts):
        raise ValueError(f"expected to hold out 1 to {len(concepts) - 1} concepts, found {held_out}")
    chosen = set(random.Random(seed).sample(sorted(concept.hexcode for concept in concepts), held_out))
    trained = [concept for concept in concepts if concept.hexcode not in chosen]
    return trained, [concept for concept in concepts if concept.hexcode in chosen]
