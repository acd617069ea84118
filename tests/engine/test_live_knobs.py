"""Hot knobs while requests run: nobody stalls, every caller is answered, the newest change counts."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any, cast

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sparsed.core import (
    AbortRequest,
    AddRequest,
    ApplyKnobs,
    CopyPath,
    EngineStats,
    FinishReason,
    Knobs,
    KnobsApplied,
    SamplingParams,
    SparseDetails,
    SparseMethod,
    SparseOptions,
    TokenBatch,
    TokenOutput,
)
from sparsed.engine.admission import Claim, Room
from sparsed.engine.batch import StepPlan
from sparsed.engine.engine import Engine
from sparsed.engine.hit_curve import MissCurve
from sparsed.engine.kvcache.link_policy import CopyChoice
from sparsed.engine.pace import Pace
from sparsed.engine.recorder import Drawn
from sparsed.engine.step_graphs import (
    SELECTING,
    SLICE_S,
    GraphKey,
    GraphTarget,
    StepGraphs,
    ladder,
)
from sparsed.engine.wire import Message
from sparsed.engine.worker import Link, StepClock, Worker

VOCAB = 50
COST_S = 0.1  # of a graph; a step takes no time on this clock
MAX_ROWS = 4
KNOBS = Knobs(
    token_budget=512,
    hbm_budget=None,
    max_num_active_seqs=3,
    prefill_chunk=16,
    page_size=8,
    sparse_method="mean-key",
    dense_layers=0,
    max_num_seqs=MAX_ROWS,
    kv_hbm_gib=1.0,
    kv_dram_gib=1.0,
    max_model_len=1 << 17,
)


class Claims:
    """Nothing costs anything."""

    miss_s = 0.0

    def of_row(self, row: int) -> Claim:
        return NO_CLAIM

    def of_request(self, num_tokens: int, **_values: object) -> Claim:
        return NO_CLAIM

    def room(self, pace: Pace) -> Room:
        return Room(hot_pages=10**6, free_frames=10**6, free_rows=MAX_ROWS)


CURVE = MissCurve(slots=1, misses=0, exponent=1, selected=1, total=1)
NO_CLAIM = Claim(mandatory_pages=1, working_set_pages=1, frames=1, curve=CURVE)


class Rows:
    """A cache for everybody, which knows each request's budget."""

    def __init__(self) -> None:
        self.own: dict[int, int | None] = {}
        self.claims = Claims()

    def observe(self) -> None: ...

    def rebudget(self) -> None: ...

    def recalls(self, row: int) -> list[float]:
        return []

    def can_admit(self, num_tokens: int, *, method: SparseMethod, token_budget: int | None) -> bool:
        return len(self.own) < MAX_ROWS

    def check_fits(self, num_tokens: int) -> None: ...

    def add(self, num_tokens: int, *, method: SparseMethod, token_budget: int | None) -> int:
        row = min(set(range(MAX_ROWS)) - set(self.own))
        self.own[row] = token_budget
        return row

    def free(self, row: int) -> None:
        del self.own[row]

    def details(self, row: int, *, num_dropped: int) -> SparseDetails:
        return SparseDetails(
            method="none", token_budget=0, decode_steps=0, sparse_steps=0, tokens_read=0,
            tokens_dense=0, coverage=None,
        )  # fmt: skip


