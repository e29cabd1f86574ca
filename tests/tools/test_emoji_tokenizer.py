"""The byte-pair tokenizer: training, Stable Diffusion's padding, and the files that transformers reads."""

import json

import pytest

pytest.importorskip("tokenizers")

from tools.emoji import tokenizer as bpe

TEXTS = ["volcano eruption mountain", "rocket launch space", "red apple", "a noto style emoji of octopus"] * 3
VOCABULARY = 560


@pytest.fixture(scope="module")
def trained():
    return bpe.train(TEXTS, VOCABULARY)


def test_the_vocabulary_is_clips(trained):
    vocabulary = trained.get_vocab()
    assert trained.get_vocab_size() == VOCABULARY
    assert sorted(vocabulary.values()) == list(range(VOCABULARY))
    assert (vocabulary[bpe.START], vocabulary[bpe.END]) == (VOCABULARY - 2, VOCABULARY - 1)
    letters = bpe.byte_alphabet()
    assert len(letters) == 256
    assert all(vocabulary[letter + bpe.SUFFIX] == 256 + number for number, letter in enumerate(letters))


def test_any_text_is_encoded_without_unknown_pieces(trained):
    text = "Füßchen, 北京 & “quotes”!"
    ids = trained.encode(text).ids
    assert trained.token_to_id(bpe.END) not in ids[:-1]
    assert trained.decode(ids).replace(bpe.SUFFIX, "").replace(" ", "") == text.lower().replace(" ", "")


def test_rows_are_padded_with_the_end_token_and_cut_to_77(trained):
    short, empty, long = bpe.encode(trained, ["rocket", "", "octopus " * 200])
    end = VOCABULARY - 1
    assert [len(row) for row in (short, empty, long)] == [77, 77, 77]
    assert empty == [VOCABULARY - 2] + [end] * 76
    assert short[0] == VOCABULARY - 2 and short[-1] == end
    assert long[-1] == end and end not in long[:-1]


def test_case_and_spaces_do_not_matter(trained):
    assert trained.encode("  RED\t apple ").ids == trained.encode("red apple").ids


def test_too_few_words_for_the_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="lower the vocabulary"):
        bpe.train(["one"], VOCABULARY)


def test_transformers_reads_the_files_and_agrees(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    bpe.save(trained, tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 77
    loaded = transformers.CLIPTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    texts = ["a noto style emoji of octopus", "it's 42 Füßchen!", "", "octopus " * 200]
    theirs = loaded(texts, padding="max_length", truncation=True, max_length=77).input_ids
    assert theirs == list(bpe.encode(trained, texts))
    from_merges = tmp_path / "merges-only"
    from_merges.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        (from_merges / name).write_bytes((tmp_path / name).read_bytes())
    rebuilt = transformers.CLIPTokenizer.from_pretrained(str(from_merges), local_files_only=True)
    assert rebuilt(texts[:3]).input_ids == loaded(texts[:3]).input_ids
