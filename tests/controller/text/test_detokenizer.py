from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsed.controller.detokenizer import Detokenizer, StopMatcher
from sparsed.controller.tokenizer import Tokenizer

KEEP_FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = st.sampled_from(["a", "b", "ab", "é", "東", "🙂", " ", "\ufffd", "c", "\n"])


def _pieces(tokenizer: Tokenizer, ids: Sequence[int], *, skip: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@KEEP_FIXTURE
@given(ids=st.lists(st.integers(0, 430)), skip=st.booleans())
def test_pieces_of_any_tokens_equal_the_whole(
    byte_level_directory: Path, ids: list[int], skip: bool
) -> None:
    tokenizer = Tokenizer.load(byte_level_directory)
    pieces = _pieces(tokenizer, ids, skip=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(ids=st.lists(st.sampled_from([*b"a \xe2\x82\xac\xf0\x9f\x99\x82\xff\xc3\xed", 256, 999])))
def test_pieces_of_broken_utf8_equal_the_whole(ids: list[int]) -> None:
    pieces = _pieces(BYTES, ids, skip=True)
    assert "".join(pieces) == BYTES.decode(ids, skip_special_tokens=True)


@KEEP_FIXTURE
@given(text=st.text(), skip=st.booleans())
def test_pieces_of_a_text_equal_the_whole(tokenizer_directory: Path, text: str, skip: bool) -> None:
    tokenizer = Tokenizer.load(tokenizer_directory)
    ids = tokenizer.encode(text, add_special_tokens=True)
    pieces = _pieces(tokenizer, ids, skip=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("ids", [[0xFF] * 3000, [0xC3] * 3000, list(b"word " * 600)])
def test_a_token_costs_the_same_however_many_came_before(
    ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    decode = Tokenizer.decode

    def counting(self: Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        decoded.append(len(ids))
        return decode(self, ids, skip_special_tokens=skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    _pieces(BYTES, ids, skip=True)
    assert max(decoded) <= 12
    assert len(decoded) <= 2 * len(ids) + 1


def _reference(text: str, stops: Sequence[str], *, include: bool) -> str:
    """The text up to the stop string that is complete first, character by character."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[:end] if include else text[: end - max(map(len, complete))]
    return text


@given(
    pieces=st.lists(st.lists(WORDS, max_size=4).map("".join)),
    stops=st.lists(st.lists(WORDS, min_size=1, max_size=3).map("".join), max_size=3),
    include=st.booleans(),
)
def test_stop_strings_are_found_across_pieces_and_never_leak(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    matcher, out, stopped = StopMatcher(stops, include_stop=include), "", False
    expected = _reference("".join(pieces), stops, include=include)
    for piece in pieces:
        match = matcher.push(piece)
        out += match.text
        assert expected.startswith(out)  # nothing that a later piece would have to take back
        if match.stop is not None:
            stopped = True
            break
    out += "" if stopped else matcher.flush()
    assert out == expected
    assert stopped == any(stop in "".join(pieces) for stop in stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["\n\nUser:"], include_stop=False)
    assert matcher.push("Hello\n").text == "Hello"
    assert matcher.push("world\n\nUs").text == "\nworld"
    assert matcher.push("e it").text == "\n\nUse it"
    assert matcher.flush() == ""


BYTES = Tokenizer.of_bytes(vocab_size=300)