class CountingModel:
    """Says the number after the last one. Its graphs are those of a GPU, on a clock of its own."""

    vocab_size = VOCAB
    runs_ahead = True

    def __init__(self) -> None:
        self.kv = Rows()
        self.now_s = 0.0
        self.in_force = self.asked = KNOBS
        self.num_recorded = 0
        self.num_eager = 0
        self._last: dict[int, int] = {}
        self.graphs = StepGraphs(
            self._target(KNOBS), sizes=[1, 2, 4], record=self._record, clock=lambda: self.now_s
        )
        while self.graphs.is_recording:
            self.graphs.advance(idle=True)
        self.num_recorded = 0

    def _record(self, key: GraphKey) -> GraphKey:
        self.now_s += COST_S
        self.num_recorded += 1
        return key

    def _target(self, knobs: Knobs) -> GraphTarget:
        counts = ladder(knobs.token_budget, page_size=8, max_tokens=knobs.max_model_len)
        return GraphTarget(counts, CopyChoice(CopyPath.KERNEL, knobs.copy_programs or 9, 512))

    def run(self, plan: StepPlan) -> Drawn:
        ends = [(c.row, c.tokens[-1], c.logits_from < c.end) for c in plan.chunks]
        ends += [(d.row, self._last[d.row] if d.token is None else d.token, True)
                 for d in plan.decodes]  # fmt: skip
        tokens = [(token + 1) % VOCAB for _, token, wanted in ends if wanted]
        self._last.update((row, (token + 1) % VOCAB) for row, token, wanted in ends if wanted)
        if plan.decodes:
            self._attend([decode.row for decode in plan.decodes])
        tokens_N = torch.tensor(tokens, dtype=torch.int64)
        return Drawn(torch.nn.functional.one_hot(tokens_N, VOCAB).float(), tokens_N)

    def _attend(self, rows: list[int]) -> None:
        """As if all of them were long enough to select."""
        budgets = [self.kv.own[row] or self.in_force.token_budget for row in rows]
        count = max(budgets) // 8 - 1
        key, graph = self.graphs.find(len(rows), count=count, in_place=False, fetches=True)
        assert key.load is not None
        assert key.load.programs == (self.in_force.copy_programs or 9), "as the callers were told"
        self.num_eager += graph is None
        follows = all(budget <= self.in_force.token_budget for budget in budgets)
        assert graph is not None or not follows

    def ask(self, knobs: Knobs) -> None:
        self.asked = knobs
        self.graphs.ask(self._target(knobs))

    @property
    def readiness(self) -> float:
        return 1.0 if self.graphs.is_ready else self.graphs.progress

    @property
    def is_preparing(self) -> bool:
        return self.graphs.is_recording

    def prepare(self, *, idle: bool) -> None:
        self.graphs.advance(idle=idle)

    def apply(self, knobs: Knobs) -> None:
        assert knobs == self.asked
        self.in_force = knobs
        self.graphs.switch()

    def stats(self) -> EngineStats:
        return EngineStats()


class ScriptedLink:
    """Messages to and from a worker, without a socket."""

    def __init__(self) -> None:
        self.inbox: deque[Message] = deque()
        self.sent: list[Message] = []

    def receive(self, *, timeout_s: float) -> Message | None:
        return self.inbox.popleft() if self.inbox else None

    def send(self, message: Message) -> None:
        self.sent.append(message)


class Bench:
    """A worker over the counting model, turn by turn."""

    def __init__(self) -> None:
        self.model, self.link = CountingModel(), ScriptedLink()
        self.engine = Engine(self.model, knobs=KNOBS)
        link = cast(Link, self.link)  # a script has of a link what a worker calls
        self.worker = Worker(link, engine=self.engine, clock=StepClock())

    def tell(self, message: Message) -> None:
        self.link.inbox.append(message)

    def set(self, change_id: int, **values: Any) -> Knobs:
        knobs = replace(KNOBS, **values)
        self.tell(ApplyKnobs(change_id=change_id, knobs=knobs))
        return knobs

    def add(self, name: str, *, first: int = 1, tokens: int = 8, budget: int | None = None) -> None:
        self.tell(
            AddRequest(
                request_id=name,
                prompt_tokens=tuple(range(first, first + 4)),
                sampling=SamplingParams(max_tokens=tokens, temperature=0.0),
                sparse=SparseOptions(token_budget=budget),
            )
        )

    def turn(self) -> list[Message]:
        """What the worker sends in one turn, reports aside."""
        before = len(self.link.sent)
        self.worker.turn()
        sent = self.link.sent[before:]
        return [message for message in sent if not isinstance(message, EngineStats)]

    def answers(self) -> list[KnobsApplied]:
        return [message for message in self.link.sent if isinstance(message, KnobsApplied)]


