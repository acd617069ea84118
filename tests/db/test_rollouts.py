"""What the live tuner must not forget, in both stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sparsed.core import (
    ProfileKey,
    Regime,
    RolloutReason,
    RolloutRecord,
    RolloutState,
    TunerControls,
)
from sparsed.db import open_store, rollouts
from sparsed.db.memory import InMemoryProfileStore
from sparsed.db.session import open_engine, writing
from sparsed.db.store import Store

KEY = ProfileKey(hardware="cpu:x:2:4GiB", model="tiny", dtype="float32")
OTHER_KEY = ProfileKey(hardware="gpu:y:80GiB", model="tiny", dtype="float32")
STEP = RolloutRecord(
    state=RolloutState.VERIFYING,
    reason=RolloutReason.CANARY,
    config_from={"token_budget": 2048, "hbm_budget": None},
    config_to={"token_budget": 1536, "hbm_budget": 4096},
    initiated_by="auto",
    at=10.0,
)


@pytest.fixture(params=["memory", "sql"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Store]]:
    """Opens the same store again, as the next process would."""
    memory = InMemoryProfileStore()
    opened: list[Store] = []

    def again() -> Store:
        if request.param == "memory":
            return memory
        opened.append(open_store(tmp_path / "sparsed.db"))
        return opened[-1]

    yield again
    for store in opened:
        store.close()


def test_a_marker_that_is_found_fails_its_candidate_once(reopen: Callable[[], Store]) -> None:
    reopen().mark_rollout(KEY, STEP)
    reopen().mark_rollout(OTHER_KEY, STEP)
    failed = replace(STEP, state=RolloutState.REVERTED, reason=RolloutReason.CRASHED, at=20.0)
    assert reopen().fail_marked(20.0) == (failed, failed)
    assert reopen().fail_marked(30.0) == ()
    assert reopen().list_rollouts(KEY) == (failed, STEP)
    assert reopen().find_good(KEY) is None


def test_a_settled_candidate_leaves_no_marker_and_moves_the_good(
    reopen: Callable[[], Store],
) -> None:
    store = reopen()
    store.mark_rollout(KEY, STEP)
    store.settle_rollout(KEY, replace(STEP, at=11.0), good=STEP.config_to)
    good = reopen().find_good(KEY)
    assert good is not None and (good.values, good.moved_at) == (STEP.config_to, 11.0)
    assert reopen().find_good(OTHER_KEY) is None
    assert reopen().fail_marked(20.0) == ()
    store.mark_rollout(KEY, STEP)
    store.settle_rollout(KEY, STEP, good=None)
    assert reopen().find_good(KEY) == good
    store.settle_rollout(KEY, STEP, good={})
    assert reopen().find_good(KEY) is None


def test_old_steps_go_but_for_verdicts_on_profiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts, "MAX_ROLLOUTS", 3)
    store = open_store(tmp_path / "sparsed.db")
    of_profile = replace(STEP, profile="profile #1 on torch 2")
    tested = replace(of_profile, state=RolloutState.REVERTED, reason=RolloutReason.NOT_BETTER)
    refused = replace(of_profile, state=RolloutState.EXPIRED, reason=RolloutReason.REJECTED)
    for step in (STEP, of_profile, tested, refused, *[STEP] * 5):
        store.note_rollout(KEY, step)
    assert store.list_rollouts(KEY) == (STEP, STEP, STEP, refused, tested)
    store.close()


def test_runs_and_controls_are_kept(reopen: Callable[[], Store]) -> None:
    store = reopen()
    assert store.controls() == TunerControls()
    first = store.begin_run(1.0)
    store.end_run(first, 2.0)
    second = store.begin_run(3.0)
    store.touch_run(second, 4.0)
    runs = [(run.started_at, run.alive_at, run.ended) for run in reopen().list_runs()]
    assert runs == [(3.0, 4.0, False), (1.0, 2.0, True)]
    controls = TunerControls(pins=("token_budget",), frozen=True, safe_since=5.0)
    store.keep_controls(controls)
    assert reopen().controls() == controls and len(reopen().list_runs()) == 2
    store.keep_controls(TunerControls(), forget_runs=True)
    assert reopen().controls() == TunerControls() and reopen().list_runs() == ()
    assert reopen().begin_run(6.0) not in (None, 0)


def test_what_must_survive_a_loss_of_power_is_synced(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "sparsed.db")
    levels = []
    for durable in (False, True, False):
        with writing(engine, durable=durable) as session:
            raw = session.connection().exec_driver_sql("PRAGMA synchronous")
            levels.append(raw.scalar_one())
    assert levels == [1, 2, 1]  # NORMAL, FULL, NORMAL
    engine.dispose()


CHAT = Regime(
    regime_id=1,
    centroid={"requests_per_s": 1.0, "input_tokens_p50": 9.5},
    signature="chat",
    seen_s=900.0,
    seen_at=5.0,
)
DOCUMENTS = replace(
    CHAT, regime_id=2, signature="documents", incumbent={"token_budget": 1536, "hbm_budget": None}
)


def test_regimes_are_kept_as_a_whole_and_settled_with_a_step(
    reopen: Callable[[], Store],
) -> None:
    store = reopen()
    assert store.list_regimes(KEY) == ()
    store.keep_regimes(KEY, (DOCUMENTS, CHAT))
    store.keep_regimes(OTHER_KEY, (CHAT,))
    assert reopen().list_regimes(KEY) == (CHAT, DOCUMENTS)
    proved = replace(
        CHAT, incumbent={"token_budget": 512}, verified_at=6.0, versions={"torch": "2"}
    )
    step = replace(STEP, regime_id=1)
    store.settle_rollout(KEY, step, good=STEP.config_to, versions=proved.versions, regime=proved)
    assert reopen().list_regimes(KEY) == (proved, DOCUMENTS)
    assert reopen().list_regimes(OTHER_KEY) == (CHAT,)
    good = reopen().find_good(KEY)
    assert good is not None and good.versions == {"torch": "2"}
    assert reopen().list_rollouts(KEY) == (step,)
    store.keep_regimes(KEY, (DOCUMENTS,))
    assert reopen().list_regimes(KEY) == (DOCUMENTS,)
