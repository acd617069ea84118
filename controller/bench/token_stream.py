"""From the bytes of a streamed answer to the times of its tokens."""

from __future__ import annotations

from typing import Final

import msgspec

from sparsed.controller.bench.records import Usage

_DATA: Final = b"data:"
_DONE: Final = b"[DONE]"


class StreamFailed(Exception):
    """The server ended the stream with an error; the message is the server's."""


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def text(self) -> str | None:
        return self.content or self.reasoning_content or self.reasoning or self.content


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None

    def plain(self) -> Usage:
        details = self.prompt_tokens_details
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
        )


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: object = None


_decode_chunk: Final = msgspec.json.Decoder(_Chunk).decode


class TokenStream:
    """Takes the body of one answer piece by piece, in either endpoint's form.

    A chunk is a token, or several, if it carries text; also if its text is empty and nothing else
    is in it, for some tokens show no character until the next. A chunk that only tells the role is
    none; one that only ends the answer moves ``last_s`` and is no inter-token latency.
    """

    def __init__(self) -> None:
        self.chunks_s: list[float] = []
        self.first_s: float | None = None
        self.last_s: float | None = None
        self.usage: Usage | None = None
        self.is_complete = False  # the end mark or a finish reason was seen
        self._rest = b""

    def feed(self, block: bytes, *, at_s: float) -> None:
        """Bytes that arrived at ``at_s``. StreamFailed, or msgspec.DecodeError."""
        *lines, self._rest = (self._rest + block).split(b"\n")
        for line in lines:
            if line.startswith(_DATA):
                self._take(line[len(_DATA) :].strip(), at_s=at_s)

    def _take(self, content: bytes, *, at_s: float) -> None:
        if content == _DONE:
            self.is_complete = True
            return
        chunk = _decode_chunk(content)
        if chunk.error is not None:
            raise StreamFailed(error_message(content))
        if chunk.usage is not None:
            self.usage = chunk.usage.plain()
        for choice in chunk.choices or ():
            self._take_choice(choice, at_s=at_s)

    def _take_choice(self, choice: _Choice, *, at_s: float) -> None:
        text = choice.delta.text() if choice.delta is not None else choice.text
        is_end = choice.finish_reason is not None
        is_role = choice.delta is not None and choice.delta.role is not None
        is_token = bool(text) or (text is not None and not is_end and not is_role)
        if is_token:
            self.chunks_s.append(at_s)
        if is_token or is_end:
            self.first_s = at_s if self.first_s is None else self.first_s
            self.last_s = at_s
        self.is_complete |= is_end


def error_message(content: bytes, *, max_chars: int = 300) -> str:
    """The message of an OpenAI error object, else the beginning of the body."""
    try:
        value = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        value = None
    found = value.get("error") or value.get("detail") if isinstance(value, dict) else None
    if isinstance(found, dict):
        found = found.get("message")
    text = found if isinstance(found, str) else content.decode(errors="replace")
    return text.strip()[:max_chars]
