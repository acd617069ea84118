"""How long fetches take: a clock that is set, copies in graphs, and real steps of a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsed.core import CopyPath, Direction
from sparsed.engine.batch import DecodeRow, StepPlan
from sparsed.engine.fetch_times import UNTIMED, TimedStep
from sparsed.engine.kvcache import streams
from sparsed.engine.kvcache.totals import Totals
from sparsed.engine.runner import Runner
from sparsed.engine.step_decoder import StepDecoder

MakeRunner = Callable[..., Runner]
MakeSteps = Callable[..., StepDecoder]
Prefill = Callable[..., int]

CPU = torch.device("cpu")
LOAD = (Direction.H2D, CopyPath.KERNEL)
LENGTH = 700
PROMPT = [i * i % 199 for i in range(LENGTH)]
STEPS = 6


# -- a step --------------------------------------------------------------------------------------

moments = st.integers(0, 1000)


@given(
    fetches=st.lists(st.tuples(moments, moments, moments, st.integers(0, 9)), min_size=1),
    begin=st.integers(-5, 10**9),
)
def test_what_waits_for_a_fetch_waits_for_its_end(
    fetches: list[tuple[int, int, int, int]], begin: int
) -> None:
    clock = SimpleNamespace(now_s=float(begin), perf_counter=lambda: clock.now_s)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "time", clock)
        step = TimedStep(CPU)
        assert not step.has_fetches
        for start, duration, need, count in fetches:
            fetch = step.fetch()
            clock.now_s = begin + need
            fetch.is_needed()
            clock.now_s = begin + start
            fetch.starts()
            clock.now_s = begin + start + duration
            fetch.ends(torch.tensor([count], dtype=torch.int32))
    assert step.has_fetches and int(step.num_pages()) == sum(count for *_, count in fetches)
    under_way, exposed = step.seconds()
    assert under_way == sum(duration for _, duration, _, _ in fetches)
    assert exposed == sum(max(0, start + duration - need) for start, duration, need, _ in fetches)


def test_nobody_looks_at_the_clock_of_an_untimed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "time", None)
    fetch = UNTIMED.fetch()
    fetch.is_needed()
    fetch.starts()
    fetch.ends(torch.ones(1))


# -- copies in graphs ----------------------------------------------------------------------------

events = st.one_of(
    st.tuples(st.just("copied"), st.integers(0, 10**9)),
    st.tuples(st.just("timed"), st.integers(0, 10**6)),
    st.tuples(st.just("read"), st.just(0)),
)


def in_graphs(patch: pytest.MonkeyPatch) -> Totals:
    totals = Totals(device=CPU)
    patch.setattr(totals, "_is_capturing", lambda: True)
    return totals


def read(totals: Totals) -> tuple[int, float]:
    return totals.read().get(LOAD, (0, 0.0))


@given(happened=st.lists(events), bytes_per_s=st.sampled_from([0.5, 4.0, 2.0**30]))
def test_copies_in_graphs_are_as_fast_as_timed_ones(
    happened: list[tuple[str, int]], bytes_per_s: float
) -> None:
    """Until something was timed they have no seconds; then all have, and those before too."""
    with pytest.MonkeyPatch.context() as patch:
        totals = in_graphs(patch)
        copied = timed = 0
        for kind, number in [*happened, ("read", 0)]:
            if kind == "copied":
                totals.add(LOAD, torch.tensor(number), piece_bytes=3)
                copied += 3 * number
            elif kind == "timed":
                totals.add_timed(LOAD, number, seconds=number / bytes_per_s)
                timed += number
            else:
                num_bytes, seconds = read(totals)
                assert num_bytes == copied
                assert seconds == pytest.approx(copied / bytes_per_s if timed else 0.0)


@given(
    happened=st.lists(st.tuples(events, st.floats(0, 1e3))),
)
def test_seconds_never_go_back(happened: list[tuple[tuple[str, int], float]]) -> None:
    """Whatever the samples say, also those of no page: who reads would take it for a restart."""
    with pytest.MonkeyPatch.context() as patch:
        totals, before_s = in_graphs(patch), 0.0
        for (kind, number), seconds in happened:
            if kind == "copied":
                totals.add(LOAD, torch.tensor(number), piece_bytes=1)
            elif kind == "timed":
                totals.add_timed(LOAD, number, seconds=seconds)
            _, now_s = read(totals)
            assert now_s >= before_s
            before_s = now_s


def test_only_copies_in_graphs_are_estimated() -> None:
    totals = Totals(device=CPU)
    totals.add(LOAD, torch.tensor(7), piece_bytes=10)
    totals.add_timed(LOAD, 70, seconds=2.0)
    assert read(totals) == (70, 0.0)


# -- steps ---------------------------------------------------------------------------------------


def decode(runner: Runner, row: int, *, steps: int = STEPS) -> float:
    """Seconds of these steps."""
    started_s = time.perf_counter()
    for turn in range(steps):
        one = DecodeRow(row=row, token=7 * turn, position=LENGTH + turn)
        runner.run(StepPlan(chunks=(), decodes=(one,)))
    return time.perf_counter() - started_s


@pytest.mark.parametrize("way", ["eager", "queued", "looks ahead"])
def test_on_a_cpu_attention_stands_still_for_every_fetch(
    make_runner: MakeRunner, make_steps: MakeSteps, way: str, prefill: Prefill
) -> None:
    runner = make_runner(page_size=8, token_budget=256, lane_blocks=4)
    row = prefill(runner, PROMPT, output=60)
    if way != "eager":
        runner.steps = make_steps(runner, looks_ahead=way == "looks ahead")
    before = runner.stats()
    assert (before.timed_steps, before.exposed_s) == (0, 0.0), "prompts fetch for nobody"
    step_s = decode(runner, row)
    stats = runner.stats()
    assert stats.timed_steps == STEPS and stats.hot_misses > 0
    assert 0 < stats.h2d_s - before.h2d_s < stats.exposed_s < step_s


@pytest.mark.parametrize("queued", [False, True])
def test_one_step_in_some_is_timed(
    make_runner: MakeRunner, make_steps: MakeSteps, queued: bool, prefill: Prefill
) -> None:
    runner = make_runner(page_size=8, token_budget=256, lane_blocks=4)
    row = prefill(runner, PROMPT, output=60)
    runner.steps = make_steps(runner) if queued else None
    runner.fetch_times.stride = 5
    decode(runner, row, steps=11)  # the prompt was step 1
    assert runner.stats().timed_steps == 2


def test_steps_that_cannot_fetch_are_not_timed(
    make_runner: MakeRunner, make_steps: MakeSteps, prefill: Prefill
) -> None:
    runner = make_runner(page_size=8, token_budget=256, lane_blocks=40)
    row = prefill(runner, PROMPT, output=60)
    runner.steps = make_steps(runner)
    decode(runner, row)
    stats = runner.stats()
    assert (stats.timed_steps, stats.exposed_s) == (0, 0.0)
    assert stats.hot_hits > 0 == stats.hot_misses
