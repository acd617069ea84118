"""Needles: sentences with a number for a key, hidden in a long text, and the question for one.

Each sentence is a line of its own. Free of torch.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from tokenizers import Tokenizer

from sparsed.core import InputError
from sparsed.engine.evaluate.texts import opening_tokens

NUM_DISTRACTORS = 4

# fmt: off
_ADJECTIVES = (
    "amber", "brave", "clever", "copper", "crimson", "dusty", "eager", "frozen", "gentle",
    "golden", "hollow", "humble", "ivory", "jolly", "lonely", "mellow", "nimble", "orange",
    "proud", "purple", "quiet", "rusty", "silent", "silver", "sleepy", "velvet", "wooden", "young",
)
_NOUNS = (
    "anchor", "basket", "beacon", "bridge", "candle", "castle", "comet", "falcon", "garden",
    "glacier", "hammer", "harbour", "island", "ladder", "lantern", "meadow", "mirror", "orchard",
    "parrot", "pebble", "pepper", "piano", "rocket", "saddle", "spider", "teapot", "walnut", "whale",
)
# fmt: on
_DISTRACTOR_DEPTHS = tuple((2 * i + 1) / 40 for i in range(20))
_FAR = 0.03  # of the context: distractors keep this distance from the needle
_NEAR = 0.015  # of the length: how far a sentence moves to stand between two others


@dataclass(frozen=True, kw_only=True, slots=True)
class Needle:
    """Token ids. ``question`` continues ``context`` and ``answer`` continues it; together they
    have ``length`` tokens. ``depth``: where the sentence stands in the context, from 0 to 1."""

    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]
    length: int
    depth: float


def make_needles(
    tokenizer: Tokenizer,
    haystack: Sequence[int],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    per_cell: int,
    seed: int,
) -> list[Needle]:
    """``per_cell`` needles of each length (tokens) and depth (0 to 1), in that order.

    Each lies in a stretch of the ``haystack`` of its own, at the end of a line or sentence near
    its depth, among sentences with other keys and numbers. The same arguments give the same
    needles. Errors: InputError for a length that the haystack does not fill or that has no room
    for the sentences.
    """
    ends = _ends(tokenizer, haystack)
    return [
        _make_needle(
            tokenizer,
            haystack,
            ends,
            length=length,
            depth=depth,
            generator=random.Random(f"{seed} {length} {depth} {number}"),
        )
        for length in lengths
        for depth in depths
        for number in range(per_cell)
    ]


def _make_needle(
    tokenizer: Tokenizer,
    haystack: Sequence[int],
    ends: Sequence[int],
    *,
    length: int,
    depth: float,
    generator: random.Random,
) -> Needle:
    keys = generator.sample([f"{a} {n}" for a in _ADJECTIVES for n in _NOUNS], NUM_DISTRACTORS + 1)
    numbers = generator.sample(range(1_000_000, 10_000_000), len(keys))
    sentences = [
        _encode(tokenizer, f"{_statement(key)} {number}.\n")
        for key, number in zip(keys, numbers, strict=True)
    ]
    question, answer = _ask(tokenizer, keys[0], numbers[0])
    opening = opening_tokens(tokenizer)
    num_asked = len(question) + len(answer)
    num_hay = length - num_asked - len(opening) - sum(map(len, sentences))
    _check_room(length, num_hay=num_hay, num_held=len(haystack))
    first = generator.randint(0, len(haystack) - num_hay)
    apart = [share for share in _DISTRACTOR_DEPTHS if abs(share - depth) > _FAR]
    shares = [depth, *generator.sample(apart, NUM_DISTRACTORS)]
    context = opening
    taken, last = first, first + num_hay
    most = round(_NEAR * length)
    for share, sentence in sorted(zip(shares, sentences, strict=True)):
        ahead = round(share * (length - num_asked - len(sentence))) - len(context)
        wanted = min(taken + max(ahead, 0), last)
        low, high = max(wanted - most, taken), min(wanted + most, last)
        end = _nearest(ends, wanted, low=low, high=high)
        context = [*context, *haystack[taken:end], *sentence]
        taken = end
    return Needle(
        context=(*context, *haystack[taken:last]),
        question=tuple(question),
        answer=tuple(answer),
        length=length,
        depth=depth,
    )


def _check_room(length: int, *, num_hay: int, num_held: int) -> None:
    if num_hay < 0:
        raise InputError(
            f"needles of {length} tokens have no room for their sentences; take at least "
            f"{length - num_hay}",
            field="lengths",
        )
    if num_hay > num_held:
        raise InputError(
            f"needles of {length} tokens need {num_hay} tokens of text, which has {num_held}; "
            "take shorter ones or a longer text",
            field="lengths",
        )


def _statement(key: str) -> str:
    return f"\nThe secret number of the {key} is"


def _ask(tokenizer: Tokenizer, key: str, number: int) -> tuple[list[int], list[int]]:
    """Question and answer, cut where the tokens of the question alone end."""
    alone = _encode(tokenizer, _statement(key))
    both = _encode(tokenizer, f"{_statement(key)} {number}")
    pairs = zip(alone, both, strict=False)
    num_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return both[:num_common], both[num_common:]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _ends(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """Indexes of the tokens that follow the end of a line or of a sentence, ascending."""
    kinds = {token: tokenizer.decode([token], skip_special_tokens=False) for token in set(tokens)}
    stops = {token for token, text in kinds.items() if text.endswith((".", "!", "?"))}
    lines = {token for token, text in kinds.items() if text.rstrip(" ").endswith("\n")}
    spaced = {token for token, text in kinds.items() if text[:1].isspace()}
    return [
        i
        for i, (token, following) in enumerate(pairwise(tokens), start=1)
        if token in lines or (token in stops and following in spaced)
    ]


def _nearest(ends: Sequence[int], wanted: int, *, low: int, high: int) -> int:
    """The end nearest to ``wanted`` from ``low`` to ``high``, else ``wanted`` itself."""
    at = bisect_left(ends, wanted)
    near = [end for end in ends[max(at - 1, 0) : at + 1] if low <= end <= high]
    return min(near, key=lambda end: abs(end - wanted), default=wanted)
