"""The byte-pair tokenizer of the emoji model, in CLIP's own format.

CLIP cleans a text to lower case and single spaces, splits it into words, and writes each word as byte-level
pieces whose last one carries the suffix `</w>` (https://arxiv.org/abs/2103.00020, section 2.4).
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

START = "<|startoftext|>"
END = "<|endoftext|>"
SUFFIX = "</w>"
MAX_TOKENS = 77
WORDS = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


def byte_alphabet() -> list[str]:
    """Return the 256 printable characters that stand for the bytes, in the order CLIP numbers them."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def train(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a tokenizer of exactly `vocabulary` entries; the last two are the start and end tokens.

    Raises:
        ValueError: `texts` do not hold enough distinct words for that many merges.
    """
    letters = byte_alphabet()
    learner = dressed(BPE(continuing_subword_prefix="", end_of_word_suffix=SUFFIX, fuse_unk=False), ends=None)
    # The trainer adds the suffixed letters by itself, but only those it meets; the bytes are completed below.
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        end_of_word_suffix=SUFFIX,
        initial_alphabet=letters,
        show_progress=False,
        min_frequency=1,
    )
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    entries = [*letters, *(letter + SUFFIX for letter in letters)]
    wanted = vocabulary - len(entries) - 2
    if len(merges) < wanted:
        raise ValueError(
            f"expected words enough for {wanted} merges, found {len(merges)}; lower the vocabulary"
        )
    merges = merges[:wanted]
    entries += ["".join(pair) for pair in merges]
    entries += [START, END]
    vocab = {entry: number for number, entry in enumerate(entries)}
    if len(vocab) != vocabulary:
        raise ValueError(f"expected {vocabulary} distinct entries, found {len(vocab)}")
    return assemble(vocab, merges)


def assemble(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Put a CLIP tokenizer together from its vocabulary and its merges, in order of precedence."""
    model = BPE(
        vocab=vocab,
        merges=merges,
        unk_token=END,
        continuing_subword_prefix="",
        end_of_word_suffix=SUFFIX,
        fuse_unk=False,
    )
    tokenizer = dressed(model, ends=(vocab[START], vocab[END]))
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def dressed(model: BPE, ends: tuple[int, int] | None) -> Tokenizer:
    """Wrap `model` in CLIP's cleaning, word splitting and decoding; `ends` are the ids that frame a text."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if ends is not None:
        tokenizer.post_processor = processors.RobertaProcessing(
            (END, ends[1]), (START, ends[0]), False, False
        )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    """Encode `texts` as Stable Diffusion does: 77 ids each, truncated, padded with the end token."""
    end = tokenizer.get_vocab()[END]
    for encoding in tokenizer.encode_batch(list(texts)):
        ids = encoding.ids[:MAX_TOKENS]
        if len(encoding.ids) > MAX_TOKENS:
            ids[-1] = end
        yield ids + [end] * (MAX_TOKENS - len(ids))


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the files that transformers' CLIPTokenizer reads into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads(tokenizer.to_str())["model"]
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "vocab.json", model["vocab"])
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": MAX_TOKENS,
            "tokenizer_class": "CLIPTokenizer",
        },
    )


def write_json(path: Path, content: object) -> None:
    """Write `content` as JSON of one line a key, in UTF-8, ending in a newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
