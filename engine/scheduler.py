"""First come, first served: which prompt tokens and which decodes make up the next step.

Decodes of all running requests are in every step; prompts fill it up to ``prefill_chunk``
tokens, in order of arrival. A request that does not fit yet holds back those behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from sparsed.core import BLOCK_TOKENS, Knobs, SparseMethod, SparseMode
from sparsed.engine.batch import DecodeRow, PromptChunk, StepPlan
from sparsed.engine.request import RequestState, Status

LOGPROBS_CHUNK_TOKENS = 256  # every position has a row of logits: bounds that matrix


class Rows(Protocol):
    """What the scheduler needs of the KV cache; ``KVCache`` is one."""

    def can_admit(
        self, num_tokens: int, *, method: SparseMethod, token_budget: int | None
    ) -> bool: ...
    def add(self, num_tokens: int, *, method: SparseMethod, token_budget: int | None) -> int: ...
    def free(self, row: int) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A plan and the requests behind its entries, in the same order."""

    plan: StepPlan
    prefills: tuple[RequestState, ...]
    decodes: tuple[RequestState, ...]


class Scheduler:
    """Queues of requests, and their rows in the KV cache. One thread."""

    def __init__(self, rows: Rows, *, knobs: Knobs) -> None:
        self.knobs = knobs
        self._rows = rows
        self._waiting: dict[str, RequestState] = {}  # both in order of arrival
        self._running: dict[str, RequestState] = {}

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_decoding(self) -> int:
        """Running requests whose prompt is in the cache."""
        return sum(request.status is Status.DECODE for request in self._running.values())

    @property
    def has_requests(self) -> bool:
        return bool(self._running or self._waiting)

    def get(self, request_id: str) -> RequestState | None:
        """The unfinished request of that id."""
        return self._running.get(request_id) or self._waiting.get(request_id)

    def add(self, request: RequestState) -> None:
        assert self.get(request.request_id) is None, f"{request.request_id} is unfinished"
        self._waiting[request.request_id] = request

    def finish(self, request: RequestState) -> None:
        """Forget an unfinished request and give its row back."""
        if request.row is None:
            del self._waiting[request.request_id]
        else:
            del self._running[request.request_id]
            self._rows.free(request.row)
        request.finish()

    def blocked(self) -> RequestState | None:
        """The head of the queue if nothing runs that could make room for it."""
        if self._running or not self._waiting:
            return None
        head = next(iter(self._waiting.values()))
        return None if self._fits(head) else head

    def schedule(self) -> Step:
        """The next step; admits waiting requests. Empty if all that runs waits for tokens in
        flight, or nothing does."""
        decodes = tuple(r for r in self._running.values() if r.may_decode)
        prefills: list[RequestState] = []
        chunks: list[PromptChunk] = []
        room = self.knobs.prefill_chunk
        for request in self._prompts():
            chunks.append(_chunk(request, room))
            prefills.append(request)
            room -= len(chunks[-1].tokens)
            if room == 0:
                break
        plan = StepPlan(chunks=tuple(chunks), decodes=tuple(map(_decode_row, decodes)))
        return Step(plan=plan, prefills=tuple(prefills), decodes=decodes)

    def _prompts(self) -> Iterator[RequestState]:
        """Unfinished prompts, then waiting requests, each admitted when it is asked for."""
        yield from [r for r in self._running.values() if r.status is Status.PREFILL]
        while request := self._admit():
            yield request

    def _admit(self) -> RequestState | None:
        head = next(iter(self._waiting.values()), None)
        if head is None or not self._fits(head):
            return None
        del self._waiting[head.request_id]
        budget, method = head.request.sparse.token_budget, self._method(head)
        head.admit(self._rows.add(head.num_total_tokens, method=method, token_budget=budget))
        self._running[head.request_id] = head
        return head

    def _fits(self, request: RequestState) -> bool:
        return self.num_running < self.knobs.max_num_active_seqs and self._rows.can_admit(
            request.num_total_tokens,
            method=self._method(request),
            token_budget=request.request.sparse.token_budget,
        )

    def _method(self, request: RequestState) -> SparseMethod:
        off = request.request.sparse.mode is SparseMode.OFF
        return SparseMethod.DENSE if off else SparseMethod(self.knobs.sparse_method)


def _chunk(request: RequestState, room_tokens: int) -> PromptChunk:
    assert request.row is not None
    if request.wants_prompt_logprobs:
        room_tokens = min(room_tokens, LOGPROBS_CHUNK_TOKENS)
    start = request.num_prefilled
    end = _chunk_end(start, room_tokens, prompt_length=len(request.prompt))
    sampled_from = end - 1 if end == len(request.prompt) else end
    return PromptChunk(
        row=request.row,
        tokens=request.prompt[start:end],
        start=start,
        prompt_length=len(request.prompt),
        logits_from=start if request.wants_prompt_logprobs else sampled_from,
        draw=request.draw if request.is_plain else None,
    )


def _chunk_end(start: int, room_tokens: int, *, prompt_length: int) -> int:
    """The end of the prompt, else of the last whole block that fits: whole frames save best."""
    if start + room_tokens >= prompt_length:
        return prompt_length
    aligned = (start + room_tokens) // BLOCK_TOKENS * BLOCK_TOKENS
    return aligned if aligned > start else start + room_tokens


def _decode_row(request: RequestState) -> DecodeRow:
    assert request.row is not None
    return DecodeRow(
        row=request.row,
        token=request.last_token,
        position=request.next_position,
        draw=request.draw if request.is_plain else None,
    )
