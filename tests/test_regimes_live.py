"""The pure parts of the benchmarks of a live daemon, and that short dwells tell their loads apart."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import regimes_live
import revert_time
from hypothesis import given
from hypothesis import strategies as st
from live_load import Load, Phase, Served, judge, parse_load
from regimes_live import CHATS, DOCUMENTS, LOADS, compare, parse_phase, point, verified_regimes
from serving import SNAPSHOT

from sparsed.controller.bench.records import TIMEOUT, RequestRecord, Usage
from sparsed.controller.control import TunerState
from sparsed.core import RolloutReason, RolloutRecord, RolloutState, Slo, TunerMode
from sparsed.profiler.context import ContextMeter
from sparsed.tuner.regimes import Regimes, distance, observe
from sparsed.tuner.rollout_state import live_rule

DWELL_S = 20.0
PHASE_S = 90
OPTIONS = {CHATS: {"max_num_active_seqs": 64}, DOCUMENTS: {"max_num_active_seqs": 1}}


def load_of(name: str, told: str = "") -> Load:
    return parse_load(name, LOADS[name], told)


@given(seed=st.integers(0, 99), seconds=st.floats(1, 60), more_s=st.floats(0, 60))
def test_a_longer_time_begins_with_the_same_requests(
    seed: int, seconds: float, more_s: float
) -> None:
    load = load_of(CHATS, "rate=2,burst=3")
    short, long = (load.requests(item, seed=seed) for item in (seconds, seconds + more_s))
    assert long[: len(short)] == short
    assert len(short) % 3 == 0 and all(one.arrival_s < seconds for one in short)
    assert [one.arrival_s for one in long] == sorted(one.arrival_s for one in long)


def test_requests_come_at_the_rate() -> None:
    for name in LOADS:
        load = load_of(name)
        assert len(load.requests(2000.0, seed=1)) == pytest.approx(2000 * load.rate, rel=0.1)


def test_what_says_nothing_of_a_load_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'ttft'.*'ttft_ms'"):
        load_of(CHATS, "ttft=3")
    with pytest.raises(ValueError, match="page_size"):
        point("page_size=8")
    with pytest.raises(ValueError, match="LOAD:SECONDS"):
        parse_phase("chats", {CHATS: load_of(CHATS)})


def record(arrival_s: float, ttft_s: float, tpot_s: float, error: str | None = None) -> Any:
    return RequestRecord(
        number=0,
        arrival_s=arrival_s,
        input_tokens=10,
        max_tokens=11,
        sent_s=arrival_s,
        first_s=arrival_s + ttft_s,
        last_s=arrival_s + ttft_s + 10 * tpot_s,
        ended_s=arrival_s + ttft_s + 10 * tpot_s,
        usage=Usage(prompt_tokens=10, completion_tokens=11),
        error=error,
    )


def test_a_request_is_good_within_both_targets_and_counts_when_it_came() -> None:
    phase = Phase(load=load_of(CHATS, "ttft_ms=100,tpot_ms=10"), seconds=20.0)
    records = [
        record(100.0, 0.05, 0.005),
        record(101.0, 0.2, 0.005),
        record(112.0, 0.05, 0.02),
        record(113.0, 0.05, 0.005),
        record(114.0, 0.05, 0.005, error=TIMEOUT),
    ]
    served = judge(phase, records, begin_s=100.0)
    assert (served.num_requests, served.num_good, served.share) == (5, 2, 0.4)
    assert served.goodput_per_s == pytest.approx(0.1) and served.errors == {TIMEOUT: 1}
    assert list(served.shares_over_time) == [0.5, 0.333]


def served(load: str, share: float, seconds: float = 10.0) -> Served:
    phase = Phase(load=load_of(load), seconds=seconds)
    empty = judge(phase, [], begin_s=0.0)
    return replace(empty, share=share)


def test_the_oracle_has_the_better_setting_in_each_phase() -> None:
    cells = {
        CHATS: {CHATS: served(CHATS, 1.0), DOCUMENTS: served(DOCUMENTS, 0.4)},
        DOCUMENTS: {CHATS: served(CHATS, 0.0), DOCUMENTS: served(DOCUMENTS, 0.8)},
    }
    live = [served(CHATS, 0.9, seconds=10.0), served(DOCUMENTS, 0.8, seconds=30.0)]
    found = compare(live, cells)
    assert found["oracle"] == {CHATS: 1.0, DOCUMENTS: 0.8}
    assert found["of_oracle"] == pytest.approx((10 * 0.9 + 30 * 1.0) / 40)
    assert found["static"] == {CHATS: pytest.approx(0.625), DOCUMENTS: pytest.approx(0.75)}
    assert found["best_static"] == DOCUMENTS
    assert found["over_static"] == pytest.approx(0.975 / 0.75)
    cells[DOCUMENTS][DOCUMENTS] = cells[CHATS][DOCUMENTS] = served(DOCUMENTS, 0.0)
    assert compare(live, cells)["of_oracle"] is None, "where nothing is in time nothing compares"


def test_settings_that_are_the_same_are_served_once() -> None:
    base = {"max_num_active_seqs": 64, "prefill_chunk": 2048}
    incumbents = {CHATS: dict(base), DOCUMENTS: {**base, "max_num_active_seqs": 1}}
    also = ["max_num_active_seqs=1", "max_num_active_seqs=2"]
    found = regimes_live.settings_of(incumbents, base, also=also)
    assert list(found) == [CHATS, DOCUMENTS, "max_num_active_seqs=2"]
    assert found["max_num_active_seqs=2"] == {**base, "max_num_active_seqs": 2}


def test_steps_are_told_from_the_begin_of_their_phase() -> None:
    phases = [served(CHATS, 1.0), replace(served(DOCUMENTS, 1.0), begin_s=10.0)]
    records = [
        RolloutRecord(
            state=RolloutState.SUCCESS,
            reason=RolloutReason.REGIME_SWITCHED,
            config_from={},
            config_to={"prefill_chunk": 1},
            initiated_by="regime",
            at=at,
        )
        for at in (1013.5, 1002.0, 999.0)
    ]
    state = TunerState(mode=TunerMode.AUTO, num_observations=0, rollouts=tuple(records))
    told = regimes_live.steps(state, phases, began_at=1000.0)
    assert [(one["at_s"], one["load"], one["in_phase_s"]) for one in told] == [
        (2.0, CHATS, 2.0),
        (13.5, DOCUMENTS, 3.5),
    ]


def second(meter: ContextMeter, coming: list[Any], at: float, latency_s: float) -> Any:
    """The context after the second that ends then; answers take ``latency_s``."""
    came = [one for one in coming if at - 1 <= one.arrival_s < at]
    ended = [one for one in coming if at - 1 <= one.arrival_s + latency_s < at]
    return meter.add(
        SNAPSHOT,
        input_tokens=[one.input_tokens for one in came],
        output_tokens=[one.output_tokens for one in ended],
    )


@pytest.mark.parametrize("told", ["", "burst=1,shape=1"], ids=["in pairs", "poisson"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loads_in_turns_are_told_apart_soon_after_a_short_dwell(seed: int, told: str) -> None:
    loads = {CHATS: load_of(CHATS), DOCUMENTS: load_of(DOCUMENTS, told)}
    known = verified_regimes(list(loads.values()), OPTIONS, versions={}, seed=seed)
    assert distance(known[0].centroid, known[1].centroid) > 5
    state, meter, clock = Regimes(known=known), ContextMeter(horizon_s=DWELL_S / 4), count(1)
    coming: list[Any] = []
    for name in (CHATS, DOCUMENTS, CHATS):
        began = at = next(clock)
        coming += [
            replace(one, arrival_s=began + one.arrival_s)
            for one in loads[name].requests(PHASE_S, seed=seed)
        ]
        seen: list[int | None] = []
        while at < began + PHASE_S:
            context = second(meter, coming, float(at), latency_s=1.5)
            state = observe(state, context, at=float(at), dwell_s=DWELL_S)
            seen.append(state.current)
            at = next(clock)
        wanted = 1 + list(loads).index(name)
        assert wanted in seen[: int(1.6 * DWELL_S)], "soon"
        assert set(seen[int(1.6 * DWELL_S) :]) == {wanted}, "and for good"
    assert len(state.known) == 2, "what lies between them is no load of its own"


def test_a_hasty_rule_trips_as_every_rule_does() -> None:
    usual = live_rule(Slo())
    hasty = revert_time.hasty_rule(usual)
    for name in ("max_queue_growth", "hbm_soft_frac", "apply_s", "max_gap_s", "acceptance"):
        assert getattr(hasty, name) == getattr(usual, name)


def test_reverts_are_read_from_the_log() -> None:
    log = "INFO tuner: undone in 0.250 s (queue_growth)\nINFO tuner: undone in 1.5 s (killed)\n"
    found = revert_time.reverts(log)
    assert [one["reason"] for one in found] == ["queue_growth", "killed"]
    assert revert_time.summary(found[:1]) == {
        "num_reverts": 1,
        "median_s": 0.25,
        "max_s": 0.25,
        "target_s": 1.0,
        "is_met": True,
    }
    assert not revert_time.summary(found)["is_met"]
    assert not revert_time.summary([])["is_met"], "nothing measured is nothing met"
