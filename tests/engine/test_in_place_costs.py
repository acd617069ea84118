"""What selecting costs, as it is measured where graphs are recorded; a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsed.core import EngineSpec, EngineStats, SparseMethod
from sparsed.engine import assembly
from sparsed.engine import runner as runner_module
from sparsed.engine.batch import DecodeRow, StepPlan
from sparsed.engine.in_place import InPlaceRule, Overhead
from sparsed.engine.in_place_costs import MANY_PAGES, OverheadMeter, is_of_hot_pages, make_meter
from sparsed.engine.measure import ceilings
from sparsed.engine.measure.ceilings import copy_bytes_per_s_within
from sparsed.engine.measure.clock import Clock
from sparsed.engine.recorder import Drawn, Recorded
from sparsed.engine.runner import Runner
from sparsed.engine.step_decoder import StepDecoder
from sparsed.engine.step_graphs import GraphKey
from sparsed.engine.step_input import StepRow, step_kind

MakeSpec = Callable[..., EngineSpec]
MakeSteps = Callable[..., StepDecoder]
Prefill = Callable[..., int]
CPU = torch.device("cpu")
PAGE = 8
NOTHING = Drawn(torch.empty(0), torch.empty(0))


class Device:
    """A clock that goes on by what the work it times takes."""

    def __init__(self, seconds: Callable[[], float] = lambda: 0.0) -> None:
        self.seconds = seconds
        self.pages = 0

    def rehearse(self, pages: int) -> None:
        self.pages = pages

    def median_s(self, work: Callable[[], object]) -> float:
        work()
        return self.seconds()


seconds = st.floats(0, 1e-2)


@given(step_s=seconds, own_s=seconds, page_s=st.floats(0, 1e-6), pages=st.integers(1, 16384),
       max_pages=st.integers(2, 16384))  # fmt: skip
def test_an_overhead_is_what_a_selecting_step_takes_longer(
    step_s: float, own_s: float, page_s: float, pages: int, max_pages: int
) -> None:
    """On a device where it takes so long, and so long a page."""
    device, took_s = Device(), 0.0

    def in_place() -> None:
        nonlocal took_s
        assert device.pages == 0, "all of them in place"
        took_s = step_s

    def select() -> None:
        nonlocal took_s
        assert 0 < device.pages <= min(MANY_PAGES, max_pages - 1)
        took_s = step_s + own_s + device.pages * page_s

    device.seconds = lambda: took_s
    rule = InPlaceRule(token_bytes=1, summary_bytes=0.0, page_size=PAGE, bytes_per_s=1e6)
    meter = OverheadMeter(rule, device, max_pages=max_pages)
    key = GraphKey(1, 31, in_place=False, fetches=False, times=False, load=None)
    meter.measure(
        key,
        Recorded(select, NOTHING),
        in_place=Recorded(in_place, NOTHING),
        rehearse=device.rehearse,
    )
    if max_pages > 2:  # of one page there is one point
        expected = own_s + pages * page_s
        assert rule._overheads[key].at(pages) == pytest.approx(expected, rel=1e-6, abs=1e-9)


rows = st.builds(
    lambda kind: StepRow(
        DecodeRow(row=0, token=0, position=900),
        in_place=901 if kind == "in place" else 0,
        num_full=112,
        num_selected=0 if kind == "in place" else 31,
        is_hot=kind == "hot",
    ),
    st.sampled_from(["in place", "hot", "cold"]),
)


@given(rows=st.lists(rows, min_size=1, max_size=4))
def test_all_that_hot_batches_run_is_timed(rows: list[StepRow]) -> None:
    """And of what only others run nothing is: there is nothing to choose."""
    in_place, selects, fetches = step_kind(rows)
    key = GraphKey(4, 31 if selects else 0, in_place, fetches, False, None)
    selecting = [row for row in rows if row.num_selected]
    if selecting and all(row.is_hot for row in selecting):
        assert is_of_hot_pages(key)
    elif not selecting or not in_place:
        assert not is_of_hot_pages(key)
    assert not is_of_hot_pages(key._replace(times=True))


class Replayed(NamedTuple):
    number: int  # of the graph, as they were recorded
    rows: set[int]
    num_full: set[int]
    counts: set[int]
    positions: set[int]
    num_items: int


class Recorder:
    """A graph runs its step again from the inputs of then, and notes them."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self.replayed: list[Replayed] = []
        self.num_recorded = 0

    def record(self, run: Callable[[], Drawn]) -> Recorded:
        assert isinstance(run, partial) and isinstance(run.func, MethodType)
        steps, (key,) = run.func.__self__, run.args
        assert isinstance(steps, StepDecoder)
        drawn, number = run(), self.num_recorded
        self.num_recorded += 1

        def replay() -> None:
            inputs = steps._inputs.view(key.size, 1)
            values = (inputs.rows_B, inputs.pages.num_full_B, inputs.pages.count_B)
            rows, num_full, counts = (set(values_B.tolist()) for values_B in values)
            self.replayed.append(
                Replayed(
                    number,
                    rows=rows,
                    num_full=num_full,
                    counts=counts,
                    positions=set(inputs.positions_B.tolist()),
                    num_items=int(inputs.attention.num_items_1),
                )
            )
            for old, new in zip(drawn, run(), strict=True):
                old.copy_(new)

        return Recorded(replay, drawn)

    def settle(self) -> None: ...


