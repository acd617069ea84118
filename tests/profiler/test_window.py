"""Windows: rates from differences, restarts, staleness, percentiles."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsed.core import (
    CopyPath,
    CopyTotal,
    Direction,
    EngineStats,
    RefusalCount,
    RefusalReason,
    Snapshot,
    WaitCount,
    WaitingRequest,
    WaitReason,
)
from sparsed.profiler.counters import COUNTERS, advance
from sparsed.profiler.span import percentile
from sparsed.profiler.window import Window


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def window(clock: Clock) -> Window:
    return Window(clock=clock)


def close(window: Window, clock: Clock, stats: EngineStats, *, after_s: float = 1.0) -> Snapshot:
    clock.now_s += after_s
    snapshot = window.close(stats, ended_at=clock.now_s)
    assert snapshot is not None
    return snapshot


def test_rates_are_growth_over_the_time_between_reports(window: Window, clock: Clock) -> None:
    first = EngineStats(steps=10, generated_tokens=40, prompt_tokens=100, h2d_bytes=0)
    close(window, clock, first)
    second = replace(
        first,
        steps=14,
        generated_tokens=56,
        prompt_tokens=150,
        hot_hits=30,
        hot_misses=10,
        h2d_bytes=4_000_000_000,
        h2d_s=0.5,
        recall_sum=1.8,
        recall_samples=2,
        num_running=3,
        hot_used_bytes=1,
        hot_total_bytes=4,
        working_set_pages=6,
        working_set_bytes=600,
        metadata_bytes=50,
        step_s=1.5,
        exposed_s=0.2,
        timed_steps=2,
        waiting=tuple(
            WaitingRequest(request_id=name, reason=reason, waited_s=1.0)
            for name, reason in (
                ("a", WaitReason.TURN),
                ("b", WaitReason.LINK),
                ("c", WaitReason.LINK),
            )
        ),
    )
    snapshot = close(window, clock, second, after_s=2.0)
    assert snapshot.window_s == 2.0
    assert snapshot.steps == 4
    assert snapshot.generated_tokens_per_s == 8.0
    assert snapshot.prompt_tokens_per_s == 25.0
    assert snapshot.hot_hit_frac == 0.75
    assert snapshot.selected_pages_per_step == 10.0
    assert (snapshot.step_s, snapshot.exposed_s_per_step) == (1.5, 0.1)
    assert snapshot.waiting == (
        WaitCount(reason=WaitReason.LINK, count=2),
        WaitCount(reason=WaitReason.TURN, count=1),
    )
    assert snapshot.misses_per_step == 2.5
    assert snapshot.miss_bytes_per_step == 1e9
    assert (snapshot.working_set_pages, snapshot.working_set_bytes) == (6, 600)
    assert snapshot.metadata_bytes == 50
    assert snapshot.h2d_gb_per_s == 8.0
    assert snapshot.attention_recall == pytest.approx(0.9)
    assert snapshot.recall_samples == second.recall_samples
    assert (snapshot.num_running, snapshot.hot_used_frac) == (3, 0.25)


def test_an_idle_window_has_no_figures(window: Window, clock: Clock) -> None:
    snapshot = close(window, clock, EngineStats())
    assert snapshot.generated_tokens_per_s == 0.0
    for name in (
        *("step_p50_s", "hot_hit_frac", "misses_per_step", "miss_bytes_per_step"),
        *("h2d_gb_per_s", "ttft_p50_s"),
    ):
        assert getattr(snapshot, name) is None


def test_a_restarted_engine_adds_what_it_counted_itself(window: Window, clock: Clock) -> None:
    close(window, clock, EngineStats(steps=1000, generated_tokens=5000))
    snapshot = close(window, clock, EngineStats(steps=3, generated_tokens=7))
    assert (snapshot.steps, snapshot.generated_tokens_per_s) == (3, 7.0)
    assert (window.totals.steps, window.totals.generated_tokens) == (1003, 5007)


def test_a_window_too_short_is_carried_into_the_next(window: Window, clock: Clock) -> None:
    close(window, clock, EngineStats(steps=1))
    clock.now_s += 0.001
    early = EngineStats(steps=5, recent_step_s=(0.5,))
    assert window.close(early, ended_at=0.0) is None
    snapshot = close(window, clock, EngineStats(steps=6, recent_step_s=(0.1,)), after_s=0.999)
    assert snapshot.steps == 5
    assert snapshot.step_p50_s == pytest.approx(0.3)
    assert snapshot.window_s == pytest.approx(1.0)


def test_values_older_than_three_intervals_are_dropped(window: Window, clock: Clock) -> None:
    assert window.latest() is None
    snapshot = close(window, clock, EngineStats(steps=1))
    clock.now_s += 3.0
    assert window.latest() is snapshot
    clock.now_s += 0.1
    assert window.latest() is None


def test_requests_count_in_the_window_they_finish_in(window: Window, clock: Clock) -> None:
    for ttft_s, tpot_s in ((0.1, 0.01), (0.3, None), (0.2, 0.03)):
        window.observe_request(ttft_s=ttft_s, tpot_s=tpot_s, output_tokens=8)
    snapshot = close(window, clock, EngineStats(requests_finished=3))
    assert snapshot.ttft_p50_s == pytest.approx(0.2)
    assert snapshot.tpot_p50_s == pytest.approx(0.02)
    assert close(window, clock, EngineStats(requests_finished=3)).ttft_p50_s is None


def test_every_counter_of_the_engine_is_carried() -> None:
    gauges = {
        *("num_running", "num_waiting", "hot_used_bytes", "hot_total_bytes"),
        *("dram_used_bytes", "dram_total_bytes", "recent_step_s", "knobs"),
        *("working_set_pages", "working_set_bytes", "metadata_bytes", "hbm_peak_bytes"),
        *("num_spilled", "waiting", "recent_quality", "applying"),
    }
    names = {item.name for item in dataclasses.fields(EngineStats)}
    assert names == gauges | set(COUNTERS) | {"copies", "waits", "refusals"}


def copied(path: CopyPath, num_bytes: int, seconds: float = 0.0) -> CopyTotal:
    return CopyTotal(direction=Direction.H2D, path=path, num_bytes=num_bytes, seconds=seconds)


def test_copies_of_every_way_are_carried_over_a_restart(window: Window, clock: Clock) -> None:
    kernel, engine = CopyPath.KERNEL, CopyPath.COPY_ENGINE
    close(window, clock, EngineStats(steps=9, copies=(copied(kernel, 100, 1.0),)))
    close(window, clock, EngineStats(steps=12, copies=(copied(kernel, 150, 1.5),)))
    assert window.totals.copies == (copied(kernel, 150, 1.5),)
    after = EngineStats(steps=1, copies=(copied(engine, 7), copied(kernel, 20, 0.25)))
    close(window, clock, after)
    assert set(window.totals.copies) == {copied(engine, 7), copied(kernel, 170, 1.75)}


def test_reasons_are_carried_over_a_restart(window: Window, clock: Clock) -> None:
    def waited(reason: WaitReason, count: int) -> WaitCount:
        return WaitCount(reason=reason, count=count)

    link, turn = WaitReason.LINK, WaitReason.TURN
    refused = RefusalCount(reason=RefusalReason.INVALID, count=2)
    close(window, clock, EngineStats(steps=9, waits=(waited(link, 3),), refusals=(refused,)))
    close(window, clock, EngineStats(steps=12, waits=(waited(link, 5),), refusals=(refused,)))
    assert window.totals.waits == (waited(link, 5),)
    after = EngineStats(steps=1, waits=(waited(turn, 7), waited(link, 1)))
    close(window, clock, after)
    assert set(window.totals.waits) == {waited(turn, 7), waited(link, 6)}
    assert window.totals.refusals == (refused,)


counts = st.integers(min_value=0, max_value=1 << 40)
reports = st.builds(EngineStats, steps=counts, h2d_bytes=counts, d2h_bytes=counts)


@given(st.lists(reports, min_size=1, max_size=20))
def test_totals_never_go_back_and_never_lose_a_report(sequence: list[EngineStats]) -> None:
    totals = before = EngineStats()
    for now in sequence:
        grown = advance(totals, before=before, now=now)
        assert all(getattr(grown, name) >= getattr(totals, name) for name in COUNTERS)
        assert grown.steps >= now.steps
        totals, before = grown, now


@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=50), st.integers(1, 99))
def test_percentiles_agree_with_the_standard_library(values: list[float], percent: int) -> None:
    expected = statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
    assert percentile(sorted(values), percent / 100) == pytest.approx(expected)
