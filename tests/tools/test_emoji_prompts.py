"""The prompt files of the emoji model: drawn from made-up concepts, and as they are shipped."""

import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from tools.emoji import prompts
from tools.emoji.captions import MAX_CHARACTERS, STYLES, Concept

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "calibration/emoji"
CONCEPTS = [
    Concept(str(n), f"thing {n}", ("big", "odd", "thing"), "objects" if n % 2 else "symbols")
    for n in range(32)
]
IMAGES = [(concept, style) for concept in CONCEPTS for style in STYLES[:2]]


def lines(name):
    return (SHIPPED / name).read_text(encoding="utf-8").splitlines()


def test_balanced_prompts_are_distinct_and_of_every_level():
    drawn = prompts.balanced_prompts(CONCEPTS, 16, seed=1)
    assert drawn == prompts.balanced_prompts(CONCEPTS, 16, seed=1) and len(set(drawn)) == 16
    assert sum(any(style.phrase in prompt for style in STYLES) for prompt in drawn) == 8
    with pytest.raises(ValueError):
        prompts.balanced_prompts(CONCEPTS, 33, seed=0)


def test_prompts_of_calibration_and_evaluation_are_apart():
    evaluation = prompts.evaluation_prompts(IMAGES, ["an emoji of thing 3 in noto style"], seed=0)
    assert len(set(evaluation)) == len(evaluation) == 63
    more = prompts.more_prompts(IMAGES, evaluation, 300, seed=0)
    assert len(set(more)) == 300 and not set(more) & set(evaluation)
    assert more == prompts.more_prompts(IMAGES, evaluation, 300, seed=0)


def test_every_line_of_a_richness_block_adds_words():
    drawn = prompts.richness_prompts(CONCEPTS, 6, seed=0)
    for start in range(0, 30, 5):
        block = drawn[start : start + 5]
        words = [len(line.split()) for line in block]
        assert words == sorted(words) and words[0] < words[1] < words[3] < words[4]
        assert all(line.count(block[0]) == 1 for line in block)
        assert "thing" not in block[1].removeprefix(block[0])


def test_the_shipped_files_name_no_held_out_concept():
    held_out = json.loads((ROOT / "tools/emoji/held_out.json").read_text(encoding="utf-8"))["concepts"]
    assert len(held_out) == 60
    forbidden = {
        text
        for name in held_out.values()
        for text in (name, *(f"an emoji of {name} in {s.phrase}" for s in STYLES))
    }
    for name in ("prompts.txt", "evaluation.txt", "richness.txt"):
        found = lines(name)
        assert not {line.split(",")[0] for line in found} & forbidden
        assert not set(found) & forbidden
        assert max(map(len, found)) <= MAX_CHARACTERS
        assert all(any(style.phrase in line for line in found) for style in STYLES)


def test_the_shipped_files_are_distinct_and_apart():
    calibration, evaluation = lines("prompts.txt"), lines("evaluation.txt")
    assert len(set(calibration)) == len(calibration) == 12_000
    assert len(set(evaluation)) == len(evaluation) == 6_216
    assert not set(calibration) & set(evaluation)
    assert len(lines("richness.txt")) == 200
