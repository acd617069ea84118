"""`sparsed decision`, and how a study's measurements come to be a stored decision."""

from __future__ import annotations

import json
import math
import random
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from sparsed.controller.cli.main import run
from sparsed.controller.study_log import StudyLog
from sparsed.core import (
    AcceptanceDecision,
    AcceptanceRule,
    AcceptanceWindow,
    DecisionState,
    Guard,
    KnobValue,
    Objective,
    ProfileKey,
    Slo,
    TrialResult,
    TrialStatus,
    WindowStage,
    Workload,
    WorkloadRequest,
)
from sparsed.db import open_store
from sparsed.db.memory import InMemoryProfileStore
from sparsed.db.store import StoreError
from sparsed.tuner.acceptance import decide
from sparsed.tuner.schedule import paired_slots
from sparsed.tuner.verification import Comparison

KEY = ProfileKey(hardware="cpu:x:2:4GiB", model="tiny", dtype="float32")
FROM: dict[str, KnobValue] = {"token_budget": 2048, "hbm_budget": None}
TO: dict[str, KnobValue] = {"token_budget": 1024, "hbm_budget": None}
RULE = AcceptanceRule(guards=(Guard.QUALITY,))


def windows(gain: float) -> tuple[AcceptanceWindow, ...]:
    draw = random.Random(0)
    kept = (slot for slot in paired_slots(RULE.num_pairs) if not slot.is_discarded)
    return tuple(
        AcceptanceWindow(
            number=number,
            stage=WindowStage.TEST,
            round=slot.pair,
            order=1 + slot.pair,
            values=TO if slot.is_candidate else FROM,
            status=TrialStatus.OK,
            metrics={
                RULE.metric: math.exp(draw.gauss(0.0, 0.03)) * (gain if slot.is_candidate else 1),
                Guard.QUALITY.value: 0.95,
            },
        )
        for number, slot in enumerate(kept)
    )


def comparison(measured: Sequence[AcceptanceWindow]) -> Comparison:
    return Comparison(
        config_from=FROM,
        config_to=TO,
        rule=RULE,
        verdict=decide(measured, rule=RULE, config_from=FROM, config_to=TO),
        windows=tuple(measured),
    )