def hot_keys(steps: StepDecoder) -> set[GraphKey]:
    return {key for key in steps.graphs._graphs if is_of_hot_pages(key)}


def known_keys(steps: StepDecoder) -> set[GraphKey]:
    assert steps.rule is not None
    return set(steps.rule._overheads)


def untimed(stats: EngineStats) -> EngineStats:
    """A CPU takes its time to copy nothing."""
    return replace(stats, h2d_s=0.0, d2h_s=0.0, copies=())


def test_every_hot_graph_is_timed_with_steps_of_nobody(
    make_spec: MakeSpec, make_steps: MakeSteps
) -> None:
    """They leave no trace. Their inputs are those of so many full pages, on every row."""
    runner = Runner(make_spec(page_size=PAGE, token_budget=256), on_progress=lambda *_: None)
    kv, device = runner.kv, Device(lambda: 1.0)
    recorder = Recorder(torch.device("cpu"))
    meter = make_meter(
        kv.geometry, device, method=SparseMethod.MEAN_KEY, max_pages=65, bytes_per_s=1e9
    )
    steps = make_steps(runner, meter=meter, recorder=recorder)
    runner.steps = steps
    before = untimed(runner.stats())
    steps.record_all(lambda _frac: None)
    sizes = [1, 2, 4, 8]
    keys = hot_keys(steps)
    assert known_keys(steps) == keys
    assert {(key.size, key.in_place) for key in keys} == {
        (size, in_place) for size in sizes for in_place in (False, True)
    }
    groups = [recorder.replayed[i : i + 3] for i in range(0, len(recorder.replayed), 3)]
    assert len(groups) == len(keys)
    for group in groups:
        assert [replayed.num_full for replayed in group] == [{0}, {4}, {64}]
        assert [replayed.counts for replayed in group] == [{0}, {1}, {1}]
        assert [replayed.positions for replayed in group] == [{0}, {4 * PAGE}, {64 * PAGE}]
        assert all(replayed.rows == {kv.tables.spare_row} for replayed in group)
        assert all(replayed.num_items == 0 for replayed in group)
        in_place, few, many = (replayed.number for replayed in group)
        assert in_place < len(sizes) <= few == many, "in place comes first"
    assert untimed(runner.stats()) == before
    assert not kv.tables.window_RLH.any() and not kv.tables.demand_RLH2.any()
    kv.check_integrity()


@pytest.mark.parametrize("alone_s", [0.0, 1e3])
@pytest.mark.parametrize("mixed_s", [0.0, 1e3])
def test_a_mixed_batch_is_judged_by_the_graph_that_it_runs(
    make_spec: MakeSpec, make_steps: MakeSteps, prefill: Prefill, alone_s: float, mixed_s: float
) -> None:
    """A dense request beside a hot one that may select, and that one alone."""
    spec = make_spec(page_size=PAGE, token_budget=256, lane_blocks=40)
    runner = Runner(spec, on_progress=lambda *_: None)
    tokens = [i * i % 199 for i in range(900)]
    methods = (SparseMethod.DENSE, SparseMethod.MEAN_KEY)
    dense, hot = (prefill(runner, tokens, method=method) for method in methods)
    runner.steps = steps = make_steps(runner)
    steps.rule = InPlaceRule(token_bytes=1, summary_bytes=0.0, page_size=PAGE, bytes_per_s=1e6)
    alone, mixed = (
        [steps.row_of(DecodeRow(row=row, token=1, position=900)) for row in rows]
        for rows in ([hot], [dense, hot])
    )
    for rows, cost_s in ((alone, alone_s), (mixed, mixed_s)):
        steps.run([row for row in rows if row], step=1)  # tells what it is
        key = steps.last._replace(times=False)
        steps.rule.learn(key, Overhead(1, cost_s, 2, cost_s))
    assert steps.last.in_place and steps.last.fetches
    for rows, cost_s in ((alone, alone_s), (mixed, mixed_s)):
        chosen = steps.cheapest([row for row in rows if row])
        assert [row.decode.row for row in chosen] == [row.decode.row for row in rows if row]
        assert all(row.in_place for row in chosen) == bool(cost_s)


class OneSecond(Clock):
    """Whatever is done takes a second."""

    def median_s(self, work: Callable[[], object], **_more: Any) -> float:
        work()
        return 1.0


class AheadRunner(Runner):
    """Takes the way of a CUDA device."""

    @property
    def runs_ahead(self) -> bool:
        return True