def outputs(sent: list[Message]) -> list[TokenOutput]:
    return [out for message in sent if isinstance(message, TokenBatch) for out in message.outputs]


def test_a_raise_is_answered_once_its_graphs_are_there_and_streams_go_on() -> None:
    bench = Bench()
    bench.add("a", tokens=400)
    while not outputs(bench.turn()):
        pass
    wanted = bench.set(5, token_budget=2048)
    shares, started_s = list[float](), bench.model.now_s
    while not bench.answers():
        before = bench.model.num_recorded
        assert len(outputs(bench.turn())) == 1, "the stream stands still"
        assert bench.model.num_recorded - before <= 1
        bench.model.now_s += 0.01  # a step
        if bench.engine.applying:
            assert bench.engine.applying.names == ("token_budget",)
            assert bench.engine.knobs == bench.model.in_force == KNOBS
            shares.append(bench.engine.applying.frac)
    assert bench.answers() == [KnobsApplied(change_id=5, knobs=wanted)]
    assert bench.engine.knobs == bench.model.in_force == wanted
    assert shares == sorted(shares) and 0.0 <= shares[0] < 0.2 and 0.8 < shares[-1] < 1.0
    assert bench.model.num_eager == 0 and bench.model.num_recorded == 3 * len(SELECTING)
    assert bench.model.now_s - started_s > 2 * COST_S * 14, "half of the time is for steps"


def test_less_than_there_is_room_for_is_in_force_at_once() -> None:
    bench = Bench()
    bench.add("a", tokens=400)
    bench.turn()
    lower = bench.set(1, token_budget=300)
    assert KnobsApplied(change_id=1, knobs=lower) in bench.turn()
    assert bench.engine.applying is None
    again = bench.set(2, token_budget=512, prefill_chunk=64)
    assert KnobsApplied(change_id=2, knobs=again) in bench.turn(), "its graphs are still there"


def test_an_idle_engine_gets_ready_without_a_pause_and_still_listens() -> None:
    bench = Bench()
    bench.set(1, token_budget=4096)
    for num in range(1, 3 * len(SELECTING) + 1):
        assert not bench.answers()
        bench.turn()
        assert bench.model.num_recorded == num
    assert [answer.change_id for answer in bench.answers()] == [1]
    assert not bench.engine.has_work


def test_a_change_that_overtakes_another_answers_both() -> None:
    bench = Bench()
    bench.set(1, token_budget=4096)
    bench.turn()
    wanted = bench.set(2, token_budget=1024, copy_programs=16)
    while not bench.answers():
        bench.turn()
    assert bench.answers() == [KnobsApplied(change_id=i, knobs=wanted) for i in (1, 2)]
    bench.set(3, token_budget=4096)
    bench.turn()
    assert bench.engine.applying is not None
    back = bench.set(4, token_budget=1024, copy_programs=16)
    assert bench.turn() == [KnobsApplied(change_id=i, knobs=back) for i in (3, 4)], "taken back"


def test_a_wide_request_is_eager_only_until_its_graphs_are_there() -> None:
    bench = Bench()
    bench.add("wide", tokens=60, budget=2048)
    for _ in range(80):
        bench.turn()
        bench.model.now_s += COST_S  # as long again for steps
    assert 0 < bench.model.num_eager <= 3, "a graph for a larger batch will do"
    eager = bench.model.num_eager
    bench.add("wide again", tokens=60, budget=2000)
    for _ in range(80):
        bench.turn()
    assert bench.model.num_eager == eager


