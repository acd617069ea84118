"""Which graphs steps find, and when they are recorded, on a clock of the test's own."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sparsed.core import CopyPath
from sparsed.engine.kvcache.link_policy import CopyChoice
from sparsed.engine.step_graphs import (
    IN_PLACE,
    SELECTING,
    SLICE_S,
    GraphKey,
    GraphTarget,
    StepGraphs,
    graph_sizes,
    ladder,
    most_pages,
)

PAGE_SIZE, MAX_TOKENS, MAX_ROWS = 8, 1 << 17, 12
SIZES = graph_sizes(MAX_ROWS)
LOADS = [CopyChoice(CopyPath.KERNEL, programs, 512) for programs in (8, 16)]
COSTS_S = st.sampled_from([0.0, SLICE_S / 3, SLICE_S, 0.25])
budgets = st.sampled_from([256, 300, 512, 1000, 2048, 4096, 8192])


@given(
    budget=st.integers(256, 8192),
    page_size=st.sampled_from([8, 16, 32, 64]),
    max_tokens=st.integers(128, 1 << 18),
)
def test_a_ladder_doubles_up_to_the_largest_budget(
    budget: int, page_size: int, max_tokens: int
) -> None:
    counts = ladder(budget, page_size=page_size, max_tokens=max_tokens)
    most = most_pages(page_size=page_size, max_tokens=max_tokens)
    assert counts[0] == min(budget // page_size - 1, most) and counts[-1] == most
    assert list(counts) == sorted(set(counts))
    for number, count in enumerate(counts[:-1]):
        assert count == budget * 2**number // page_size - 1
    # Whatever a request may ask for is on it, and so is all of a request that is not sparse yet.
    assert most >= min(8192 // page_size - 1, (max_tokens - 1) // page_size)


def target(budget: int, load: CopyChoice, *, keeps: bool = False) -> GraphTarget:
    counts = ladder(budget, page_size=PAGE_SIZE, max_tokens=MAX_TOKENS)
    return GraphTarget(counts, load, keeps)


Kind = tuple[bool, bool, bool]  # as in GraphKey


class GraphsMachine(RuleBasedStateMachine):
    """Changes come at any time, and are put in force as soon as the graphs say they may be."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.cost_s = 0.0
        self.num_recorded = 0
        self.busy_s = 0.0  # recording while requests wait
        self.unpaced_s = 0.0  # when requests last began to wait
        self.now = self.asked = target(2048, LOADS[0])
        self.graphs = StepGraphs(
            self.now,
            sizes=SIZES,
            record=self.record,
            settle=self.settle,
            clock=lambda: self.now_s,
        )
        self.settled = 0
        while self.graphs.is_recording:
            self.graphs.advance(idle=True)

    def record(self, key: GraphKey) -> GraphKey:
        assert key.load in (None, self.asked.load), "steps are launched as was asked for last"
        assert key.load is None or key.fetches
        assert key.keeps == (key.pages > 0 and self.asked.keeps)
        assert key not in self.alive, "recorded twice"
        assert key.pages in {0, *self.now.counts, *self.asked.counts}, "nobody will want it"
        self.now_s += self.cost_s
        self.num_recorded += 1
        return key

    def settle(self) -> None:
        self.settled += 1

    @property
    def alive(self) -> dict[GraphKey, GraphKey]:
        return self.graphs._graphs

    def take(self) -> None:
        if self.asked != self.now and self.graphs.is_ready:
            self.graphs.switch()
            self.now = self.asked

    @rule(budget=budgets, load=st.sampled_from(LOADS), keeps=st.booleans())
    def ask(self, budget: int, load: CopyChoice, keeps: bool) -> None:
        before, settled = set(self.alive), self.settled
        self.asked = target(budget, load, keeps=keeps)
        serving = self.serving_counts(self.now)
        self.graphs.ask(self.asked)
        is_alike = (load, keeps) == (self.now.load, self.now.keeps)
        if is_alike and any(c >= self.asked.counts[0] for c in serving):
            assert self.graphs.is_ready, "less than what there are graphs of needs no new ones"
        self.take()
        assert self.settled > settled or before <= set(self.alive), "given up while it may run"

    @precondition(lambda self: self.graphs.is_recording)
    @rule(cost_s=COSTS_S, gap_s=st.sampled_from([0.0, 0.001, 0.02, 1.0]))
    def pause(self, cost_s: float, gap_s: float) -> None:
        """Between two steps of a busy engine."""
        self.now_s += gap_s
        self.cost_s = cost_s
        started_s, num = self.now_s, self.num_recorded
        self.graphs.advance(idle=False)
        took_s = self.now_s - started_s
        assert took_s < SLICE_S + max(cost_s, 1e-9), "one graph more than the slice"
        self.busy_s += took_s
        assert self.busy_s <= (self.now_s - self.unpaced_s + SLICE_S + 0.25) / 2 + 1e-9
        if gap_s == 1.0:
            assert self.num_recorded > num, "it is rested"
        self.take()

    @rule(cost_s=COSTS_S)
    def rest(self, cost_s: float) -> None:
        """A turn of an idle engine."""
        self.cost_s = cost_s
        missing = self.graphs.is_recording
        progress, num = self.graphs.progress, self.num_recorded
        self.graphs.advance(idle=True)
        if missing:
            assert self.graphs.progress > progress and self.num_recorded > num
        self.busy_s, self.unpaced_s = 0.0, self.now_s
        self.take()

    @rule(
        num_rows=st.integers(1, MAX_ROWS),
        budget=st.none() | budgets,
        kind=st.sampled_from([IN_PLACE, *SELECTING]),
    )
    def step(self, num_rows: int, budget: int | None, kind: Kind) -> None:
        """Of requests that follow the knob, or have a budget of their own."""
        own = self.now.counts[0] if budget is None else budget // PAGE_SIZE - 1
        count = 0 if kind == IN_PLACE else own
        in_place, fetches, times = kind
        key, graph = self.graphs.find(
            num_rows, count=count, in_place=in_place, fetches=fetches, times=times
        )
        assert key.size >= num_rows and key[2:4] == kind[:2]
        assert key.pages >= count and (key.pages == 0) == (count == 0)
        assert key.load == (self.now.load if kind[1] else None)
        assert key.keeps == (count > 0 and self.now.keeps)
        kind = (in_place, fetches, False)
        usable = self.usable(num_rows, count, kind)
        if graph is None:
            assert not usable, "there is one that would do"
            assert key.times == times
            assert count > self.now.counts[0], "requests that follow the knob have theirs always"
            assert key.pages == min(c for c in self.now.counts if c >= count)
            assert key.size == min(size for size in SIZES if size >= num_rows)
            if self.asked == self.now:
                assert self.graphs.is_recording, "the next such request is to find one"
        else:
            assert graph is self.alive[key]
            assert key.times == (times and key._replace(times=True) in self.alive)
            found = key._replace(times=False)
            assert found in (self.best(num_rows, count, kind), min(usable))

    def best(self, num_rows: int, count: int, kind: Kind) -> GraphKey:
        """What there are graphs of once everything is recorded: few sizes of wide selections."""
        rung = min(c for c in self.now.counts if c >= count) if count else 0
        few = {1, 2, 4, 8, MAX_ROWS} if rung > self.now.counts[0] else set(SIZES)
        size = min(size for size in few if size >= num_rows)
        load, keeps = self.now.load if kind[1] else None, count > 0 and self.now.keeps
        return GraphKey(size, rung, *kind, load, keeps)

    def usable(self, num_rows: int, count: int, kind: Kind) -> set[GraphKey]:
        load, keeps = self.now.load if kind[1] else None, count > 0 and self.now.keeps
        return {
            key
            for key in self.alive
            if key.size >= num_rows
            and (key.pages >= count if count else key.pages == 0)
            and key[2:] == (*kind, load, keeps)
        }

    def serving_counts(self, wanted: GraphTarget) -> set[int]:
        """Counts with graphs for steps of any size and kind."""

        def serves(count: int) -> bool:
            return all(
                any(
                    key.size >= MAX_ROWS and key.pages == count and key[2:5] == kind
                    and key.load == (wanted.load if kind[1] else None)
                    and key.keeps == wanted.keeps
                    for key in self.alive
                )
                for kind in SELECTING
            ) and GraphKey(1, count, False, False, False, None, wanted.keeps) in self.alive  # fmt: skip

        return {key.pages for key in self.alive if key.pages and serves(key.pages)}

    @invariant()
    def whoever_follows_the_knob_has_a_graph(self) -> None:
        for kind in SELECTING:
            assert self.usable(MAX_ROWS, self.now.counts[0], kind)
        assert self.usable(MAX_ROWS, 0, IN_PLACE)

    @invariant()
    def memory_is_bounded(self) -> None:
        known = {*self.now.counts, *self.asked.counts}
        counts = {key.pages for key in self.alive} - {0}
        assert len(counts - known) <= 2, "one serves now, one after the change"
        assert {key.load for key in self.alive} <= {None, self.now.load, self.asked.load}
        keeps = {key.keeps for key in self.alive if key.pages}
        assert keeps <= {self.now.keeps, self.asked.keeps}

    def teardown(self) -> None:
        for _ in range(1000):
            if not self.graphs.is_recording:
                break
            self.rest(0.0)
        assert not self.graphs.is_recording and self.now == self.asked
        counts = {key.pages for key in self.alive} - {0}
        if stray := counts - set(self.now.counts):
            assert len(stray) == 1, "it stands in for what the knob asks for"
            assert self.now.counts[0] not in self.serving_counts(self.now)


GraphsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestGraphs = GraphsMachine.TestCase


def test_a_wide_request_finds_its_graphs_after_some_pauses() -> None:
    recorded: list[GraphKey] = []

    def record(key: GraphKey) -> GraphKey:
        recorded.append(key)
        return key

    graphs = StepGraphs(target(2048, LOADS[0]), sizes=SIZES, record=record)
    while graphs.is_recording:
        graphs.advance(idle=True)
    assert len(recorded) == len(graphs) == (1 + len(SELECTING)) * len(SIZES)
    recorded.clear()

    def find() -> tuple[GraphKey, GraphKey | None]:
        return graphs.find(3, count=300, in_place=False, fetches=True)

    key, graph = find()
    assert graph is None and (key.size, key.pages) == (4, 511)
    while find()[1] is None:
        graphs.advance(idle=False)
    assert find()[0].size >= 4, "a larger batch will do meanwhile"
    while graphs.is_recording:
        graphs.advance(idle=True)
    assert find() == (key, key)
    assert {key.pages for key in recorded} == {511}, "nobody asked for more"
    assert {key.size for key in recorded} == {1, 2, 4, 8, MAX_ROWS}
    assert graphs.find(3, count=255, in_place=False, fetches=True)[0].pages == 255


def test_without_graphs_nothing_waits() -> None:
    graphs = StepGraphs[GraphKey](target(256, LOADS[0]), sizes=SIZES, record=None)
    graphs.ask(target(8192, LOADS[1]))
    assert graphs.is_ready and not graphs.is_recording
    graphs.switch()
    key, graph = graphs.find(5, count=1000, in_place=True, fetches=True)
    assert graph is None and key == GraphKey(8, 1023, True, True, False, LOADS[1])
    assert not graphs.is_recording
