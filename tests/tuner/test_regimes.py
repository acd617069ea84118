"""Which kind of load it is: no haste, no noise, no regime from nothing."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsed.core import WorkloadContext
from sparsed.tuner.regimes import (
    FIRST_FRAC,
    MAX_REGIMES,
    MIN_REQUESTS,
    Regimes,
    distance,
    observe,
    place_of,
    with_incumbent,
)

DWELL_S = 20.0
CHAT = WorkloadContext(
    span_s=60.0,
    num_requests=60,
    requests_per_s=1.0,
    input_tokens_p50=500.0,
    input_tokens_p95=900.0,
    output_tokens_p50=200.0,
    output_tokens_p95=400.0,
)
DOCUMENTS = replace(CHAT, requests_per_s=0.2, input_tokens_p50=16_000.0, input_tokens_p95=30_000.0)
SILENT = WorkloadContext(span_s=60.0, num_requests=0)


class Daemon:
    """Contexts, one a second; remembers when the regime in force changed."""

    def __init__(self, state: Regimes | None = None) -> None:
        self.state = state or Regimes()
        self.at = 1000.0
        self.changes: list[float] = []

    def see(self, context: WorkloadContext | None, *, dt_s: float = 1.0) -> None:
        self.at += dt_s
        before = self.state.current
        self.state = observe(self.state, context, at=self.at, dwell_s=DWELL_S)
        if self.state.current != before:
            self.changes.append(self.at)

    def serve(self, context: WorkloadContext | None, seconds: float) -> None:
        for _ in range(int(seconds)):
            self.see(context)


figures = st.one_of(
    st.none(),
    st.sampled_from([math.nan, math.inf, 0.0, -1.0]),
    st.floats(min_value=1e-3, max_value=1e6),
)
contexts = st.one_of(
    st.none(),
    st.sampled_from([CHAT, DOCUMENTS, SILENT]),
    st.builds(
        WorkloadContext,
        span_s=st.just(60.0),
        num_requests=st.integers(0, 100),
        requests_per_s=figures,
        input_tokens_p50=figures,
        input_tokens_p95=figures,
        output_tokens_p50=figures,
        output_tokens_p95=figures,
    ),
)
steps = st.lists(
    st.tuples(contexts, st.floats(-2.0, 40.0), st.integers(1, 40)), min_size=1, max_size=12
)


@given(steps)
def test_no_sequence_of_contexts_switches_faster_than_the_dwell(
    sequence: list[tuple[WorkloadContext | None, float, int]],
) -> None:
    daemon = Daemon()
    for context, dt_s, repeats in sequence:
        for _ in range(repeats):
            daemon.see(context, dt_s=dt_s)
    gaps = [after - before for before, after in pairwise(daemon.changes)]
    assert all(gap >= DWELL_S - 1e-6 for gap in gaps)
    ids = [regime.regime_id for regime in daemon.state.known]
    assert len(ids) == len(set(ids)) <= MAX_REGIMES
    assert daemon.state.current is None or daemon.state.current in ids
    for regime in daemon.state.known:
        assert all(math.isfinite(value) for value in regime.centroid.values())


@given(steps, st.sampled_from([CHAT, DOCUMENTS]))
def test_whatever_came_before_a_stable_load_ends_in_one_regime(
    sequence: list[tuple[WorkloadContext | None, float, int]], stable: WorkloadContext
) -> None:
    daemon = Daemon()
    for context, dt_s, repeats in sequence:
        for _ in range(min(repeats, 5)):
            daemon.see(context, dt_s=abs(dt_s))
    daemon.serve(stable, 4 * DWELL_S)
    settled = daemon.state.current
    daemon.changes.clear()
    daemon.serve(stable, 10 * DWELL_S)
    assert settled is not None and daemon.state.current == settled
    assert daemon.changes == [] and daemon.state.elsewhere is None


def test_two_loads_are_two_regimes_and_are_known_again() -> None:
    daemon = Daemon()
    for _ in range(3):
        for load in (CHAT, DOCUMENTS):
            daemon.serve(load, 3 * DWELL_S)
    assert [regime.regime_id for regime in daemon.state.known] == [1, 2]
    assert len(daemon.changes) == 6 and daemon.state.current == 2
    chat, documents = daemon.state.known
    for load, regime in ((CHAT, chat), (DOCUMENTS, documents)):
        place = place_of(load)
        assert place is not None and distance(place, regime.centroid) < 0.1
    assert "prompts of 500 (p95 900)" in chat.signature and "16k" in documents.signature


def test_noise_is_no_other_load() -> None:
    daemon, draw = Daemon(), random.Random(0)

    def noisy(value: float | None) -> float:
        return (value or 0.0) * 2 ** draw.gauss(0.0, 0.4)

    for _ in range(50 * int(DWELL_S)):
        daemon.see(
            replace(
                CHAT,
                requests_per_s=noisy(CHAT.requests_per_s),
                input_tokens_p50=noisy(CHAT.input_tokens_p50),
                input_tokens_p95=noisy(CHAT.input_tokens_p95),
                output_tokens_p50=noisy(CHAT.output_tokens_p50),
            )
        )
    assert len(daemon.state.known) == 1 and len(daemon.changes) == 1


def test_a_visit_shorter_than_the_dwell_changes_nothing() -> None:
    daemon = Daemon()
    daemon.serve(CHAT, 3 * DWELL_S)
    for _ in range(10):
        daemon.serve(DOCUMENTS, DWELL_S - 2)
        assert daemon.state.elsewhere is not None
        daemon.serve(CHAT, 2)
    assert daemon.state.current == 1 and len(daemon.state.known) == 1


@pytest.mark.parametrize(
    "context",
    [
        None,
        SILENT,
        replace(CHAT, num_requests=MIN_REQUESTS - 1),
        replace(CHAT, requests_per_s=math.nan),
        replace(DOCUMENTS, input_tokens_p50=None),
    ],
)
def test_what_says_too_little_holds(context: WorkloadContext | None) -> None:
    daemon = Daemon()
    daemon.serve(CHAT, 3 * DWELL_S)
    daemon.serve(DOCUMENTS, DWELL_S / 2)
    before = daemon.state
    daemon.serve(context, 5 * DWELL_S)
    assert replace(daemon.state, at=before.at) == before


def test_a_regime_is_known_soon_after_a_restart() -> None:
    daemon = Daemon()
    daemon.serve(CHAT, 3 * DWELL_S)
    daemon.serve(DOCUMENTS, 3 * DWELL_S)
    again = Daemon(Regimes(known=daemon.state.known))
    again.serve(CHAT, FIRST_FRAC * DWELL_S + 2)
    assert again.state.current == 1 and len(again.state.known) == 2


def test_the_least_missed_gives_way() -> None:
    daemon = Daemon()
    for number in range(MAX_REGIMES):
        load = replace(CHAT, input_tokens_p50=10.0 * 16**number)
        daemon.serve(load, 2 * DWELL_S)
        if number < 2:
            daemon.state = with_incumbent(
                daemon.state, {"token_budget": 512}, at=daemon.at, versions={}
            )
    assert len(daemon.state.known) == MAX_REGIMES
    daemon.serve(replace(CHAT, requests_per_s=1e5), 2 * DWELL_S)
    ids = [regime.regime_id for regime in daemon.state.known]
    assert ids == [1, 2, *range(4, MAX_REGIMES + 2)], "the oldest without an incumbent went"
