"""Answers that end when their reader goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from sparsed.controller.http.errors import describe

Result = TypeVar("Result")

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it keeps the log honest


async def server_sent_events(chunks: AsyncGenerator[dict[str, object]]) -> AsyncIterator[bytes]:
    """Each chunk as an event, a failure as an event with the error object, then the end mark."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield _event(chunk)
    except Exception as error:  # noqa: BLE001 - the status is out, only the stream can tell
        yield _event(describe(error))
    yield b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Server-sent events. ``on_end`` is called once, whether the stream was read or left."""

    def __init__(
        self, chunks: AsyncGenerator[dict[str, object]], *, on_end: Callable[[], None]
    ) -> None:
        super().__init__(
            server_sent_events(chunks),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless(_disconnected(receive), self._send(send))
        finally:
            self._on_end()

    async def _send(self, send: Send) -> None:
        try:
            await self.stream_response(send)
        except OSError:  # how a server says that the connection is gone
            return


async def until_disconnect(work: Coroutine[Any, Any, Response], *, request: Request) -> Response:
    """The response of ``work``, which is cancelled as soon as the client goes away."""
    response = await _unless(_disconnected(request.receive), work)
    return response or Response(status_code=CLIENT_CLOSED_REQUEST)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _unless(
    event: Coroutine[Any, Any, None], work: Coroutine[Any, Any, Result]
) -> Result | None:
    """The result of ``work``; None, with ``work`` cancelled, if ``event`` comes first."""
    tasks = (asyncio.create_task(event), asyncio.create_task(work))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[1].result() if tasks[1].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _event(content: object) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
