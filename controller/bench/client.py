"""Sends the requests of a plan when they are due, and records what comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import msgspec

from sparsed.controller.bench import records
from sparsed.controller.bench.connection import (
    BadAnswer,
    ConnectFailed,
    Server,
    exchange,
    in_words,
)
from sparsed.controller.bench.lag import watch_lag
from sparsed.controller.bench.records import RequestRecord
from sparsed.controller.bench.token_stream import StreamFailed, TokenStream, error_message


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRequest:
    """A request that is ready to be sent: making it takes no time of the run."""

    record: RequestRecord
    body: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """``path`` of the endpoint; ``max_concurrency`` None: a request is never held back."""

    server: Server
    path: str
    timeout_s: float
    max_concurrency: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadResult:
    """``records`` in the order of the plan; ``lags_s``: see ``watch_lag``."""

    records: tuple[RequestRecord, ...]
    lags_s: tuple[float, ...]
    is_interrupted: bool


async def run_load(
    requests: Sequence[PreparedRequest],
    *,
    options: LoadOptions,
    on_done: Callable[[RequestRecord], None] = lambda record: None,
) -> LoadResult:
    """Send everything and wait for the answers. Cancelling it is no failure: what was measured
    by then is returned, and the rest is marked as interrupted."""
    done = [replace(item.record, error=records.INTERRUPTED) for item in requests]
    start_s = time.perf_counter()
    gate = asyncio.Semaphore(options.max_concurrency) if options.max_concurrency else nullcontext()

    async def serve(index: int) -> None:
        async with gate:
            done[index] = await _Attempt(requests[index], start_s=start_s).run(options)
        on_done(done[index])

    is_interrupted = False
    tasks: list[asyncio.Task[None]] = []
    async with watch_lag() as lags_s:
        try:
            for index, item in enumerate(requests):
                due_s = start_s + item.record.arrival_s - time.perf_counter()
                await asyncio.sleep(max(0.0, due_s))
                tasks.append(asyncio.create_task(serve(index)))
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            is_interrupted = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return LoadResult(records=tuple(done), lags_s=tuple(lags_s), is_interrupted=is_interrupted)


class _Attempt:
    """One request on its way; ``run`` always returns its record, whatever the server does."""

    def __init__(self, request: PreparedRequest, *, start_s: float) -> None:
        self._request = request
        self._start_s = start_s
        self._stream = TokenStream()

    async def run(self, options: LoadOptions) -> RequestRecord:
        sent_s = self._now_s()
        error, detail = None, ""
        try:
            async with asyncio.timeout(options.timeout_s):
                error, detail = await self._send(options)
        except asyncio.CancelledError:
            error = records.INTERRUPTED
        except Exception as failure:  # noqa: BLE001  # each has its kind, or is raised again
            error, detail = _kind_of(failure), in_words(failure)
        return self._record(sent_s=sent_s, error=error, detail=detail)

    async def _send(self, options: LoadOptions) -> tuple[str | None, str]:
        """Kind and words of what was wrong with the answer; None if nothing was."""
        stream = self._stream
        async with exchange(
            options.server, method="POST", path=options.path, body=self._request.body
        ) as response:
            if response.status != 200:
                return f"http_{response.status}", error_message(await response.body())
            async for block in response.blocks():
                stream.feed(block, at_s=self._now_s())
        if stream.first_s is None:
            return records.BAD_ANSWER, "the answer has no token"
        if not stream.is_complete:
            return records.DISCONNECTED, "the stream ended without a finish reason"
        return None, ""

    def _record(self, *, sent_s: float, error: str | None, detail: str) -> RequestRecord:
        return replace(
            self._request.record,
            sent_s=sent_s,
            first_s=self._stream.first_s,
            last_s=self._stream.last_s,
            ended_s=self._now_s(),
            chunks_s=tuple(self._stream.chunks_s),
            usage=self._stream.usage,
            error=error,
            detail=detail,
        )

    def _now_s(self) -> float:
        return time.perf_counter() - self._start_s


def _kind_of(failure: Exception) -> str:
    kinds: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
        (TimeoutError, records.TIMEOUT),
        (ConnectFailed, records.CONNECT),
        (StreamFailed, records.STREAM_ERROR),
        ((BadAnswer, msgspec.MsgspecError), records.BAD_ANSWER),
        ((OSError, EOFError), records.DISCONNECTED),
    )
    for types, kind in kinds:
        if isinstance(failure, types):
            return kind
    raise failure
