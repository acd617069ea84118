"""From the deltas of an answer to the response, streamed or whole."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from fastapi import Request, Response

from sparsed.controller.http.generation import Answer, Delta, collect
from sparsed.controller.http.protocol import GenerationBody
from sparsed.controller.http.streaming import EventStream, until_disconnect
from sparsed.controller.http.usage import Tally


class ChoiceFormat(Protocol):
    """How one endpoint writes choices; made anew for each answer."""

    whole_object: str  # value of "object" in a whole answer
    chunk_object: str  # and in a chunk of a stream

    def whole(self, delta: Delta) -> dict[str, object]:
        """A choice of a whole answer."""
        ...

    def chunk(self, delta: Delta) -> dict[str, object] | None:
        """A choice of a chunk; None if the delta has nothing to tell yet."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """An answer on its way out; ``created`` in seconds since the epoch."""

    reply_id: str
    model: str
    answer: Answer
    choices: ChoiceFormat
    tally: Tally
    created: int = field(default_factory=lambda: int(time.time()))

    async def respond(self, body: GenerationBody, *, request: Request) -> Response:
        """The response the body asks for; the choices are cancelled when it ends or is left."""
        if body.stream:
            return EventStream(self._chunks(body), on_end=self.answer.cancel)
        try:
            return await until_disconnect(self._whole(), request=request)
        finally:
            self.answer.cancel()

    async def _whole(self) -> Response:
        async with aclosing(self.answer.deltas()) as deltas:
            whole = await collect(deltas, observe=self.tally.observe)
        choices = [self.choices.whole(delta) for delta in whole.values()]
        content = self._head(self.choices.whole_object) | {
            "choices": choices,
            "usage": self.tally.usage(),
        }
        return Response(msgspec.json.encode(content), media_type="application/json")

    async def _chunks(self, body: GenerationBody) -> AsyncGenerator[dict[str, object]]:
        head = self._head(self.choices.chunk_object)
        async with aclosing(self.answer.deltas()) as deltas:
            async for delta in deltas:
                self.tally.observe(delta)
                choice = self.choices.chunk(delta)
                if choice is None:
                    continue
                usage = {"usage": self.tally.usage()} if body.wants_usage_always else {}
                yield head | {"choices": [choice]} | usage
        if body.wants_usage:
            yield head | {"choices": [], "usage": self.tally.usage()}

    def _head(self, kind: str) -> dict[str, object]:
        return {
            "id": self.reply_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }
