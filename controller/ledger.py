"""The ledger of requests: what was asked, what was answered, and what a new engine must redo."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from sparsed.controller.recorder import Recorder
from sparsed.controller.request_stream import RequestStream
from sparsed.controller.service_rate import ServiceRate
from sparsed.controller.suspicion import Record, may_run
from sparsed.core import (
    AbortRequest,
    AddRequest,
    CapacityError,
    FinishReason,
    InputError,
    RefusalReason,
    TokenBatch,
    TokenOutput,
)

SHUTTING_DOWN = "the daemon is shutting down"


class Unavailable(Exception):
    """No new request now; the client may come back after ``retry_after_s``."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ObserveArrival(Protocol):
    """Told of every request that is taken."""

    def __call__(self, *, input_tokens: int) -> None: ...


class ObserveRequest(Protocol):
    """Told of every finished request; ``tpot_s`` is None below two tokens."""

    def __call__(self, *, ttft_s: float, tpot_s: float | None, output_tokens: int) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerLimits:
    """What is admitted. ``num_active`` is asked anew each time: the knob changes live."""

    max_tokens: int  # prompt plus output of one request
    max_waiting: int  # requests beyond the running ones
    num_active: Callable[[], int]  # requests the engine runs at once


@dataclass(kw_only=True, slots=True, eq=False)
class _Entry:
    """One unfinished request. ``submit`` fills the first two, ``on_batch`` most of the rest."""

    request: AddRequest
    submitted_s: float
    generated: list[int] = field(default_factory=list)
    first_token_s: float | None = None
    last_token_s: float | None = None
    record: Record = field(default_factory=Record)  # also filled by ``on_engine_lost``
    has_run: bool = False  # a token of it came from the engine of now
    stopping: bool = False  # its reader has seen enough: only the last output is wanted
    outputs: asyncio.Queue[TokenOutput | None] = field(default_factory=asyncio.Queue)


class Ledger:
    """Every unfinished request, in order of arrival.

    Lives on the event loop. ``send`` passes a message to the engine and is called only between
    ``on_engine_ready`` and ``on_engine_lost``. The engine admits in the order of sending, but for
    requests that pass others: those that run are among the first ``num_active`` sent, or have shown
    it by a token. Only they are blamed for a death.
    """

    def __init__(
        self,
        limits: LedgerLimits,
        *,
        send: Callable[[AddRequest | AbortRequest], None],
        arrive: ObserveArrival,
        observe: ObserveRequest,
        refuse: Callable[[RefusalReason], None],
        clock: Callable[[], float],
        draw_seed: Callable[[], int],
    ) -> None:
        self._limits = limits
        self._send = send
        self._arrive = arrive
        self._observe = observe
        self._refuse = refuse
        self._clock = clock
        self._draw_seed = draw_seed
        self._rate = ServiceRate(clock)
        self.recorder = Recorder(clock=clock)
        self._entries: dict[str, _Entry] = {}
        self._sent: dict[str, _Entry] = {}  # those in the engine, in order of sending
        self._engine_up = False
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.num_failed = 0

    @property
    def num_unfinished(self) -> int:
        return len(self._entries)

    @property
    def max_unfinished(self) -> int:
        """The most requests that are taken, of all clients together; it changes with a knob."""
        return self._limits.num_active() + self._limits.max_waiting

    @property
    def draining(self) -> bool:
        return self._draining

    # ---- clients ---------------------------------------------------------------------------

    def refuse(self, reason: RefusalReason) -> None:
        """Count a request that is refused before it is submitted."""
        self._refuse(reason)

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
        try:
            self._send_those_that_may_run()
        except Exception:
            self._remove(request.request_id)
            raise
        self._arrive(input_tokens=len(request.prompt_tokens))
        self.recorder.note_arrival(request)
        return RequestStream(
            entry.outputs,
            cancel=partial(self._cancel, entry),
            stop=partial(self._stop, entry),
        )

    # ---- engine ----------------------------------------------------------------------------

    def on_batch(self, batch: TokenBatch) -> None:
        """Hand each output to its stream; repeats and outputs of forgotten requests are dropped."""
        for output in batch.outputs:
            entry = self._entries.get(output.request_id)
            if entry is not None:
                self._on_output(entry, output)
        self._send_those_that_may_run()

    def on_engine_ready(self) -> None:
        """Send the unfinished requests, with the tokens they have, in order of arrival."""
        self._engine_up = True
        self._send_those_that_may_run()

    def on_engine_lost(self) -> int:
        """Blame the requests that ran; end the one that alone can have killed the engine.

        Returns the deaths that it explains, this one included; 0 if none ended.
        """
        self._engine_up = False
        sent = list(self._sent.values())  # nothing while it loaded
        self._sent.clear()
        first = self._limits.num_active()
        running = [*sent[:first], *(entry for entry in sent[first:] if entry.has_run)]
        explained = 0
        for entry in running:
            if entry.record.note_death(alone=len(running) == 1):
                explained = entry.record.deaths
                error = f"the engine died {explained} times while running this request"
                self._close(entry, error, reason=FinishReason.ERROR)
        for entry in sent:
            entry.has_run = False
            if entry.stopping:
                self._end(entry)
        return explained

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
            return self.cut_off_all(SHUTTING_DOWN)
        return 0

    def cut_off_all(self, error: str) -> int:
        """End every request through no fault of its own; returns how many there were."""
        entries = list(self._entries.values())
        for entry in entries:
            if entry.request.request_id in self._sent:
                self._send(AbortRequest(request_id=entry.request.request_id))
            self._close(entry, error, reason=FinishReason.ABORT)
        return len(entries)

    # ---- inside ----------------------------------------------------------------------------

    def _check(self, request: AddRequest) -> None:
        if self._draining:
            self._refuse(RefusalReason.DRAINING)
            raise Unavailable(SHUTTING_DOWN, retry_after_s=30.0)
        num_prompt, limit = len(request.prompt_tokens), self._limits.max_tokens
        if num_prompt + request.sampling.max_tokens > limit:
            self._refuse(RefusalReason.TOO_LONG)
            raise CapacityError(
                f"the prompt has {num_prompt} tokens and max_tokens is "
                f"{request.sampling.max_tokens}; together at most {limit} fit",
                field="prompt" if num_prompt >= limit else "max_tokens",
            )
        if len(self._entries) >= self.max_unfinished:
            self._refuse(RefusalReason.QUEUE_FULL)
            raise Unavailable(
                f"{len(self._entries)} requests are running or waiting, as many as may "
                "(max_queued_requests); come back later",
                retry_after_s=self._rate.promise_s(),
            )
        if request.request_id in self._entries:
            raise InputError(f"request id {request.request_id!r} is in use", field="request_id")

    def _with_seed(self, request: AddRequest) -> AddRequest:
        """Fix the seed here: a replay must draw the same tokens."""
        if request.sampling.seed is not None:
            return request
        return replace(request, sampling=replace(request.sampling, seed=self._draw_seed()))

    def _cancel(self, entry: _Entry) -> None:
        """Forget a request and stop it in the engine; nothing happens if it has ended."""
        request_id = entry.request.request_id
        if self._entries.get(request_id) is not entry:
            return
        if request_id in self._sent and not entry.stopping:
            self._send(AbortRequest(request_id=request_id))
        self._end(entry)
        self._send_those_that_may_run()

    def _stop(self, entry: _Entry) -> None:
        """As ``_cancel``, but what the engine has to say in the end reaches the stream."""
        if entry.request.request_id not in self._sent:
            self._cancel(entry)
            return
        entry.stopping = True
        self._send(AbortRequest(request_id=entry.request.request_id))

    def _send_those_that_may_run(self) -> None:
        """A request that an earlier engine had goes out with the tokens it has."""
        if not self._engine_up or len(self._sent) == len(self._entries):
            return
        entries = list(self._entries.values())
        records = [entry.record for entry in entries]
        for index in may_run(records, num_active=self._limits.num_active()):
            entry = entries[index]
            request_id = entry.request.request_id
            if request_id not in self._sent:
                self._send(replace(entry.request, generated_tokens=tuple(entry.generated)))
                self._sent[request_id] = entry

    def _on_output(self, entry: _Entry, output: TokenOutput) -> None:
        if output.token_id is not None:
            entry.has_run = True
            if output.index < len(entry.generated):  # sent before a death, and again after it
                return
            assert output.index == len(entry.generated), f"token lost: {output}"
            self._note_token(entry, output.token_id)
        entry.outputs.put_nowait(output)
        if output.finish_reason is not None:
            self._finish(entry, output.finish_reason)

    def _note_token(self, entry: _Entry, token_id: int) -> None:
        entry.generated.append(token_id)
        entry.record.note_token()
        entry.last_token_s = self._clock()
        if entry.first_token_s is None:
            entry.first_token_s = entry.last_token_s

    def _finish(self, entry: _Entry, reason: FinishReason) -> None:
        self._remove(entry.request.request_id)
        self._rate.note_end()
        if reason is FinishReason.ERROR:
            self.num_failed += 1
        elif entry.first_token_s is not None and entry.last_token_s is not None:
            gaps = len(entry.generated) - 1
            self._observe(
                ttft_s=entry.first_token_s - entry.submitted_s,
                tpot_s=(entry.last_token_s - entry.first_token_s) / gaps if gaps else None,
                output_tokens=len(entry.generated),
            )

    def _close(self, entry: _Entry, error: str, *, reason: FinishReason) -> None:
        self._on_output(
            entry,
            TokenOutput(
                request_id=entry.request.request_id,
                index=len(entry.generated),
                token_id=None,
                finish_reason=reason,
                error=error,
            ),
        )

    def _end(self, entry: _Entry) -> None:
        """End a stream without a last output; harmless if it has had one."""
        self._remove(entry.request.request_id)
        entry.outputs.put_nowait(None)

    def _remove(self, request_id: str) -> None:
        entry = self._entries.pop(request_id, None)
        self._sent.pop(request_id, None)
        if entry is not None:
            self.recorder.note_end(request_id, output_tokens=len(entry.generated))
        if not self._entries:
            self._idle.set()
