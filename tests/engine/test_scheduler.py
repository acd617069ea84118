"""Who is in a step, in which order, and that every row comes back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sparsed.core import (
    AddRequest,
    FinishReason,
    InputError,
    Knobs,
    SamplingParams,
    SparseMethod,
    SparseMode,
    SparseOptions,
    WaitReason,
)
from sparsed.engine.admission import MAX_PASSED_S, Claim, Room
from sparsed.engine.hit_curve import MissCurve
from sparsed.engine.pace import Pace
from sparsed.engine.preemption import SETTLE_STEPS
from sparsed.engine.request import RequestState, Status
from sparsed.engine.scheduler import LOGPROBS_CHUNK_TOKENS, Scheduler, Step

KNOBS = Knobs(
    token_budget=256,
    hbm_budget=None,
    max_num_active_seqs=3,
    prefill_chunk=16,
    page_size=32,
    sparse_method="quest",
    dense_layers=0,
    max_num_seqs=8,
    kv_hbm_gib=1.0,
    kv_dram_gib=1.0,
    max_model_len=4096,
)


class CountingClaims:
    """A page a token: working sets are what is held."""

    miss_s = 0.0

    def __init__(self, rows: CountingRows, hot_tokens: int) -> None:
        self._rows = rows
        self.hot_tokens = hot_tokens

    def of_row(self, row: int) -> Claim:
        return _claim(self._rows.held[row])

    def of_request(self, num_tokens: int, **_values: object) -> Claim:
        return _claim(num_tokens)

    def room(self, pace: Pace) -> Room:
        free_rows = KNOBS.max_num_seqs - len(self._rows.held)
        return Room(
            hot_pages=self.hot_tokens, free_frames=self._rows.free_tokens, free_rows=free_rows
        )


def _claim(num_tokens: int) -> Claim:
    curve = MissCurve(slots=1, misses=0, exponent=1, selected=1, total=num_tokens)
    return Claim(
        mandatory_pages=num_tokens / 2,
        working_set_pages=num_tokens,
        frames=num_tokens,
        curve=curve,
    )


class CountingRows:
    """A cache of ``capacity`` tokens that remembers who holds what."""

    def __init__(self, capacity: int, *, hot_tokens: int = 10**6) -> None:
        self.claims = CountingClaims(self, hot_tokens)
        self.spilled: set[int] = set()
        self.free_tokens = capacity
        self.held: dict[int, int] = {}
        self.methods: list[SparseMethod] = []
        self.budgets: list[int | None] = []

    def can_admit(self, num_tokens: int, *, method: SparseMethod, token_budget: int | None) -> bool:
        return num_tokens <= self.free_tokens

    def add(self, num_tokens: int, *, method: SparseMethod, token_budget: int | None) -> int:
        assert num_tokens <= self.free_tokens
        assert not self.spilled, "nobody joins while one waits to come back"
        row = min(set(range(len(self.held) + 1)) - set(self.held))
        self.free_tokens -= num_tokens
        self.held[row] = num_tokens
        self.methods.append(method)
        self.budgets.append(token_budget)
        return row

    def free(self, row: int) -> None:
        self.free_tokens += self.held.pop(row)
        self.spilled.discard(row)

    def spill(self, row: int, num_tokens: int) -> None:
        assert row in self.held and row not in self.spilled
        self.spilled.add(row)

    def can_restore(self, row: int) -> bool:
        return True

    def restore(self, row: int, num_tokens: int) -> None:
        self.spilled.remove(row)


def state(name: str, *, prompt: int, output: int = 4, mode: SparseMode = SparseMode.AUTO,
          prompt_logprobs: int | None = None) -> RequestState:  # fmt: skip
    request = AddRequest(
        request_id=name,
        prompt_tokens=tuple(range(prompt)),
        sampling=SamplingParams(max_tokens=output, prompt_logprobs=prompt_logprobs),
        sparse=SparseOptions(mode=mode),
    )
    return RequestState(request=request, seed=0)


def complete(scheduler: Scheduler, step: Step) -> None:
    """What the engine does with a step: progress, one token each, free what is finished."""
    ready = list(step.decodes)
    for request, chunk in zip(step.prefills, step.plan.chunks, strict=True):
        request.advance_prefill(len(chunk.tokens))
        if request.status is Status.DECODE:
            ready.append(request)
    for request in ready:
        request.append(7)
        if request.finish_reason:
            scheduler.finish(request)


def test_chunks_share_the_step_in_order_of_arrival() -> None:
    scheduler = Scheduler(CountingRows(1000), knobs=KNOBS)
    for name, prompt in (("a", 20), ("b", 6), ("c", 9)):
        scheduler.add(state(name, prompt=prompt))
    first = scheduler.schedule()
    assert [(c.start, c.end, c.logits_from) for c in first.plan.chunks] == [(0, 16, 16)]
    assert scheduler.num_running == 1, "no room is taken before there are tokens to compute"
    complete(scheduler, first)
    second = scheduler.schedule()
    assert [r.request_id for r in second.prefills] == ["a", "b", "c"]
    assert [(c.start, c.end, c.logits_from) for c in second.plan.chunks] == [
        (16, 20, 19),
        (0, 6, 5),
        (0, 6, 6),
    ]
    complete(scheduler, second)
    third = scheduler.schedule()
    assert [(d.token, d.position) for d in third.plan.decodes] == [(7, 20), (7, 6)]
    assert [(c.start, c.end, c.logits_from) for c in third.plan.chunks] == [(6, 9, 8)]


def test_a_later_request_overtakes_a_head_that_does_not_fit_for_a_bounded_time_only() -> None:
    rows, now_s = CountingRows(100), [0.0]
    scheduler = Scheduler(rows, knobs=KNOBS, clock=lambda: now_s[0])
    running, head, small = (
        state("running", prompt=16, output=20),
        state("head", prompt=80),
        state("small", prompt=1),
    )
    for request in (running, head, small):
        scheduler.add(request)
    complete(scheduler, scheduler.schedule())
    complete(scheduler, scheduler.schedule())
    assert small.status is Status.DECODE, "it passes"
    scheduler.finish(small)
    late = state("late", prompt=1)
    now_s[0] = MAX_PASSED_S
    scheduler.add(late)
    for _ in range(3):
        step = scheduler.schedule()
        assert [r.request_id for r in step.decodes] == ["running"]
        assert not step.prefills
        complete(scheduler, step)
    told = {one.request_id: (one.reason, one.waited_s) for one in scheduler.queues.told}
    assert told == {"head": (WaitReason.DRAM_TIER, 2.0), "late": (WaitReason.TURN, 0.0)}
    scheduler.finish(running)
    assert [r.request_id for r in scheduler.schedule().prefills] == ["head"]
    counts = {one.reason: one.count for one in scheduler.queues.waits}
    assert counts == {
        WaitReason.DRAM_TIER: 1,
        WaitReason.PROMPTS: 2,
        WaitReason.TURN: 1,
    }


def test_a_raised_limit_stops_at_the_capacity_and_reasons_follow() -> None:
    scheduler = Scheduler(CountingRows(1000), knobs=replace(KNOBS, max_num_active_seqs=1))
    for name in "ab":
        scheduler.add(state(name, prompt=2, output=9))
    complete(scheduler, scheduler.schedule())
    assert [one.reason for one in scheduler.queues.told] == [WaitReason.ACTIVE_LIMIT]
    scheduler.knobs = replace(KNOBS, max_num_active_seqs=2)
    complete(scheduler, scheduler.schedule())
    assert scheduler.queues.told == ()
    with pytest.raises(InputError, match="max_num_active_seqs=9 is above max_num_seqs=8"):
        replace(KNOBS, max_num_active_seqs=9)


def test_the_newest_is_spilled_under_pressure_and_comes_back_to_its_place() -> None:
    rows = CountingRows(1000, hot_tokens=300)
    scheduler = Scheduler(rows, knobs=KNOBS)
    requests = [state(name, prompt=2, output=90) for name in "abc"]
    for request in requests:
        scheduler.add(request)
    complete(scheduler, scheduler.schedule())
    rows.claims.hot_tokens = 200

    def decoding(num_steps: int) -> str:
        for _ in range(num_steps):
            step = scheduler.schedule()
            complete(scheduler, step)
        return "".join(request.request_id for request in step.decodes)

    assert decoding(SETTLE_STEPS - 4) == "abc", "all have just come"
    assert decoding(8) == "ab"
    assert [one.reason for one in scheduler.queues.told] == [WaitReason.SPILLED]
    scheduler.finish(requests[0])
    rows.claims.hot_tokens = 300
    assert decoding(8) == "b", "not yet"
    newcomer = state("d", prompt=1)
    scheduler.add(newcomer)
    assert decoding(2) == "b" and newcomer.wait_reason is WaitReason.TURN
    assert (scheduler.num_spills, scheduler.num_restores) == (1, 0)
    scheduler.finish(requests[1])
    assert decoding(1) == "c", "nobody else needs the room"
    assert decoding(2) == "cd"


def test_a_head_that_nothing_can_make_room_for_is_named() -> None:
    scheduler = Scheduler(CountingRows(10), knobs=KNOBS)
    head = state("head", prompt=11)
    scheduler.add(head)
    assert scheduler.blocked() is head
    scheduler.finish(head)
    assert scheduler.blocked() is None
    assert not scheduler.has_requests


def test_the_limit_of_running_requests_can_be_lowered_live() -> None:
    scheduler = Scheduler(CountingRows(1000), knobs=KNOBS)
    requests = [state(str(i), prompt=2, output=9) for i in range(5)]
    for request in requests:
        scheduler.add(request)
    complete(scheduler, scheduler.schedule())
    assert scheduler.num_running == 3
    scheduler.knobs = replace(KNOBS, max_num_active_seqs=1)
    scheduler.finish(requests[0])
    step = scheduler.schedule()
    assert [r.request_id for r in step.decodes] == ["1", "2"]
    assert scheduler.num_waiting == 2


def test_prompt_logprobs_want_every_position_in_small_chunks() -> None:
    scheduler = Scheduler(CountingRows(10_000), knobs=replace(KNOBS, prefill_chunk=4096))
    scheduler.add(state("scored", prompt=300, prompt_logprobs=0))
    scheduler.add(state("plain", prompt=1000))
    scored, plain = scheduler.schedule().plan.chunks
    assert (scored.logits_from, scored.end) == (0, LOGPROBS_CHUNK_TOKENS)
    assert (plain.logits_from, plain.end) == (999, 1000)


@pytest.mark.parametrize(
    ("mode", "method"),
    [(SparseMode.AUTO, SparseMethod.QUEST), (SparseMode.OFF, SparseMethod.DENSE)],
)
def test_the_method_is_the_knob_unless_sparsity_is_off(
    mode: SparseMode, method: SparseMethod
) -> None:
    rows = CountingRows(100)
    scheduler = Scheduler(rows, knobs=KNOBS)
    scheduler.add(state("a", prompt=1, mode=mode))
    scheduler.schedule()
    assert rows.methods == [method]


def test_a_request_without_a_budget_of_its_own_follows_the_knob() -> None:
    rows = CountingRows(100)
    scheduler = Scheduler(rows, knobs=KNOBS)
    own = state("own", prompt=1)
    own.request = replace(own.request, sparse=SparseOptions(token_budget=512))
    scheduler.add(own)
    scheduler.add(state("follows", prompt=1))
    scheduler.schedule()
    assert rows.budgets == [512, None]


def test_a_finished_request_cannot_go_on() -> None:
    request = state("a", prompt=1, output=1)
    request.admit(0)
    request.advance_prefill(1)
    request.append(3)
    assert request.finish_reason is FinishReason.LENGTH
    request.finish()
    with pytest.raises(AssertionError):
        request.append(4)
    with pytest.raises(AssertionError):
        request.finish()


class AnyTraffic(RuleBasedStateMachine):
    """Requests come, are aborted and finish in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = CountingRows(200)
        self.scheduler = Scheduler(self.rows, knobs=KNOBS, max_passed_s=0.0)
        self.arrived: list[RequestState] = []

    @rule(prompt=st.integers(1, 60), output=st.integers(1, 5))
    def add(self, prompt: int, output: int) -> None:
        self.arrived.append(state(str(len(self.arrived)), prompt=prompt, output=output))
        self.scheduler.add(self.arrived[-1])

    @precondition(lambda self: self.scheduler.has_requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        unfinished = [r for r in self.arrived if r.status is not Status.FINISHED]
        self.scheduler.finish(data.draw(st.sampled_from(unfinished)))

    @rule()
    def step(self) -> None:
        decoding = [r for r in self.arrived if r.status is Status.DECODE]
        step = self.scheduler.schedule()
        assert list(step.decodes) == decoding, "every running request decodes in every step"
        assert sum(len(chunk.tokens) for chunk in step.plan.chunks) <= KNOBS.prefill_chunk
        assert bool(step.prefills or step.decodes) == self.scheduler.has_requests
        for request, chunk in zip(step.prefills, step.plan.chunks, strict=True):
            assert chunk.start == request.num_prefilled
            assert chunk.tokens == request.prompt[chunk.start : chunk.end]
        complete(self.scheduler, step)

    @invariant()
    def rows_are_held_by_running_requests(self) -> None:
        running = {r.row: r.num_total_tokens for r in self.arrived
                   if r.status in (Status.PREFILL, Status.DECODE)}  # fmt: skip
        assert self.rows.held == running
        assert self.rows.free_tokens == 200 - sum(running.values())
        assert len(running) == self.scheduler.num_running <= KNOBS.max_num_active_seqs

    @invariant()
    def admission_is_first_come_first_served(self) -> None:
        unfinished = [r for r in self.arrived if r.status is not Status.FINISHED]
        waiting = [r.status is Status.WAITING for r in unfinished]
        assert waiting == sorted(waiting)


AnyTraffic.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestAnyTraffic = AnyTraffic.TestCase
