"""Which prompt tokens and which decodes make up the next step, and who is in the batch at all.

Decodes of all running requests are in every step; prompts fill it up to ``prefill_chunk``
tokens, in order of arrival. ``admission.py`` says who may join, ``preemption.py`` who must go and
when he comes back; here it is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from sparsed.core import BLOCK_TOKENS, Knobs, SparseMethod, SparseMode, WaitReason
from sparsed.engine.admission import GATES, MAX_PASSED_S, Claim, Gate, Room, check, pick
from sparsed.engine.batch import DecodeRow, PromptChunk, StepPlan
from sparsed.engine.pace import Pace
from sparsed.engine.preemption import GATES as HELD_GATES
from sparsed.engine.preemption import Held, victim, why_not_back
from sparsed.engine.queues import Queues
from sparsed.engine.request import RequestState, Status

LOGPROBS_CHUNK_TOKENS = 256  # every position has a row of logits: bounds that matrix
LOOK_EVERY_STEPS: Final = 4  # at pressure: what rows use is measured no oftener


class Claims(Protocol):
    """What requests take, measured; ``kvcache.claims.Claims`` is one."""

    @property
    def miss_s(self) -> float: ...
    def of_row(self, row: int, /) -> Claim: ...
    def of_request(
        self, num_tokens: int, *, method: SparseMethod, token_budget: int | None
    ) -> Claim: ...
    def room(self, pace: Pace, /) -> Room: ...


class Rows(Protocol):
    """What the scheduler needs of the KV cache; ``KVCache`` is one. ``num_tokens`` of ``spill`` and
    ``restore`` are those computed so far."""

    @property
    def claims(self) -> Claims: ...
    def can_admit(
        self, num_tokens: int, *, method: SparseMethod, token_budget: int | None
    ) -> bool: ...
    def add(self, num_tokens: int, *, method: SparseMethod, token_budget: int | None) -> int: ...
    def free(self, row: int) -> None: ...
    def spill(self, row: int, num_tokens: int) -> None: ...
    def can_restore(self, row: int) -> bool: ...
    def restore(self, row: int, num_tokens: int) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A plan and the requests behind its entries, in the same order."""

    plan: StepPlan
    prefills: tuple[RequestState, ...]
    decodes: tuple[RequestState, ...]


