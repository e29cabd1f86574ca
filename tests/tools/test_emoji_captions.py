"""Captions, splits and concepts on a few made-up records."""

import random

import pytest

pytest.importorskip("diffusers")

from tools.emoji.captions import (
    LEVELS,
    MAX_CHARACTERS,
    STYLES,
    Concept,
    canonical_caption,
    caption,
    clean,
    draw_caption,
    merge_keywords,
    split,
)
from tools.emoji.sources import concepts_of, plain_hexcode, svg_document

NOTO = STYLES[0]
TEAPOT = Concept("1fad6", "teapot", ("brew", "drink", "food", "hot", "kettle", "tea"), "food-drink")


def test_each_level_is_richer_than_the_one_before():
    assert caption(TEAPOT, NOTO, "name", random.Random(1)) == "teapot"
    name, *keywords = caption(TEAPOT, NOTO, "keywords", random.Random(1)).split(", ")
    assert name == "teapot" and keywords and set(keywords) <= set(TEAPOT.keywords)
    assert caption(TEAPOT, NOTO, "style", random.Random(1)).endswith(", noto style")
    sentence = caption(TEAPOT, NOTO, "sentence", random.Random(1))
    assert "teapot" in sentence and "noto style" in sentence and len(sentence.split()) > 5


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="expected a caption level"):
        caption(TEAPOT, NOTO, "poem", random.Random(0))


def test_keywords_are_drawn_at_random_and_not_from_the_front_of_the_alphabet():
    firsts = {caption(TEAPOT, NOTO, "keywords", random.Random(seed)).split(", ")[1] for seed in range(200)}
    assert firsts == set(TEAPOT.keywords)


def test_a_long_caption_loses_whole_keywords():
    words = tuple(f"{letter * 58}" for letter in "abcdef")
    wordy = Concept("1", "thing", words, "objects")
    for seed in range(50):
        parts = caption(wordy, NOTO, "keywords", random.Random(seed)).split(", ")
        assert len(", ".join(parts)) <= MAX_CHARACTERS
        assert parts[0] == "thing" and set(parts[1:]) <= set(words)


def test_the_same_seed_draws_the_same_captions():
    one, two = (
        [draw_caption(TEAPOT, style, random.Random(7)) for style in STYLES for _ in LEVELS] for _ in range(2)
    )
    assert one == two


def test_a_drawn_caption_says_whether_it_names_the_style():
    rng = random.Random(3)
    for _ in range(200):
        text, styled = draw_caption(TEAPOT, NOTO, rng)
        assert styled == (NOTO.phrase in text)


def test_the_captions_of_evaluation_differ_by_style_alone():
    assert len({canonical_caption(TEAPOT, style) for style in STYLES}) == len(STYLES)


def test_keywords_are_merged_without_the_name():
    assert clean("  “Free”  of\u00a0CHARGE ") == '"free" of charge'
    assert merge_keywords("Hot  Tea", ["tea", "Hot tea"], ["TEA", "drink"]) == ("drink", "tea")


def test_concepts_are_held_out_whole_whatever_their_order():
    concepts = [Concept(f"{number:x}", f"name {number}", (), "objects") for number in range(40)]
    trained, held_out = split(concepts, 10, seed=5)
    assert (
        len(held_out) == 10
        and not set(trained) & set(held_out)
        and set(trained) | set(held_out) == set(concepts)
    )
    again = split(list(reversed(concepts)), 10, seed=5)[1]
    assert set(again) == set(held_out)
    assert set(split(concepts, 10, seed=6)[1]) != set(held_out)


def test_a_split_must_leave_both_sides_something():
    with pytest.raises(ValueError, match="expected to hold out 1 to 0"):
        split([TEAPOT], 1, seed=0)


def test_flags_skin_tones_and_letters_are_left_out():
    records = [
        {"hexcode": "2615", "emoji": "\u2615", "label": "Hot Beverage", "tags": ["tea"], "group": 0},
        {"hexcode": "1F3FB", "emoji": "\U0001f3fb", "label": "light skin tone", "group": 1},
        {"hexcode": "1F1E6", "emoji": "\U0001f1e6", "label": "regional indicator A"},
    ]
    groups = {"0": "food-drink", "1": "component"}
    annotations = {"\u2615": {"default": ["coffee", "tea"], "tts": ["hot beverage"]}}
    assert concepts_of(records, groups, annotations) == [
        Concept("2615", "hot beverage", ("coffee", "tea"), "food-drink")
    ]


def test_hexcodes_meet_without_variation_selectors():
    assert plain_hexcode("2764-FE0F-200D-1F525") == "2764-200d-1f525"


def test_an_icon_is_drawn_in_the_middle_of_its_margin():
    icons = {
        "width": 32,
        "height": 32,
        "icons": {"cup": {"body": "<path/>"}},
        "aliases": {"mug": {"parent": "cup"}},
    }
    document = svg_document(icons, "mug", margin=0.25)
    assert document is not None and 'viewBox="-8 -8 48 48"' in document and "<path/>" in document
    assert svg_document(icons, "plate", margin=0.25) is None


def test_a_turned_alias_is_refused():
    icons = {"icons": {"cup": {"body": ""}}, "aliases": {"mug": {"parent": "cup", "hFlip": True}}}
    with pytest.raises(ValueError, match="expected an alias without turns"):
        svg_document(icons, "mug", margin=0.0)