def decision(measured: Sequence[AcceptanceWindow]) -> AcceptanceDecision:
    found = comparison(measured)
    return AcceptanceDecision(
        key=KEY,
        config_from=FROM,
        config_to=TO,
        rule=RULE,
        verdict=found.verdict,
        windows=found.windows,
        initiated_by="tune",
        decided_at=1.8e9,
    )


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Of three decisions: accepted, rejected, held."""
    path = tmp_path / "sparsed.db"
    store = open_store(path)
    for measured in (windows(1.1), windows(1.0), windows(1.1)[:9]):
        store.save_acceptance(decision(measured))
    store.close()
    return path


def sparsed(database: Path, *arguments: str) -> int:
    return run(["decision", *arguments, "--state-dir", str(database.parent)])


def test_the_list_has_every_decision(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sparsed(database, "list") == 0
    printed = capsys.readouterr().out
    for words in ("accepted", "no_gain", "not_enough", "token_budget=1024", "2027-01-15"):
        assert words in printed
    assert "hbm_budget" not in printed  # it is no change
    assert sparsed(database, "list", "-o", "json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [item["verdict"]["state"] for item in listed] == ["held", "rejected", "accepted"]
    assert [len(item["windows"]) for item in listed] == [9, 64, 64]


@pytest.mark.parametrize("number", ["1", "2", "3"])
def test_a_decision_is_decided_again_from_its_windows(
    database: Path, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sparsed(database, "show", number) == 0
    text = capsys.readouterr().out
    assert "the same, from the stored windows" in text and "hbm_budget=auto" in text
    assert sparsed(database, "show", number, "-o", "json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["agrees"] is True
    assert answer["recomputed"] == answer["decision"]["verdict"]


def test_what_an_older_rule_held_is_held_by_it_still(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(1)
    erratic = [
        replace(
            window,
            metrics={
                name: value * math.exp(draw.gauss(0.0, 0.2)) if name == RULE.metric else value
                for name, value in window.metrics.items()
            },
        )
        for window in windows(3.0)
    ]
    older = replace(RULE, takes_sure_gains=False)
    held = decide(erratic, rule=older, config_from=FROM, config_to=TO)
    assert held.state is DecisionState.HELD
    assert decision(erratic).verdict.state is DecisionState.ACCEPTED
    database = tmp_path / "sparsed.db"
    store = open_store(database)
    store.save_acceptance(replace(decision(erratic), rule=older, verdict=held))
    store.close()
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE acceptance SET rule = json_remove(rule, '$.takes_sure_gains')")
    connection.close()
    assert sparsed(database, "show", "1") == 0
    assert "the same, from the stored windows" in capsys.readouterr().out


@pytest.mark.parametrize("status", [TrialStatus.SLO_BROKEN, TrialStatus.RECALL_BROKEN])
def test_a_repair_tells_how_often_each_side_met_its_targets(
    status: TrialStatus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its gain is no speed, and is not told in percent."""
    late = [
        window if window.values == TO or window.round == 3 else replace(window, status=status)
        for window in windows(1.0)
    ]
    store = open_store(tmp_path / "sparsed.db")
    store.save_acceptance(decision(late))
    ranked = replace(
        windows(1.1)[0], number=99, stage=WindowStage.RANK, status=TrialStatus.SLO_BROKEN
    )
    store.save_acceptance(decision((ranked, *windows(1.1))))
    store.close()
    assert sparsed(tmp_path / "sparsed.db", "show", "1") == 0
    text = capsys.readouterr().out
    assert "in 32 of 32 windows with the change, in 1 of 32 windows without" in text
    assert "accepted: over 10x in 32 pairs" in text
    assert sparsed(tmp_path / "sparsed.db", "show", "2") == 0
    assert "targets kept" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE acceptance SET state = 'accepted', reason = 'accepted' WHERE id = 2",
        "UPDATE acceptance SET hl = hl + 0.001 WHERE id = 2",
        "UPDATE acceptance SET p = NULL WHERE id = 2",
        "UPDATE acceptance SET rule = replace(rule, '0.025', '0.4') WHERE id = 2",
        "DELETE FROM acceptance_window WHERE acceptance_id = 2 AND number = 10",
        "UPDATE acceptance_window SET metrics = '{}' WHERE acceptance_id = 2 AND number = 63",
    ],
)
@pytest.mark.parametrize("output", ["text", "json"])
def test_a_verdict_that_its_windows_do_not_give_is_told(
    database: Path, change: str, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    connection = sqlite3.connect(database)
    assert connection.execute(change).rowcount > 0
    connection.commit()
    connection.close()
    assert sparsed(database, "show", "2", "-o", output) == 1
    captured = capsys.readouterr()
    assert "do not give its stored verdict" in captured.err
    if output == "json":
        assert json.loads(captured.out)["agrees"] is False
    else:
        assert "NOT as stored" in captured.out
    assert sparsed(database, "show", "1") == 0


def test_what_is_not_there_is_said_and_not_made(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sparsed(database, "show", "4") == 1
    assert "no decision 4; see: sparsed decision list" in capsys.readouterr().err
    elsewhere = tmp_path / "elsewhere" / "sparsed.db"
    assert sparsed(elsewhere, "list") == 0
    assert capsys.readouterr().out == "no decisions\n"
    assert sparsed(elsewhere, "show", "1") == 1
    assert "there is no database yet" in capsys.readouterr().err
    assert not elsewhere.parent.exists()


def trial(number: int) -> TrialResult:
    return TrialResult(
        number=number,
        arm="bayes",
        values=TO,
        status=TrialStatus.OK,
        score=1.0,
        spread_frac=None,
        metrics={},
    )


class FailingStore(InMemoryProfileStore):
    def record_trial(self, study_id: int, trial: TrialResult) -> None:
        raise StoreError("disk full")

    def save_acceptance(self, decision: AcceptanceDecision) -> AcceptanceDecision:
        raise StoreError("disk full")


def log_of(store: InMemoryProfileStore, *, said: list[str]) -> StudyLog:
    study = store.start_study(
        KEY,
        workload=Workload(
            name="w", requests=(WorkloadRequest(arrival_s=0.0, input_tokens=1, output_tokens=1),)
        ),
        objective=Objective.GOODPUT,
        slo=Slo(ttft_s=1.0),
        seed=0,
        space={"token_budget": [512, 1024]},
        versions={},
        started_at=0.0,
    )
    ticks = count(100)
    return StudyLog(
        store, key=KEY, study_id=study, say=said.append, clock=lambda: float(next(ticks))
    )


def test_a_study_is_stored_with_the_times_of_its_parts() -> None:
    store, said = InMemoryProfileStore(), list[str]()
    log = log_of(store, said=said)  # at 100
    log.record_trial(replace(trial(0), started_at=90.0))
    measured = windows(1.1)
    log.begin_window()  # discarded
    log.begin_window()
    log.record_window(measured[0])
    for window in measured[1:]:
        log.begin_window()
        log.record_window(window)
    log.record_decision(comparison(measured))
    (recorded,) = store.list_trials()
    assert (recorded.started_at, recorded.ended_at) == (90.0, 101.0)
    (kept,) = store.list_acceptances()
    assert said == ["its evidence: sparsed decision show 1"]
    assert (kept.initiated_by, kept.study_id) == ("tune", 1)
    assert kept.verdict.state is DecisionState.ACCEPTED
    times = [(window.started_at, window.ended_at) for window in kept.windows]
    assert times[:2] == [(103.0, 104.0), (105.0, 106.0)]
    assert [replace(item, started_at=0.0, ended_at=0.0) for item in kept.windows] == [*measured]


def test_a_store_that_fails_costs_the_rows_only() -> None:
    said: list[str] = []
    log = log_of(FailingStore(), said=said)
    log.record_trial(trial(7))
    log.record_decision(comparison(windows(1.0)))
    assert said == [
        "trial 7 could not be stored: disk full",
        "the decision could not be stored: disk full",
    ]