class LiveMachine(RuleBasedStateMachine):
    """Requests and changes come, run, end and are aborted in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.expected: dict[str, list[int]] = {}
        self.seen: dict[str, list[int]] = {}
        self.running: list[str] = []
        self.asked: list[tuple[int, Knobs]] = []  # not answered yet
        self.wanted = KNOBS  # by the newest change that is none of a restart
        self.accepted: dict[int, Knobs] = {}
        self.refused: set[int] = set()
        self.next_id = 1

    @rule(first=st.integers(0, 40), tokens=st.integers(1, 12),
          budget=st.sampled_from([None, None, 256, 1024, 2048, 8192]))  # fmt: skip
    def add(self, first: int, tokens: int, budget: int | None) -> None:
        name = f"request-{len(self.expected)}"
        self.expected[name] = [(first + 4 + i) % VOCAB for i in range(tokens)]
        self.seen[name] = []
        self.running.append(name)
        self.bench.add(name, first=first, tokens=tokens, budget=budget)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.bench.tell(AbortRequest(request_id=data.draw(st.sampled_from(self.running))))

    @rule(
        budget=st.sampled_from([256, 300, 512, 1024, 4096, 8192]),
        chunk=st.sampled_from([16, 64]),
        programs=st.sampled_from([None, None, 16]),
        restart=st.integers(0, 7),
    )
    def apply(self, budget: int, chunk: int, programs: int | None, restart: int) -> None:
        page_size = 16 if restart == 7 else 8
        knobs = self.bench.set(
            self.next_id,
            token_budget=budget, prefill_chunk=chunk, copy_programs=programs, page_size=page_size,
        )  # fmt: skip
        self.asked.append((self.next_id, knobs))
        if restart == 7:
            self.refused.add(self.next_id)
        else:
            self.wanted = self.accepted[self.next_id] = knobs
        self.next_id += 1

    @rule(gap_s=st.sampled_from([0.0, 0.01, 0.5]))
    def turn(self, gap_s: float) -> None:
        bench = self.bench
        bench.model.now_s += gap_s
        started_s, was_told = bench.model.now_s, not bench.link.inbox
        in_force, applying = bench.engine.knobs, bench.engine.applying
        sent = bench.turn()
        assert bench.model.now_s - started_s <= COST_S + SLICE_S, "more than one graph"
        for output in outputs(sent):
            self.take(output)
        for message in sent:
            if isinstance(message, KnobsApplied):
                self.answer(message)
        if was_told and applying is None:
            assert bench.engine.knobs == in_force, "nobody asked for that"

    def take(self, output: TokenOutput) -> None:
        seen = self.seen[output.request_id]
        if output.token_id is not None:
            assert output.index == len(seen)
            seen.append(output.token_id)
        if output.finish_reason is not None:
            assert output.finish_reason in (FinishReason.LENGTH, FinishReason.ABORT)
            self.running.remove(output.request_id)
            if output.finish_reason is FinishReason.LENGTH:
                assert seen == self.expected[output.request_id]
        assert seen == self.expected[output.request_id][: len(seen)]

    def answer(self, answer: KnobsApplied) -> None:
        (knobs,) = [knobs for change_id, knobs in self.asked if change_id == answer.change_id]
        self.asked.remove((answer.change_id, knobs))
        if answer.change_id in self.refused:
            assert "page_size" in str(answer.error)
        else:
            assert answer.error is None
            newer = [self.accepted[i] for i in self.accepted if i >= answer.change_id]
            assert answer.knobs in newer, "neither its own nor what came after it"

    @invariant()
    def all_are_of_one_mind(self) -> None:
        engine, model = self.bench.engine, self.bench.model
        assert engine.knobs == model.in_force
        if not self.bench.link.inbox:
            assert (engine.applying is None) == (engine.knobs == self.wanted)
            assert (engine.applying is None) == (not self.asked)
            assert engine.stats().applying == engine.applying

    def teardown(self) -> None:
        for _ in range(3000):
            if not (self.bench.engine.has_work or self.bench.link.inbox):
                break
            self.turn(0.01)
        assert not self.asked and not self.running
        assert self.bench.engine.knobs == self.wanted
        assert self.bench.model.kv.own == {}


LiveMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=50)
TestLiveKnobs = LiveMachine.TestCase
