"""The ledger of requests: what was asked, what was answered, and what a new engine must redo."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from sparsed.core import (
    AbortRequest,
    AddRequest,
    CapacityError,
    FinishReason,
    InputError,
    TokenBatch,
    TokenOutput,
)

MAX_DEATHS = 2  # engine deaths a running request survives, minus one


class Unavailable(Exception):
    """No new request now; the client may come back after ``retry_after_s``."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ObserveRequest(Protocol):
    """Told of every finished request; ``tpot_s`` is None below two tokens."""

    def __call__(self, *, ttft_s: float, tpot_s: float | None) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerLimits:
    """What is admitted. ``num_active`` is asked anew each time: the knob changes live."""

    max_tokens: int  # prompt plus output of one request
    max_waiting: int  # requests beyond the running ones
    num_active: Callable[[], int]  # requests the engine runs at once


@dataclass(kw_only=True, slots=True, eq=False)
class _Entry:
    """One unfinished request. ``submit`` fills the first two, ``on_batch`` the rest but deaths."""

    request: AddRequest
    submitted_s: float
    generated: list[int] = field(default_factory=list)
    first_token_s: float | None = None
    last_token_s: float | None = None
    deaths: int = 0  # engine deaths while it ran
    outputs: asyncio.Queue[TokenOutput | None] = field(default_factory=asyncio.Queue)


class RequestStream:
    """The outputs of one request, in order, ending with the one that has a finish reason.

    It holds at most ``max_tokens`` outputs, so a slow reader costs memory but never time.
    """

    def __init__(
        self, request_id: str, *, outputs: asyncio.Queue[TokenOutput | None], ledger: Ledger
    ) -> None:
        self.request_id = request_id
        self._outputs = outputs
        self._ledger = ledger
        self._ended = False

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> TokenOutput:
        if self._ended:
            raise StopAsyncIteration
        output = await self._outputs.get()
        self._ended = output is None or output.finish_reason is not None
        if output is None:
            raise StopAsyncIteration
        return output

    def cancel(self) -> None:
        """Stop the request; the iteration ends without a last output. Harmless when finished."""
        self._ledger.cancel(self.request_id)


