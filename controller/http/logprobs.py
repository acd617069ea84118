"""Log-probabilities in the two forms of the OpenAI API."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sparsed.controller.http.generation import Delta
from sparsed.controller.tokenizer import Tokenizer
from sparsed.core import TokenLogprob


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredToken:
    """A token with its own log-probability and the best ones at its place. ``logprob`` None: the
    first token of a prompt, which nothing predicts."""

    token_id: int
    logprob: float | None
    top: tuple[TokenLogprob, ...] | None


def scored_tokens(delta: Delta) -> Iterator[ScoredToken]:
    """The tokens of a delta that carry log-probabilities: the echoed prompt, then the output."""
    if delta.prompt_tokens is not None and delta.outputs:
        yield from _scored_prompt(delta.prompt_tokens, delta.outputs[0].prompt_logprobs)
    for output in delta.outputs:
        if output.token_id is not None and output.logprob is not None:
            yield ScoredToken(
                token_id=output.token_id, logprob=output.logprob.logprob, top=output.top_logprobs
            )


def _scored_prompt(
    tokens: Sequence[int], scores: Sequence[tuple[TokenLogprob, ...] | None] | None
) -> Iterator[ScoredToken]:
    if scores is None:
        return
    for token_id, entries in zip(tokens, scores, strict=True):
        own = next((item.logprob for item in entries or () if item.token_id == token_id), None)
        yield ScoredToken(token_id=token_id, logprob=own, top=entries)


def token_text(token_id: int, *, tokenizer: Tokenizer) -> str:
    """A token as text; one that is no whole character is spelled out, so that texts differ."""
    content = tokenizer.token_bytes(token_id)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class CompletionLogprobs:
    """The parallel lists of ``/v1/completions``, for one choice.

    ``num_top`` best tokens are listed at each place, and the token itself if it is not one.
    Offsets are in characters of the choice's text and run on over its deltas; a token in the
    middle of a character has the offset of the character.
    """

    def __init__(self, *, num_top: int, tokenizer: Tokenizer) -> None:
        self._num_top = num_top
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_chars = 0

    def take(self, delta: Delta) -> dict[str, object]:
        scored = list(scored_tokens(delta))
        texts = [token_text(item.token_id, tokenizer=self._tokenizer) for item in scored]
        return {
            "tokens": texts,
            "token_logprobs": [item.logprob for item in scored],
            "top_logprobs": [self._top(item) for item in scored],
            "text_offset": [self._advance(item.token_id) for item in scored],
        }

    def _top(self, scored: ScoredToken) -> dict[str, float] | None:
        if scored.top is None or scored.logprob is None:
            return None
        best = {item.token_id: item.logprob for item in scored.top if item.rank <= self._num_top}
        best.setdefault(scored.token_id, scored.logprob)
        return {
            token_text(token_id, tokenizer=self._tokenizer): logprob
            for token_id, logprob in best.items()
        }

    def _advance(self, token_id: int) -> int:
        offset = self._num_chars
        self._num_chars += len(self._characters.decode(self._tokenizer.token_bytes(token_id)))
        return offset


def chat_logprobs(delta: Delta, *, num_top: int, tokenizer: Tokenizer) -> dict[str, object]:
    """The ``logprobs`` object of ``/v1/chat/completions``."""

    def entry(token_id: int, logprob: float | None) -> dict[str, object]:
        content = tokenizer.token_bytes(token_id)
        text = token_text(token_id, tokenizer=tokenizer)
        return {"token": text, "logprob": logprob, "bytes": list(content)}

    return {
        "content": [
            entry(item.token_id, item.logprob)
            | {
                "top_logprobs": [
                    entry(top.token_id, top.logprob)
                    for top in item.top or ()
                    if top.rank <= num_top
                ]
            }
            for item in scored_tokens(delta)
        ]
    }
