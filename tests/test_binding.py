"""The arithmetic of the benchmarks that hold the tuner against a grid, a default and a cold start."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from binding_knobs import accepted, interval, line
from cold_start import Sample, below, committed, point, worse_frac
from grid_regret import append, best, cores_of, read_rows, regret, score, share
from hypothesis import given
from hypothesis import strategies as st
from measured_windows import knob_flags
from scaled_daemon import MIN_WINDOW_S, scaled

from sparsed.core import Guard, Slo
from sparsed.tuner.rollout_state import RolloutRule, live_rule


@given(st.lists(st.integers()), st.integers(1, 9))
def test_shares_are_disjoint_and_whole(items: list[int], num_parts: int) -> None:
    parts = [share(items, part=part, num_parts=num_parts) for part in range(num_parts)]
    assert sorted(item for part in parts for item in part) == sorted(items)


@given(st.integers(1, 32), st.integers(1, 32))
def test_workers_never_share_a_core(num_cores: int, num_parts: int) -> None:
    cores = list(range(num_cores))
    if num_parts > num_cores:
        with pytest.raises(ValueError, match="core each"):
            cores_of(cores, part=0, num_parts=num_parts)
        return
    parts = [cores_of(cores, part=part, num_parts=num_parts) for part in range(num_parts)]
    assert len({core for part in parts for core in part}) == num_parts * len(parts[0])


def test_regret_is_of_ratios_of_each_turn() -> None:
    turns = [{"recommended": 8.0, "best": 10.0}, {"recommended": 100.0, "best": 80.0}]
    assert regret(turns) == pytest.approx(0.0)
    assert regret([{"recommended": 9.0, "best": 10.0}]) == pytest.approx(0.1)


def test_a_point_that_failed_once_is_never_the_best() -> None:
    rows: list[dict[str, Any]] = [{"scores": [9.0, None]}, {"scores": [1.0, 3.0]}, {"scores": []}]
    assert score(rows[0]) is None
    assert best(rows) is rows[1]
    with pytest.raises(ValueError, match="no point"):
        best(rows[:1])


def test_rows_that_were_cut_off_are_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    append(file, {"kind": "point", "scores": [1.0]})
    append(file, {"kind": "trial", "scores": [2.0]})
    with file.open("a") as opened:
        opened.write(json.dumps({"kind": "point"})[:-3])
    assert read_rows(file, "point") == [{"kind": "point", "scores": [1.0]}]
    assert read_rows(tmp_path / "none", "point") == []


def samples(*stretches: tuple[int, float, dict[str, int]]) -> list[Sample]:
    rates = [(rate, knobs) for num, rate, knobs in stretches for _ in range(num)]
    return [Sample(float(at), rate, knobs) for at, (rate, knobs) in enumerate(rates)]


def test_time_below_the_incumbent() -> None:
    one, other = {"prefill_chunk": 1}, {"prefill_chunk": 2}
    steady = (40, 100.0, one)
    assert below(samples(steady, (40, 95.0, other)), []) == (0.0, 0.0)
    fallen, tried = below(samples(steady, (20, 10.0, other)), [])
    assert 18 / 60 <= tried == fallen <= 20 / 60
    disturbed, tried = below(samples(steady, (20, 10.0, one)), [])
    assert disturbed > 0.25 and tried == 0.0
    assert below([], []) == (0.0, 0.0)


def test_what_is_committed_is_the_incumbent_from_then_on() -> None:
    one, other = {"prefill_chunk": 1}, {"prefill_chunk": 2}
    seen = samples((40, 100.0, one), (60, 50.0, other), (20, 40.0, one))
    change = {"config_from": one, "config_to": other}
    rollouts = [
        {"at": 40.0, "reason": "committed", "state": "verifying", **change},
        {"at": 20.0, "reason": "canary", "state": "verifying", **change},
    ]
    assert committed(rollouts) == [(40.0, other)]
    back = {"at": 50.0, "reason": "regressed", "state": "reverted", **change}
    assert committed([back, *rollouts]) == [(40.0, other), (50.0, one)]
    share, tried = below(seen, committed(rollouts))
    assert 10 / 120 < tried == share <= 20 / 120
    assert below(seen, [])[0] > 70 / 120


@pytest.mark.parametrize(
    ("hl", "decided_at", "share"),
    [(0.1, 59.0, 0.0), (-0.1, 59.0, 0.0), (-0.2, 59.0, 0.2), (None, 59.0, 0.2), (0.1, 9.0, 0.2)],
)
def test_time_with_worse_candidates(hl: float | None, decided_at: float, share: float) -> None:
    """Half of a test is the candidate's; one without a verdict of its own was worse."""
    change = {"config_from": {"prefill_chunk": 1}, "config_to": {"prefill_chunk": 2}}
    rollouts = [
        {"at": 60.0, "reason": "not_better", **change},
        {"at": 20.0, "reason": "canary", **change},
        {"at": 10.0, "reason": "proposed", **change},
    ]
    decision = {"decided_at": decided_at, "verdict": {"hl": hl}, **change}
    assert worse_frac(rollouts, [decision], seconds=100.0) == pytest.approx(share)
    assert worse_frac(rollouts[1:], [], seconds=100.0) == 0.0, "it has not ended"


