"""Needles: where they lie, that nothing else answers for them, and that lengths are exact."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from sparsed.core import InputError
from sparsed.engine.evaluate.needles import NUM_DISTRACTORS, Needle, make_needles
from sparsed.engine.evaluate.texts import read_tokens

LENGTHS = (1024, 4096)
DEPTHS = (0.0, 0.1, 0.5, 0.73, 1.0)
TOLERANCE = 0.02
SENTENCE = re.compile(r"\nThe secret number of the ([a-z]+ [a-z]+) is (\d{7})\.\n")


@pytest.fixture
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


def haystack(tokenizer: Tokenizer, tmp_path: Path) -> list[int]:
    return read_tokens("documentation", tokenizer=tokenizer, cache_dir=tmp_path)


def make(tokenizer: Tokenizer, tokens: list[int], *, seed: int = 0) -> list[Needle]:
    return make_needles(tokenizer, tokens, lengths=LENGTHS, depths=DEPTHS, per_cell=2, seed=seed)


def test_a_needle_is_found_once_at_its_depth(tokenizer: Tokenizer, tmp_path: Path) -> None:
    needles = make(tokenizer, haystack(tokenizer, tmp_path))
    cells = [(length, depth) for length in LENGTHS for depth in DEPTHS for _ in range(2)]
    assert [(needle.length, needle.depth) for needle in needles] == cells
    for needle in needles:
        assert len(needle.context) + len(needle.question) + len(needle.answer) == needle.length
        context = tokenizer.decode(needle.context)
        found = SENTENCE.findall(context)
        assert len({key for key, _ in found}) == len(found) == NUM_DISTRACTORS + 1
        question = tokenizer.decode(needle.question)
        ((key, number),) = [pair for pair in found if f" {pair[0]} " in question]
        assert question == f"\nThe secret number of the {key} is"
        assert tokenizer.decode(needle.answer) == f" {number}"
        assert context.count(key) == context.count(number) == 1
        begin = context.index(f"\nThe secret number of the {key}")
        sentence = f"{question} {number}.\n"
        before = len(tokenizer.encode(context[:begin]).ids)
        room = len(needle.context) - len(tokenizer.encode(sentence).ids)
        assert abs(before / room - needle.depth) < TOLERANCE


def test_sentences_stand_between_sentences(tokenizer: Tokenizer, tmp_path: Path) -> None:
    needles = make(tokenizer, haystack(tokenizer, tmp_path))
    for needle in needles[len(needles) // 2 :]:  # of the greater length: no line is too long
        context = tokenizer.decode(needle.context)
        for match in SENTENCE.finditer(context):
            before = context[: match.start()].rstrip(" ")
            assert not before or before.endswith((".", "!", "?", "\n"))


def test_needles_follow_their_seed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = haystack(tokenizer, tmp_path)
    needles = make(tokenizer, tokens)
    assert needles == make(tokenizer, tokens)
    assert len(set(needles) | set(make(tokenizer, tokens, seed=1))) == 2 * len(needles)
    longer = make_needles(
        tokenizer, tokens, lengths=LENGTHS[1:], depths=DEPTHS[2:], per_cell=1, seed=0
    )
    assert set(longer) < set(needles)  # a cell does not depend on the others


def test_a_text_without_lines_takes_needles_too(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(" word" * 5000).ids
    for needle in make(tokenizer, tokens):
        context = tokenizer.decode(needle.context)
        assert len(SENTENCE.findall(context)) == NUM_DISTRACTORS + 1
        number = tokenizer.decode(needle.answer).strip()
        share = context.index(number) / len(context)
        assert abs(share - needle.depth) < 0.04  # of characters


def test_digits_may_be_grouped_and_texts_may_open_with_a_token() -> None:
    alphabet = {
        char: token for token, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    digits = [str(digit) for digit in range(10)]
    pairs = [(a, b) for a in digits for b in digits]
    vocabulary = alphabet | {a + b: 256 + i for i, (a, b) in enumerate(pairs)} | {"<s>": 356}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 356)])
    tokens = tokenizer.encode("Some words, then others.\n" * 200, add_special_tokens=False).ids
    for needle in make(tokenizer, tokens):
        assert needle.context[0] == 356
        assert 356 not in needle.context[1:] + needle.question
        assert len(needle.context) + len(needle.question) + len(needle.answer) == needle.length
        assert len(needle.answer) < len(tokenizer.decode(needle.answer)) == 8


def test_lengths_without_room_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = haystack(tokenizer, tmp_path)

    def make_one(length: int) -> list[Needle]:
        return make_needles(tokenizer, tokens, lengths=[length], depths=[0.5], per_cell=1, seed=0)

    with pytest.raises(InputError, match=r"no room for their sentences; take at least (\d+)"):
        make_one(50)
    with pytest.raises(InputError, match=f"text, which has {len(tokens)}; take shorter ones"):
        make_one(len(tokens) + 1000)
