"""One suite over every store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from sparsed.core import (
    AcceptanceDecision,
    AcceptanceRule,
    AcceptanceVerdict,
    AcceptanceWindow,
    CopyPath,
    Decision,
    DecisionReason,
    DecisionState,
    Direction,
    Guard,
    InputError,
    LinkCalibration,
    LinkEntry,
    LinkKey,
    LinkProbe,
    Objective,
    Profile,
    ProfileKey,
    ProfileStatus,
    Slo,
    Snapshot,
    TrialResult,
    TrialStatus,
    WindowStage,
    Workload,
    WorkloadRequest,
)
from sparsed.db import open_store
from sparsed.db.memory import InMemoryProfileStore
from sparsed.db.rollup import HOUR_S, MAX_DECISIONS, MINUTE_S, RETENTION_S
from sparsed.db.store import Store, StoreError, Study

KEY = ProfileKey(hardware="cpu:x:2:4GiB", model="tiny", dtype="float32")
OTHER_KEY = ProfileKey(hardware="gpu:y:80GiB", model="tiny", dtype="float32")
WORKLOAD = Workload(
    name="chat", requests=(WorkloadRequest(arrival_s=0.5, input_tokens=64, output_tokens=8),)
)


@pytest.fixture(params=["memory", "sql"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Store]]:
    """Opens the same store again, as the next process would."""
    if request.param == "memory":
        memory = InMemoryProfileStore()
        yield lambda: memory
        return
    opened: list[Store] = []

    def open_again() -> Store:
        opened.append(open_store(tmp_path / "sparsed.db"))
        return opened[-1]

    yield open_again
    for store in opened:
        store.close()


def make_profile(**changes: Any) -> Profile:
    profile = Profile(
        key=KEY,
        values={"token_budget": 1024, "hbm_budget": None, "kv_hbm_gib": 0.5},
        status=ProfileStatus.VERIFIED,
        workload="chat",
        objective=Objective.THROUGHPUT,
        default_scores=(10.0, 11.0),
        winner_scores=(12.0, 13.0),
        versions={"torch": "2.13.0"},
        created_at=1000.5,
    )
    return replace(profile, **changes)


def make_trial(number: int, **changes: Any) -> TrialResult:
    trial = TrialResult(
        number=number,
        arm="bayes",
        values={"page_size": 16, "token_budget": 512},
        status=TrialStatus.OK,
        score=3.5,
        spread_frac=0.02,
        metrics={"ttft_p95_s": 0.25, "errors": 0.0},
        device="cuda:1",
        started_at=1.0,
        ended_at=2.0,
    )
    return replace(trial, **changes)


def make_snapshot(ended_at: float, *, recall: float | None = 0.9) -> Snapshot:
    return Snapshot(
        ended_at=ended_at,
        window_s=1.0,
        steps=10,
        step_p50_s=0.1,
        step_p95_s=0.2,
        step_p99_s=0.3,
        prompt_tokens_per_s=0.0,
        generated_tokens_per_s=ended_at % 60,
        hot_hit_frac=0.9,
        misses_per_step=16.0,
        miss_bytes_per_step=10.0,
        h2d_bytes=100,
        d2h_bytes=10,
        h2d_gb_per_s=1.0,
        d2h_gb_per_s=1.0,
        attention_recall=recall,
        num_running=1,
        num_waiting=0,
        hot_used_frac=0.5,
        dram_used_frac=0.1,
        working_set_pages=640,
        working_set_bytes=640 << 12,
        metadata_bytes=4096,
        requests_finished=0,
    )


def start_study(store: Store, *, key: ProfileKey = KEY, seed: int = 0) -> int:
    return store.start_study(
        key,
        workload=WORKLOAD,
        objective=Objective.THROUGHPUT,
        slo=Slo(ttft_s=1.0),
        seed=seed,
        space={"token_budget": [512, 1024]},
        versions={"torch": "2.13.0"},
        started_at=1.0,
    )


def test_profile_survives_reopening(reopen: Callable[[], Store]) -> None:
    saved = reopen().save_profile(make_profile())
    assert saved.profile_id is not None
    assert saved == make_profile(profile_id=saved.profile_id)
    assert reopen().list_profiles() == (saved,)
    assert reopen().list_profiles(OTHER_KEY) == ()


def test_find_verified_prefers_the_pin_then_the_newest(reopen: Callable[[], Store]) -> None:
    store = reopen()
    assert store.find_verified(KEY) is None
    old = store.save_profile(make_profile(created_at=1.0))
    new = store.save_profile(make_profile(created_at=2.0))
    draft = store.save_profile(make_profile(status=ProfileStatus.DRAFT))
    store.save_profile(make_profile(key=OTHER_KEY))
    assert store.find_verified(KEY) == new
    assert store.pin(draft.profile_id or 0).pinned
    assert store.pin(old.profile_id or 0) == replace(old, pinned=True)
    assert store.find_verified(KEY) == replace(old, pinned=True)
    assert [item.pinned for item in store.list_profiles(KEY)] == [False, False, True]


def test_saving_a_pinned_profile_takes_over_the_pin(reopen: Callable[[], Store]) -> None:
    store = reopen()
    store.save_profile(make_profile(pinned=True))
    second = store.save_profile(make_profile(pinned=True, values={"token_budget": 512}))
    assert store.find_verified(KEY) == second
    assert sum(item.pinned for item in store.list_profiles(KEY)) == 1


def test_a_stale_profile_is_taken_only_if_it_is_pinned(reopen: Callable[[], Store]) -> None:
    store = reopen()
    old, new = (store.save_profile(make_profile(created_at=at)) for at in (1.0, 2.0))
    store.mark_stale(new.profile_id or 0)
    assert store.find_verified(KEY) == old
    assert store.list_profiles(KEY)[0].status is ProfileStatus.STALE
    store.pin(new.profile_id or 0)
    found = store.find_verified(KEY)
    assert found is not None and found.profile_id == new.profile_id


def test_pin_of_an_unknown_profile_names_it(reopen: Callable[[], Store]) -> None:
    with pytest.raises(InputError, match="no profile 7"):
        reopen().pin(7)


def test_numpy_scalars_become_plain(reopen: Callable[[], Store]) -> None:
    store = reopen()
    values = {"token_budget": numpy.int64(512), "sparse_method": numpy.str_("quest")}
    saved = store.save_profile(
        make_profile(values=values, winner_scores=(numpy.float64(2.5),))  # type: ignore[arg-type]
    )
    assert [type(value) for value in saved.values.values()] == [str, int]
    assert json.dumps(dict(saved.values)) == '{"sparse_method": "quest", "token_budget": 512}'
    assert type(saved.winner_scores[0]) is float


def test_a_score_that_is_not_a_number_is_a_defect(reopen: Callable[[], Store]) -> None:
    with pytest.raises(AssertionError, match="nan"):
        reopen().save_profile(make_profile(winner_scores=(float("nan"),)))
    assert reopen().list_profiles() == ()


def test_trials_round_trip_by_study_and_by_key(reopen: Callable[[], Store]) -> None:
    store = reopen()
    first, second = start_study(store), start_study(store, key=OTHER_KEY)
    failed = make_trial(
        1, status=TrialStatus.OUT_OF_MEMORY, score=None, spread_frac=None, metrics={}, reason="big"
    )
    store.record_trial(first, make_trial(0))
    store.record_trial(first, failed)
    store.record_trial(second, make_trial(0))
    assert reopen().list_trials(study_id=first) == (make_trial(0), failed)
    assert reopen().list_trials(key=OTHER_KEY) == (make_trial(0),)
    assert len(reopen().list_trials()) == 3


def test_a_trial_number_is_taken_once(reopen: Callable[[], Store]) -> None:
    store = reopen()
    study = start_study(store)
    store.record_trial(study, make_trial(0))
    with pytest.raises(StoreError):
        store.record_trial(study, make_trial(0, score=9.0))
    with pytest.raises(StoreError):
        store.record_trial(study + 1, make_trial(1))
    assert store.list_trials(study_id=study) == (make_trial(0),)


def test_find_study_wants_the_same_question(reopen: Callable[[], Store]) -> None:
    store = reopen()
    start_study(store, seed=1)
    newest = start_study(store, seed=1)
    slo = Slo(ttft_s=1.0)
    question = {"workload": "chat", "objective": Objective.THROUGHPUT, "slo": slo, "seed": 1}

    def find(key: ProfileKey = KEY, **changes: Any) -> Study | None:
        return reopen().find_study(key, **(question | changes))  # type: ignore[arg-type]

    study = Study(
        study_id=newest,
        key=KEY,
        workload=WORKLOAD,
        objective=Objective.THROUGHPUT,
        slo=slo,
        seed=1,
        space={"token_budget": [512, 1024]},
    )
    assert find() == reopen().get_study(newest) == study
    with pytest.raises(InputError, match="no study 99"):
        reopen().get_study(99)
    assert find(OTHER_KEY) is None
    assert find(seed=2) is None
    assert find(slo=Slo(ttft_s=2.0)) is None
    assert find(objective=Objective.GOODPUT) is None
    assert find(workload="mixed") is None


def test_minutes_and_hours_are_rolled_up(reopen: Callable[[], Store]) -> None:
    store = reopen()
    for second in range(HOUR_S + 1):
        store.record_snapshot(KEY, make_snapshot(float(second), recall=None))
    minutes = reopen().list_rollups(KEY, period_s=MINUTE_S)
    rates = [item for item in minutes if item.metric == "generated_tokens_per_s"]
    assert len(rates) == 60
    assert (rates[0].num_samples, rates[0].mean, rates[0].p50, rates[0].p95) == (60, 29.5, 30, 57)
    assert "attention_recall" not in {item.metric for item in minutes}
    hours = reopen().list_rollups(KEY, period_s=HOUR_S)
    assert {item.num_samples for item in hours} == {HOUR_S}
    assert reopen().list_rollups(OTHER_KEY, period_s=HOUR_S) == ()


def test_old_rollups_are_dropped(reopen: Callable[[], Store]) -> None:
    store = reopen()
    later = RETENTION_S[MINUTE_S] + 10 * MINUTE_S
    for ended_at in (0.0, MINUTE_S * 1.0, later, later + MINUTE_S):
        store.record_snapshot(KEY, make_snapshot(ended_at))
    started = {item.started_at for item in store.list_rollups(KEY, period_s=MINUTE_S)}
    assert started == {later}
    assert {item.started_at for item in store.list_rollups(KEY, period_s=HOUR_S)} == {0.0}


def test_decisions_are_kept_newest_first_and_bounded(reopen: Callable[[], Store]) -> None:
    store = reopen()
    decision = Decision(
        made_at=0.0,
        values={"token_budget": 512},
        reason="r",
        predicted_score=1.5,
        current_score=None,
    )
    store.record_decision(OTHER_KEY, decision)
    for second in range(MAX_DECISIONS):
        store.record_decision(KEY, replace(decision, made_at=float(second)))
    kept = reopen().list_decisions(KEY)
    assert (len(kept), kept[0].made_at, kept[-1]) == (MAX_DECISIONS, 999.0, decision)
    assert reopen().list_decisions(OTHER_KEY) == ()


# decisions


def make_window(number: int, **changes: Any) -> AcceptanceWindow:
    window = AcceptanceWindow(
        number=number,
        stage=WindowStage.TEST,
        round=number // 2,
        order=6 + number // 2,
        values={"token_budget": 1024 << number % 2, "hbm_budget": None},
        status=TrialStatus.OK,
        metrics={"goodput_requests_per_s": 1.0 / 3.0, "quality": None},
        started_at=1.0,
        ended_at=2.0,
    )
    return replace(window, **changes)


def make_acceptance(**changes: Any) -> AcceptanceDecision:
    decision = AcceptanceDecision(
        key=KEY,
        config_from={"token_budget": 1024, "hbm_budget": None},
        config_to={"token_budget": 2048, "hbm_budget": None},
        rule=AcceptanceRule(
            guards=(Guard.TPOT, Guard.ERRORS), targets={Guard.TPOT: 0.05}, num_pairs=16
        ),
        verdict=AcceptanceVerdict(
            state=DecisionState.REJECTED,
            reason=DecisionReason.TPOT_WORSE,
            num_pairs=16,
            hl=0.1 / 3.0,
            ci_lo=-0.1,
            ci_hi=0.2,
            p=1e-9,
            cv=0.03,
            loss_bounds={"tpot_p95_s": 0.1, "error_frac": 0.0},
        ),
        windows=(
            make_window(0, stage=WindowStage.RANK),
            make_window(1),
            make_window(2, status=TrialStatus.TIMEOUT, metrics={}),
        ),
        initiated_by="tune",
        decided_at=3.5,
    )
    return replace(decision, **changes)


def test_decisions_come_back_with_every_window(reopen: Callable[[], Store]) -> None:
    study = start_study(reopen())
    first = reopen().save_acceptance(make_acceptance(study_id=study))
    bare = AcceptanceVerdict(
        state=DecisionState.HELD, reason=DecisionReason.NOT_ENOUGH, num_pairs=0
    )
    second = reopen().save_acceptance(
        make_acceptance(key=OTHER_KEY, verdict=bare, rule=AcceptanceRule(), windows=())
    )
    assert (first.decision_id, second.decision_id) == (1, 2)
    assert replace(first, decision_id=None) == make_acceptance(study_id=study)
    assert second.verdict == bare and second.rule == AcceptanceRule()
    assert reopen().find_acceptance(1) == first
    assert reopen().list_acceptances() == (second, first)


def test_figures_that_are_no_numbers_come_back_as_none(reopen: Callable[[], Store]) -> None:
    strange = {"a": float("nan"), "b": float("inf"), "c": numpy.float64(0.5), "d": None}
    window = make_window(0, metrics=strange, values={"token_budget": numpy.int64(512)})
    reopen().save_acceptance(make_acceptance(windows=(window,)))
    (found,) = reopen().find_acceptance(1).windows
    assert found.metrics == {"a": None, "b": None, "c": 0.5, "d": None}
    assert found.values == {"token_budget": 512}
    assert [type(found.metrics["c"]), type(found.values["token_budget"])] == [float, int]


def test_a_decision_is_stored_whole_or_not_at_all(reopen: Callable[[], Store]) -> None:
    with pytest.raises(StoreError):
        reopen().save_acceptance(make_acceptance(windows=(make_window(0), make_window(0))))
    with pytest.raises(StoreError):
        reopen().save_acceptance(make_acceptance(study_id=7))
    assert reopen().list_acceptances() == ()
    with pytest.raises(InputError, match="no decision 1; see: sparsed decision list"):
        reopen().find_acceptance(1)


# links

LINK = LinkKey(gpu_name="H", driver="580.1", link="gen5x16", torch="2.11", triton="3.6")


def make_calibration(*, programs: int = 16, key: LinkKey = LINK) -> LinkCalibration:
    entries = tuple(
        LinkEntry(
            direction=direction,
            piece_bytes=16384,
            path=path,
            programs=programs,
            tile_bytes=32768,
            bytes_per_s=5.5e10,
            slowdown=slowdown,
        )
        for direction, path, slowdown in (
            (Direction.H2D, CopyPath.KERNEL, 1.15),
            (Direction.D2H, CopyPath.COPY_ENGINE, None),
        )
    )
    probe = LinkProbe(h2d_bytes_per_s=5.6e10, d2h_bytes_per_s=5.7e10)
    return LinkCalibration(key=key, contiguous=probe, entries=entries, measured_at=2.5)


def test_a_calibration_is_found_by_its_whole_key(reopen: Callable[[], Store]) -> None:
    reopen().save_calibration(make_calibration())
    assert reopen().find_calibration(LINK) == make_calibration()
    for name in ("gpu_name", "driver", "link", "torch", "triton"):
        assert reopen().find_calibration(replace(LINK, **{name: "other"})) is None


def test_a_calibration_replaces_that_of_the_same_key(reopen: Callable[[], Store]) -> None:
    other = make_calibration(key=replace(LINK, driver="1"))
    for calibration in (make_calibration(programs=8), other, make_calibration(programs=24)):
        reopen().save_calibration(calibration)
    assert reopen().find_calibration(LINK) == make_calibration(programs=24)
    assert reopen().find_calibration(other.key) == other


def test_a_calibration_of_numpy_numbers_comes_back_plain(reopen: Callable[[], Store]) -> None:
    store = reopen()
    (first, *_) = make_calibration().entries
    strange = replace(first, programs=numpy.int64(8), bytes_per_s=numpy.float64(1.5))
    store.save_calibration(replace(make_calibration(), entries=(strange,)))
    found = reopen().find_calibration(LINK)
    assert found is not None
    assert (found.entries[0].programs, found.entries[0].bytes_per_s) == (8, 1.5)
