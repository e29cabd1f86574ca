"""Write the prompt files of the emoji model: for calibration, for evaluation, and for richness.

`python -m tools.emoji.prompts` reads the index of `build/emoji-data` and writes to `calibration/emoji/`:
`prompts.txt` (12,000 captions as training drew them; activation ranges use the first 32), `evaluation.txt`
(the canonical caption of every trained image, disjoint from the former) and `richness.txt` (40 concepts, five
lines each, ever richer). No line is about a held-out concept; the same index gives the same files.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from tools.emoji.captions import (
    LEVELS,
    SENTENCES,
    STYLES,
    Concept,
    Style,
    canonical_caption,
    caption,
    draw_caption,
)
from tools.emoji.data import DEFAULT_FOLDER, SEED, read_index

DEFAULT_OUT = Path("calibration/emoji")
BALANCED = 96
PROMPTS = 12_000
RICHNESS_CONCEPTS = 40
RICHNESS_LEVELS = 5
STYLE_BY_KEY = {style.key: style for style in STYLES}


def balanced_prompts(trained: Sequence[Concept], count: int, seed: int) -> list[str]:
    """Draw `count` distinct captions of as many concepts, the levels and styles in equal shares."""
    rng = random.Random(seed)
    chosen = rng.sample(trained, count)
    prompts = [
        caption(concept, STYLES[number // len(LEVELS) % len(STYLES)], LEVELS[number % len(LEVELS)], rng)
        for number, concept in enumerate(chosen)
    ]
    if len(set(prompts)) != count:
        raise ValueError(f"expected {count} distinct prompts, found {len(set(prompts))}; choose another seed")
    return prompts


def evaluation_prompts(
    images: Sequence[tuple[Concept, Style]], without: Sequence[str], seed: int
) -> list[str]:
    """Return the distinct canonical captions of `images`, shuffled, less those in `without`."""
    prompts = sorted({canonical_caption(concept, style) for concept, style in images} - set(without))
    random.Random(seed).shuffle(prompts)
    return prompts


def more_prompts(
    images: Sequence[tuple[Concept, Style]], without: Sequence[str], count: int, seed: int
) -> list[str]:
    """Draw `count` distinct captions as training does, none of them in `without`."""
    rng = random.Random(seed)
    taken, prompts = set(without), []
    while len(prompts) < count:
        text, _ = draw_caption(*rng.choice(images), rng)
        if text not in taken:
            taken.add(text)
            prompts.append(text)
    return prompts


def richness_prompts(trained: Sequence[Concept], count: int, seed: int) -> list[str]:
    """Return five captions for each of `count` concepts, every one richer than the line before.

    Name; name and a keyword; name and style; a sentence with the style; a sentence with two keywords and the
    style. The concepts are drawn in equal shares from all groups, the styles in turn; keywords that repeat a
    part of the name are left out.
    """
    rng = random.Random(seed)
    groups = sorted({concept.group for concept in trained})
    new = {c.hexcode: [word for word in c.keywords if word not in c.name] for c in trained}
    fit = [concept for concept in trained if len(new[concept.hexcode]) >= 2]
    drawn = {
        group: rng.sample([concept for concept in fit if concept.group == group], -(-count // len(groups)))
        for group in groups
    }
    lines = []
    for number in range(count):
        concept = drawn[groups[number % len(groups)]][number // len(groups)]
        style = STYLES[number // len(groups) % len(STYLES)]
        first, second = rng.sample(new[concept.hexcode], 2)
        name, phrase, extra = concept.name, style.phrase, f" with {first} and {second}"
        lines += [
            name,
            f"{name}, {first}",
            f"{name}, {phrase}",
            canonical_caption(concept, style),
            SENTENCES[-1].format(name=name, style=phrase, extra=extra),
        ]
    return lines


def write(lines: Sequence[str], path: Path) -> None:
    """Write one prompt a line, UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {len(lines)} prompts")


def main() -> None:
    """Read the command line and write the three files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    arguments = parser.parse_args()
    concepts, records = read_index(arguments.data)
    images = [(concepts[r.concept], STYLE_BY_KEY[r.style]) for r in records if not r.held_out]
    held_out = {concepts[r.concept].hexcode for r in records if r.held_out}
    trained = [concept for concept in concepts if concept.hexcode not in held_out]
    first = balanced_prompts(trained, BALANCED, SEED)
    evaluation = evaluation_prompts(images, first, SEED)
    more = more_prompts(images, [*first, *evaluation], PROMPTS - BALANCED, SEED)
    write([*first, *more], arguments.out / "prompts.txt")
    write(evaluation, arguments.out / "evaluation.txt")
    write(richness_prompts(trained, RICHNESS_CONCEPTS, SEED), arguments.out / "richness.txt")


if __name__ == "__main__":
    main()