class Ledger:
    """Every unfinished request, in order of arrival.

    Lives on the event loop. ``send`` passes a message to the engine and is called only between
    ``on_engine_ready`` and ``on_engine_lost``. The engine admits in order of arrival, so the
    requests that run are among the first ``num_active``; only those are blamed for a death.
    """

    def __init__(
        self,
        limits: LedgerLimits,
        *,
        send: Callable[[AddRequest | AbortRequest], None],
        observe: ObserveRequest,
        clock: Callable[[], float],
        draw_seed: Callable[[], int],
    ) -> None:
        self._limits = limits
        self._send = send
        self._observe = observe
        self._clock = clock
        self._draw_seed = draw_seed
        self._entries: dict[str, _Entry] = {}
        self._engine_up = False
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.num_failed = 0

    @property
    def num_unfinished(self) -> int:
        return len(self._entries)

    @property
    def draining(self) -> bool:
        return self._draining

    # ---- clients ---------------------------------------------------------------------------

    def submit(self, request: AddRequest) -> RequestStream:
        """Take a request; it is sent now, or when the engine is up.

        Errors: CapacityError if it can never fit, Unavailable while draining or with a full
        queue, InputError for a request id in use.
        """
        self._check(request)
        request = self._with_seed(request)
        entry = _Entry(request=request, submitted_s=self._clock())
        self._entries[request.request_id] = entry
        self._idle.clear()
        if self._engine_up:
            self._send(request)
        return RequestStream(request.request_id, outputs=entry.outputs, ledger=self)

    def cancel(self, request_id: str) -> None:
        """Forget a request and stop it in the engine; nothing happens if it is unknown."""
        entry = self._remove(request_id)
        if entry is None:
            return
        entry.outputs.put_nowait(None)
        if self._engine_up:
            self._send(AbortRequest(request_id=request_id))

    # ---- engine ----------------------------------------------------------------------------

    def on_batch(self, batch: TokenBatch) -> None:
        """Hand each output to its stream; repeats and outputs of forgotten requests are dropped."""
        for output in batch.outputs:
            entry = self._entries.get(output.request_id)
            if entry is not None:
                self._on_output(entry, output)

    def on_engine_ready(self) -> None:
        """Send every unfinished request, with the tokens it has, in order of arrival."""
        self._engine_up = True
        for entry in self._entries.values():
            self._send(replace(entry.request, generated_tokens=tuple(entry.generated)))

    def on_engine_lost(self) -> None:
        """Blame the running requests; end those whose replay killed the engine as well."""
        if not self._engine_up:  # it died while loading: nothing was running
            return
        self._engine_up = False
        for entry in list(self._entries.values())[: self._limits.num_active()]:
            entry.deaths += 1
            if entry.deaths >= MAX_DEATHS:
                self._fail(
                    entry, f"the engine died {entry.deaths} times while running this request"
                )

    # ---- shutdown --------------------------------------------------------------------------

    async def drain(self, *, timeout_s: float | None) -> int:
        """Refuse new requests and wait for the others; cut off what is left after ``timeout_s``.

        Returns how many were cut off. Cancelling the wait cuts nothing off.
        """
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return self.fail_all("the daemon is shutting down")
        return 0

    def fail_all(self, error: str) -> int:
        """End every request with ``error``; returns how many there were."""
        entries = list(self._entries.values())
        for entry in entries:
            if self._engine_up:
                self._send(AbortRequest(request_id=entry.request.request_id))
            self._fail(entry, error)
        return len(entries)

    # ---- inside ----------------------------------------------------------------------------

    def _check(self, request: AddRequest) -> None:
        if self._draining:
            raise Unavailable("the daemon is shutting down", retry_after_s=30.0)
        num_prompt, limit = len(request.prompt_tokens), self._limits.max_tokens
        if num_prompt + request.sampling.max_tokens > limit:
            raise CapacityError(
                f"the prompt has {num_prompt} tokens and max_tokens is "
                f"{request.sampling.max_tokens}; together at most {limit} fit",
                field="prompt" if num_prompt >= limit else "max_tokens",
            )
        if len(self._entries) >= self._limits.num_active() + self._limits.max_waiting:
            raise Unavailable(
                f"{len(self._entries)} requests are running or waiting", retry_after_s=5.0
            )
        if request.request_id in self._entries:
            raise InputError(f"request id {request.request_id!r} is in use", field="request_id")

    def _with_seed(self, request: AddRequest) -> AddRequest:
        """Fix the seed here: a replay must draw the same tokens."""
        if request.sampling.seed is not None:
            return request
        return replace(request, sampling=replace(request.sampling, seed=self._draw_seed()))

    def _on_output(self, entry: _Entry, output: TokenOutput) -> None:
        if output.token_id is not None:
            if output.index < len(entry.generated):  # sent before a death, and again after it
                return
            assert output.index == len(entry.generated), f"token lost: {output}"
            self._note_token(entry, output.token_id)
        entry.outputs.put_nowait(output)
        if output.finish_reason is not None:
            self._finish(entry, output.finish_reason)

    def _note_token(self, entry: _Entry, token_id: int) -> None:
        entry.generated.append(token_id)
        entry.last_token_s = self._clock()
        if entry.first_token_s is None:
            entry.first_token_s = entry.last_token_s

    def _finish(self, entry: _Entry, reason: FinishReason) -> None:
        self._remove(entry.request.request_id)
        if reason is FinishReason.ERROR:
            self.num_failed += 1
        elif entry.first_token_s is not None and entry.last_token_s is not None:
            gaps = len(entry.generated) - 1
            self._observe(
                ttft_s=entry.first_token_s - entry.submitted_s,
                tpot_s=(entry.last_token_s - entry.first_token_s) / gaps if gaps else None,
            )

    def _fail(self, entry: _Entry, error: str) -> None:
        self._on_output(
            entry,
            TokenOutput(
                request_id=entry.request.request_id,
                index=len(entry.generated),
                token_id=None,
                finish_reason=FinishReason.ERROR,
                error=error,
            ),
        )

    def _remove(self, request_id: str) -> _Entry | None:
        entry = self._entries.pop(request_id, None)
        if not self._entries:
            self._idle.set()
        return entry