class Scheduler:
    """Queues of requests, and their rows in the KV cache. One thread.

    ``max_passed_s`` and ``gates`` as in ``admission.py``; ``target_s``: time a token may take.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        knobs: Knobs,
        target_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        max_passed_s: float = MAX_PASSED_S,
        gates: Sequence[Gate] = GATES,
    ) -> None:
        self.knobs = knobs
        self.queues = Queues(clock)
        self.num_spills = 0
        self.num_restores = 0
        self._rows = rows
        self._pace = Pace(target_s=target_s)
        self._max_passed_s = max_passed_s
        self._gates = gates
        self._held_gates = tuple(gate for gate in HELD_GATES if gate in gates)
        self._step = 0
        self._known: tuple[tuple[int, int], list[Claim]] = ((-1, -1), [])

    @property
    def num_running(self) -> int:
        return len(self.queues.running)

    @property
    def num_waiting(self) -> int:
        """Requests that are not in the batch, spilled ones included."""
        return len(self.queues.waiting) + len(self.queues.spilled)

    @property
    def num_decoding(self) -> int:
        """Running requests whose prompt is in the cache."""
        return sum(request.status is Status.DECODE for request in self.queues.running.values())

    @property
    def has_requests(self) -> bool:
        return bool(self.num_running or self.num_waiting)

    def get(self, request_id: str) -> RequestState | None:
        """The unfinished request of that id."""
        return self.queues.get(request_id)

    def add(self, request: RequestState) -> None:
        assert self.get(request.request_id) is None, f"{request.request_id} is unfinished"
        self.queues.add(request)

    def finish(self, request: RequestState) -> None:
        """Forget an unfinished request and give its row back."""
        self.queues.remove(request)
        if request.row is not None:
            self._rows.free(request.row)
        request.finish()

    def note_step(self, step: Step, *, seconds: float) -> None:
        """Learn from a step how long tokens take; prompts in it would tell nothing."""
        if not step.prefills:
            self._pace = self._pace.note(seconds, miss_s=self._rows.claims.miss_s)

    def blocked(self) -> RequestState | None:
        """The head of the queue if nothing runs that could make room for it."""
        if self.queues.running or self.queues.spilled or not self.queues.waiting:
            return None
        head = next(iter(self.queues.waiting.values()))
        return head if self._why(head, [], self._room()) else None

    def schedule(self) -> Step:
        """The next step; spills, brings back and admits requests. Empty if all that runs waits for
        tokens in flight, or nothing does."""
        self._step += 1
        self._relieve()
        self._bring_back()
        running = self.queues.running.values()
        decodes = tuple(request for request in running if request.may_decode)
        prefills: list[RequestState] = []
        chunks: list[PromptChunk] = []
        room = self.knobs.prefill_chunk
        for request in self._prompts():
            chunks.append(_chunk(request, room))
            prefills.append(request)
            room -= len(chunks[-1].tokens)
            if room == 0:
                self._note_full()
                break
        plan = StepPlan(chunks=tuple(chunks), decodes=tuple(map(_decode_row, decodes)))
        return Step(plan=plan, prefills=tuple(prefills), decodes=decodes)

    # -- who goes and comes --------------------------------------------------------------------

    def _relieve(self) -> None:
        """Spill one request if those that run have outgrown the hot tier or the link."""
        if self._step % LOOK_EVERY_STEPS or self.num_running < 2:
            return
        requests = list(self.queues.running.values())
        held = [self._held(one) for one in requests]
        place = victim(held, self._room(), step=self._step, gates=self._held_gates)
        if place is None:
            return
        request = requests[place]
        assert request.row is not None
        if request.status is Status.DECODE and not request.may_decode:
            return  # it is about to end by itself
        self._rows.spill(request.row, request.num_computed)
        self.queues.spill(request)
        request.changed_step = self._step
        self.num_spills += 1

    def _bring_back(self) -> None:
        """Restore spilled requests that fit again, in the order of their admission."""
        while spilled := next(iter(self.queues.spilled.values()), None):
            reason = WaitReason.ACTIVE_LIMIT
            if self.num_running < self.knobs.max_num_active_seqs:
                held, room = self._held(spilled), self._room()
                found = why_not_back(
                    self._running_claims(), held, room, step=self._step, gates=self._held_gates
                )
                assert spilled.row is not None
                if found is None and self._rows.can_restore(spilled.row):
                    self._restore(spilled)
                    continue
                reason = found or WaitReason.HOT_TIER
            self.queues.note([spilled], [reason])
            return

    def _restore(self, request: RequestState) -> None:
        assert request.row is not None
        self._rows.restore(request.row, request.num_computed)
        self.queues.restore(request)
        request.changed_step = self._step
        self.num_restores += 1

    def _prompts(self) -> Iterator[RequestState]:
        """Unfinished prompts, then waiting requests, each admitted when it is asked for."""
        running = list(self.queues.running.values())
        yield from [request for request in running if request.status is Status.PREFILL]
        while request := self._admit():
            yield request

    def _admit(self) -> RequestState | None:
        """The next request that may join; none while one that was spilled waits."""
        requests = self.queues.first_waiting
        if not requests:
            return None
        if self.queues.spilled:
            self.queues.note(requests, [WaitReason.TURN] * len(requests))
            return None
        if self.num_running >= self.knobs.max_num_active_seqs:
            self.queues.note(requests, [WaitReason.ACTIVE_LIMIT] * len(requests))
            return None
        running, room = self._running_claims(), self._room()
        picked = pick(
            self.queues.waited_s(requests),
            lambda place: self._why(requests[place], running, room),
            max_passed_s=self._max_passed_s,
        )
        self.queues.note(requests, picked.reasons)
        if picked.place is None:
            return None
        request = requests[picked.place]
        budget, method = request.request.sparse.token_budget, self._method(request)
        row = self._rows.add(request.num_total_tokens, method=method, token_budget=budget)
        request.admit(row)
        request.changed_step = self._step
        self.queues.admit(request)
        return request

    def _why(
        self, request: RequestState, running: Sequence[Claim], room: Room
    ) -> WaitReason | None:
        """Why the request may not join those that run; None: it may."""
        num_tokens, method = request.num_total_tokens, self._method(request)
        budget = request.request.sparse.token_budget
        claim = self._rows.claims.of_request(num_tokens, method=method, token_budget=budget)
        reason = check(running, claim, room, gates=self._gates)
        if reason is None and not self._rows.can_admit(
            num_tokens, method=method, token_budget=budget
        ):
            return WaitReason.HOT_TIER
        return reason

    def _note_full(self) -> None:
        """The step has all the prompt tokens it may have; who waits now waits for that, unless
        there is more to it."""
        fresh = [one for one in self.queues.first_waiting if one.wait_reason is None]
        self.queues.note(fresh, [WaitReason.PROMPTS] * len(fresh))

    def _room(self) -> Room:
        return self._rows.claims.room(self._pace)

    def _held(self, request: RequestState) -> Held:
        assert request.row is not None
        claim = self._rows.claims.of_row(request.row)
        return Held(claim=claim, changed_step=request.changed_step)

    def _running_claims(self) -> list[Claim]:
        """Asked again when others run, and every few steps."""
        key = (self.queues.version, self._step // LOOK_EVERY_STEPS)
        if self._known[0] != key:
            running = self.queues.running.values()
            self._known = (key, [self._held(request).claim for request in running])
        return self._known[1]

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