def test_grid_points_are_hot_knobs() -> None:
    assert point("max_num_active_seqs=4,hbm_budget=auto") == {
        "max_num_active_seqs": 4,
        "hbm_budget": None,
    }
    with pytest.raises(ValueError, match="hot knobs"):
        point("page_size=8")


@given(st.lists(st.floats(1.0, 1e3), min_size=2, max_size=9), st.floats(0.5, 2.0))
def test_a_constant_gain_is_found_whatever_the_drift(before: list[float], ratio: float) -> None:
    gain, low, high = interval(before, [ratio * value for value in before])
    assert gain == pytest.approx(ratio - 1.0)
    assert math.isclose(low, high, abs_tol=1e-6)


def test_an_interval_holds_its_gain() -> None:
    gain, low, high = interval([10.0, 10.0, 10.0], [11.0, 12.0, 13.0])
    assert low < gain < high
    with pytest.raises(ValueError, match="two pairs"):
        interval([1.0], [1.0])


def test_only_accepted_changes_of_the_knob_count() -> None:
    def decision(state: str, knob: str) -> dict[str, object]:
        return {
            "verdict": {"state": state}, "config_from": {knob: 1}, "config_to": {knob: 2},
        }  # fmt: skip

    rows = [decision("rejected", "a"), decision("accepted", "b"), decision("accepted", "a")]
    assert accepted(rows, "a") is rows[2]
    assert accepted(rows, "c") is None
    assert "no accepted decision among 3" in line(
        {"knob": "c", "decision": None, "decisions": rows}
    )


def test_flags_are_pairs() -> None:
    assert knob_flags(["--kv-hbm-gib", "0.2"]) == {"kv_hbm_gib": "0.2"}
    for bad in (["--a"], ["a", "b"]):
        with pytest.raises(ValueError, match="pairs"):
            knob_flags(bad)


@given(st.floats(1.0, 1e4))
def test_a_scaled_rule_keeps_what_is_no_duration(time_scale: float) -> None:
    rule = scaled(RolloutRule(), time_scale=time_scale, num_pairs=12, explored_frac=0.1)
    assert rule.window_s == max(MIN_WINDOW_S, 60.0 / time_scale)
    assert rule.probation_s == pytest.approx(1800.0 / time_scale)
    assert (rule.max_explored_frac, rule.slo_budget_frac) == (0.1, RolloutRule().slo_budget_frac)
    assert rule.acceptance.num_pairs == 12


def test_latency_within_its_target_is_no_loss_of_a_live_change() -> None:
    assert live_rule(Slo()).acceptance == RolloutRule().acceptance
    targets = live_rule(Slo(ttft_s=2.0, tpot_s=0.1)).acceptance.targets
    assert targets == {Guard.TTFT: 2.0, Guard.TPOT: 0.1}