@pytest.fixture
def make_ahead(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runner]:
    """A runner whose graphs are steps of a CPU."""

    def make(*, always_select: bool = False, enforce_eager: bool = False, **knobs: Any) -> Runner:
        monkeypatch.setattr(assembly, "CudaRecorder", Recorder)
        monkeypatch.setattr(runner_module, "Clock", OneSecond)
        spec = make_spec(page_size=PAGE, token_budget=256, max_num_seqs=2, **knobs)
        spec = replace(spec, always_select=always_select, enforce_eager=enforce_eager)
        return AheadRunner(spec, on_progress=lambda *_: None)

    return make


def steps_of(runner: Runner) -> StepDecoder:
    assert runner.steps is not None
    return runner.steps


def test_an_engine_knows_its_graphs_from_the_start(make_ahead: Callable[..., Runner]) -> None:
    steps = steps_of(make_ahead())
    assert known_keys(steps) == hot_keys(steps) and len(hot_keys(steps)) == 2 * 2
    assert steps_of(make_ahead(always_select=True)).rule is None
    assert not known_keys(steps_of(make_ahead(enforce_eager=True))), "it has no graphs"
    dense = steps_of(make_ahead(sparse_method="dense"))
    assert not known_keys(dense) and not hot_keys(dense), "nothing selects"


def test_steps_made_anew_are_measured_anew(
    make_ahead: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    runner = make_ahead()
    before = steps_of(runner)
    runner.look_ahead(True)
    after = steps_of(runner)
    assert after is not before and after.rule is not before.rule
    assert known_keys(after) == hot_keys(after) == hot_keys(before)


@pytest.mark.parametrize("budget", [512, 300])
def test_another_budget_brings_its_own_overheads(
    make_ahead: Callable[..., Runner], budget: int
) -> None:
    """They are known by the time it is in force, and nothing else has been timed again."""
    runner = make_ahead()
    steps = steps_of(runner)
    assert steps.rule is not None
    before = dict(steps.rule._overheads)
    knobs = replace(runner._spec.knobs, token_budget=budget)
    runner.ask(knobs)
    while runner.readiness < 1.0:
        runner.prepare(idle=True)
    runner.apply(knobs)
    overheads = steps.rule._overheads
    assert {key.pages for key in overheads.keys() - before.keys()} == {budget // PAGE - 1}
    assert {key for key in hot_keys(steps) if key.pages == budget // PAGE - 1} <= set(overheads)
    assert all(overheads[key] is before[key] for key in before)


def test_what_is_timed_between_steps_changes_no_token(
    make_ahead: Callable[..., Runner], make_spec: MakeSpec, prefill: Prefill
) -> None:
    """Of a request that decodes meanwhile, over two tiers; against one whose steps are launched one
    by one."""
    one = Runner(
        make_spec(page_size=PAGE, token_budget=256, max_num_seqs=2, lane_blocks=6),
        on_progress=lambda *_: None,
    )
    other = make_ahead(lane_blocks=6)
    prompt = [i * i % 199 for i in range(900)]
    (row,) = {prefill(runner, prompt) for runner in (one, other)}
    known, knobs = len(known_keys(steps_of(other))), replace(one._spec.knobs, token_budget=512)
    for step in range(30):
        if step == 2:
            other.ask(knobs)
        if other.is_preparing:
            other.prepare(idle=True)
            if other.readiness == 1.0:
                one.apply(knobs)
                other.apply(knobs)
        decode = DecodeRow(row=row, token=step, position=len(prompt) + step)
        expected, got = (r.run(StepPlan(chunks=(), decodes=(decode,))) for r in (one, other))
        torch.testing.assert_close(got.logits_NV, expected.logits_NV, atol=1e-4, rtol=1e-4)
    assert len(known_keys(steps_of(other))) == 2 * known, "all of them while it decoded"
    assert steps_of(other).last.pages == 512 // PAGE - 1
    other.kv.check_integrity()


@given(num_rows=st.integers(2, 40), half_bytes=st.integers(1, 400))
def test_a_rate_is_measured_within_a_buffer(num_rows: int, half_bytes: int) -> None:
    """The rows that are copied lie beside those that are overwritten, and no other changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings, "HALF_BYTES", half_bytes)
        buffer_NX = torch.arange(num_rows * 4, dtype=torch.int32).view(num_rows, 4)
        before = buffer_NX.clone()
        rate = copy_bytes_per_s_within(buffer_NX, OneSecond(CPU))
    count = int(rate) // (2 * 16)
    assert rate == 2 * 16 * count and 1 <= count <= max(1, half_bytes // 16)
    assert count == num_rows // 2 or count * 16 > half_bytes - 16
    assert torch.equal(buffer_NX[count : 2 * count], before[:count])
    rest = [*range(count), *range(2 * count, num_rows)]
    assert torch.equal(buffer_NX[rest], before[rest])
