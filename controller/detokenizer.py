"""Tokens to text while they arrive: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsed.controller.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MAX_PENDING = 4  # an incomplete character has at most three bytes, a token at least one


class Detokenizer:
    """The pieces of text of a growing list of tokens; each token costs the same.

    The concatenated pieces, ``flush`` included, equal the decoded list. (One exception: the
    byte-fallback decoder replaces a whole run of byte tokens when any of it is broken, so that
    characters already given out of such a run stay.) A piece never ends inside a character.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # The last tokens: first those whose text is out, kept because spaces and characters
        # depend on what stands before them, then the pending ones.
        self._window: list[int] = []
        self._num_context = 0
        self._num_emitted = 0  # characters of the window's text that are out

    def push(self, token_id: int) -> str:
        """The text that is certain now; empty inside a character."""
        if self._tokenizer.is_silent(token_id, skip_special_tokens=self._skip_special_tokens):
            return ""
        self._window.append(token_id)
        text = self._decode()
        if not text.endswith(REPLACEMENT):
            return self._emit(text, keep_from=self._num_context, num_held=0)
        if len(self._window) - self._num_context <= MAX_PENDING:
            return ""
        return self._emit(text, keep_from=len(self._window) - MAX_PENDING, num_held=1)

    def flush(self) -> str:
        """The text held back, once no token follows."""
        piece = self._decode()[self._num_emitted :]
        self._window, self._num_context, self._num_emitted = [], 0, 0
        return piece

    def _emit(self, text: str, *, keep_from: int, num_held: int) -> str:
        """Give out ``text`` but its last ``num_held`` characters; shorten the window."""
        piece = text[self._num_emitted : len(text) - num_held]
        self._window = self._window[keep_from:]
        self._num_context = len(self._window) - num_held * MAX_PENDING
        self._num_emitted = len(self._decode()) - num_held
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip_special_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class StopMatch:
    """Text that may go out; ``stop`` is the string that ended it, None while it goes on."""

    text: str
    stop: str | None = None


class StopMatcher:
    """Finds the stop string that is complete first, whatever the pieces the text comes in.

    Text that may be the beginning of a stop string is held back. Of two that are complete at
    the same character the longer one wins.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool) -> None:
        assert all(stops), "an empty stop string matches everywhere"
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""

    def push(self, piece: str) -> StopMatch:
        """Take a piece; after a match no more may come."""
        text = self._held + piece
        match = self._first_match(text)
        if match is not None:
            start, stop = match
            self._held = ""
            end = start + len(stop) if self._include_stop else start
            return StopMatch(text=text[:end], stop=stop)
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return StopMatch(text=text[: len(text) - num_held])

    def flush(self) -> str:
        """The text held back, once no piece follows."""
        text, self._held = self._held, ""
        return text

    def _first_match(self, text: str) -> tuple[int, str] | None:
        found = [(text.find(stop), stop) for stop in self._stops]
        complete = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        if not complete:
            return None
        _, start, stop = min(complete)
        return start, stop

    def _num_held(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
