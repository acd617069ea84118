"""Candidates in a daemon with a fake engine: applied, taken back, and survived."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import revert_time

from sparsed.controller.recovery import SAFE_VALUES, recover, tuned_values
from sparsed.controller.rollout_host import MAX_SHOWN
from sparsed.core import (
    InputError,
    RolloutReason,
    RolloutRecord,
    RolloutState,
    TunerControls,
    TunerMode,
)
from sparsed.db.memory import InMemoryProfileStore
from sparsed.db.store import StoreError

SCRIPT = Path(__file__).with_name("crashing_tuner.py")
_spec = importlib.util.spec_from_file_location("crashing_tuner", SCRIPT)
assert _spec is not None and _spec.loader is not None
story = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(story)

Scenario = Callable[[Any], Coroutine[Any, Any, None]]


class FaultyStore(InMemoryProfileStore):
    """Refuses the calls whose names are in ``broken``."""

    def __init__(self) -> None:
        super().__init__()
        self.broken: set[str] = set()

    def mark_rollout(self, *args: Any, **kwargs: Any) -> None:
        self._check("mark")
        super().mark_rollout(*args, **kwargs)

    def settle_rollout(self, *args: Any, **kwargs: Any) -> None:
        self._check("settle")
        super().settle_rollout(*args, **kwargs)

    def _check(self, name: str) -> None:
        if name in self.broken:
            raise StoreError("disk full")


def play(tmp_path: Path, scenario: Scenario, store: InMemoryProfileStore | None = None) -> Any:
    """Run ``scenario`` on a daemon that has earned its time to explore."""
    daemon: Any = None

    async def live() -> None:
        nonlocal daemon
        daemon = story.FakeDaemon(store or InMemoryProfileStore(), tmp_path)
        worker = asyncio.create_task(daemon.host.work())
        for _ in range(80):
            await daemon.tick()
        await scenario(daemon)
        worker.cancel()
        await asyncio.wait({worker})
        await daemon.host.close()

    asyncio.run(live())
    return daemon


async def under_test(daemon: Any, values: Any = story.FIRST) -> None:
    assert daemon.host.propose(values, initiated_by="auto")
    await daemon.until_in_force(values)
    await daemon.tick()


def reasons(daemon: Any) -> list[RolloutReason]:
    return [record.reason for record in daemon.host.records]


def test_a_tripwire_is_applied_in_its_own_second(tmp_path: Path) -> None:
    async def scenario(daemon: Any) -> None:
        await under_test(daemon)
        assert not daemon.host.is_settled
        daemon.num_failed += 1
        await daemon.tick()
        assert daemon.applied[-1] == {"max_num_active_seqs": 4}
        assert daemon.knobs == story.KNOBS and daemon.host.is_settled
        assert reasons(daemon)[0] is RolloutReason.ERRORS

    play(tmp_path, scenario)


def test_what_undoing_took_is_counted_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = FaultyStore()

    async def scenario(daemon: Any) -> None:
        host = daemon.host
        await under_test(daemon)
        apply = host._apply

        async def slow(values: Any) -> None:
            daemon.at += 0.25
            await apply(values)

        host._apply = slow
        store.broken = {"settle"}
        daemon.num_failed += 1
        await daemon.tick()
        assert (host.num_reverts, host.revert_s) == (1, pytest.approx(0.25))
        store.broken = set()
        host.look()
        await daemon.settled()
        assert host.is_settled
        assert (host.num_reverts, host.revert_s) == (1, pytest.approx(0.25)), "it was one revert"

    with caplog.at_level(logging.INFO, logger="sparsed"):
        play(tmp_path, scenario, store)
    assert revert_time.reverts(caplog.text) == [{"seconds": 0.25, "reason": "errors"}]


def test_a_revert_overtakes_a_candidate_that_is_still_being_applied(tmp_path: Path) -> None:
    async def scenario(daemon: Any) -> None:
        never = asyncio.Event()
        asked: list[Any] = []

        async def slow(values: Any) -> None:
            asked.append(values)
            if values == story.FIRST:
                await never.wait()

        daemon.host._apply = slow
        daemon.host.propose(story.FIRST, initiated_by="auto")
        while not asked:
            daemon.at += 1.0
            snapshot = story.replace(story.SNAPSHOT, ended_at=daemon.at, knobs=daemon.knobs)
            daemon.host.on_snapshot(snapshot)
            await asyncio.sleep(0.001)
        daemon.host.trip(RolloutReason.OUT_OF_MEMORY)
        await daemon.host._batches.join()
        assert asked == [story.FIRST, {"max_num_active_seqs": 4}]
        assert daemon.host.is_settled

    play(tmp_path, scenario)


def test_without_a_marker_on_the_disk_nothing_is_applied(tmp_path: Path) -> None:
    store = FaultyStore()
    store.broken = {"mark"}

    async def scenario(daemon: Any) -> None:
        daemon.host.propose(story.FIRST, initiated_by="auto")
        for _ in range(30):
            await daemon.tick()
        assert reasons(daemon)[0] is RolloutReason.STORE_FAILED
        assert story.FIRST not in daemon.applied

    play(tmp_path, scenario, store)


def test_a_candidate_whose_marker_fails_late_is_never_applied(tmp_path: Path) -> None:
    """The store hangs while the windows go on, so that the candidate's turn comes first."""
    disk = threading.Event()

    class SlowStore(InMemoryProfileStore):
        def mark_rollout(self, *args: Any, **kwargs: Any) -> None:
            disk.wait(timeout=30)
            raise StoreError("disk full")

    async def scenario(daemon: Any) -> None:
        daemon.host.propose(story.FIRST, initiated_by="auto")
        while daemon.host._state.candidate.turn < 2:
            daemon.at += 1.0
            snapshot = story.replace(story.SNAPSHOT, ended_at=daemon.at, knobs=daemon.knobs)
            daemon.host.on_snapshot(snapshot)
        disk.set()
        await daemon.settled()
        assert reasons(daemon)[0] is RolloutReason.STORE_FAILED
        assert story.FIRST not in daemon.applied

    play(tmp_path, scenario, SlowStore())


def test_an_end_that_cannot_be_stored_is_tried_until_it_is(tmp_path: Path) -> None:
    store = FaultyStore()

    async def scenario(daemon: Any) -> None:
        await under_test(daemon)
        store.broken = {"settle"}
        daemon.host.trip(RolloutReason.ENGINE_DIED)
        for _ in range(3):
            await daemon.settled()
            daemon.host.look()
        assert daemon.knobs == story.KNOBS and not daemon.host.is_settled
        store.broken = set()
        await daemon.settled()
        daemon.host.look()
        await daemon.settled()
        assert daemon.host.is_settled

    play(tmp_path, scenario, store)
    assert store.fail_marked(0.0) == ()


def test_a_commit_that_cannot_be_stored_is_taken_back(tmp_path: Path) -> None:
    store = FaultyStore()

    async def scenario(daemon: Any) -> None:
        await under_test(daemon)
        store.broken = {"settle"}
        await daemon.until(RolloutReason.STORE_FAILED)
        assert daemon.knobs == story.KNOBS
        store.broken = set()

    play(tmp_path, scenario, store)
    assert store.find_good(story.KEY) is None


def test_operators_come_first(tmp_path: Path) -> None:
    async def scenario(daemon: Any) -> None:
        await under_test(daemon)
        await daemon.host.overtake()
        assert daemon.knobs == story.KNOBS and daemon.host.is_settled
        for _ in range(200):
            await daemon.tick()
        await under_test(daemon)
        (tmp_path / "tuner.kill").touch()
        daemon.host.look()
        await daemon.settled()
        assert daemon.knobs == story.KNOBS and daemon.host.is_killed
        assert not daemon.host.propose(story.SECOND, initiated_by="auto")
        await daemon.host.revive()
        assert not (tmp_path / "tuner.kill").exists()
        assert daemon.host.propose(story.SECOND, initiated_by="auto")
        await daemon.host.keep(TunerControls(pins=("prefill_chunk",)))
        assert reasons(daemon)[:2] == [RolloutReason.PINNED, RolloutReason.PROPOSED]

    play(tmp_path, scenario)


def test_a_kill_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    async def scenario(daemon: Any) -> None:
        daemon.host._kill_file = tmp_path / "missing" / "tuner.kill"
        with pytest.raises(InputError, match="after a restart"):
            daemon.host.kill()

    play(tmp_path, scenario)


def test_an_ordered_end_leaves_no_marker(tmp_path: Path) -> None:
    store = InMemoryProfileStore()
    daemon = play(tmp_path, under_test, store)
    assert reasons(daemon)[0] is RolloutReason.SHUT_DOWN
    assert store.fail_marked(0.0) == ()
    assert [run.ended for run in store.list_runs()] == [True]


def test_an_end_cut_off_by_the_shutdown_is_still_written(tmp_path: Path) -> None:
    store = InMemoryProfileStore()

    async def scenario(daemon: Any) -> None:
        await under_test(daemon)
        begun = asyncio.Event()

        async def never(values: Any) -> None:
            begun.set()
            await asyncio.Event().wait()

        daemon.host._apply = never
        daemon.host.trip(RolloutReason.ENGINE_DIED)
        await begun.wait()

    play(tmp_path, scenario, store)
    assert store.fail_marked(0.0) == ()


def test_a_start_goes_on_with_pins_good_and_mode_advise(tmp_path: Path) -> None:
    store = InMemoryProfileStore()

    async def commit(daemon: Any) -> None:
        await daemon.host.keep(TunerControls(pins=("token_budget",)))
        daemon.host.propose(story.FIRST, initiated_by="auto")
        await daemon.until(RolloutReason.PROBATION_PASSED)

    play(tmp_path, commit, store)
    assert tuned_values(store, story.KEY).values == story.FIRST
    evidence = store.list_acceptances()[0]
    assert (evidence.initiated_by, len(evidence.windows)) == ("auto", 12)

    async def again(daemon: Any) -> None:
        assert daemon.knobs == story.KNOBS.with_values(story.FIRST)
        assert daemon.host.pins == {"token_budget"}
        daemon.host.set_mode(TunerMode.ADVISE)
        assert not daemon.host.propose(story.SECOND, initiated_by="auto")

    play(tmp_path, again, store)


@pytest.mark.parametrize(
    ("served_s", "num_crashes", "is_safe"), [(190.0, 3, True), (190.0, 2, False), (300.0, 3, False)]
)
def test_three_crashes_within_ten_minutes_mean_safe_mode(
    served_s: float, num_crashes: int, is_safe: bool
) -> None:
    store = InMemoryProfileStore()
    record = RolloutRecord(
        state=RolloutState.VERIFYING,
        reason=RolloutReason.COMMITTED,
        config_from={},
        config_to=story.FIRST,
        initiated_by="auto",
        at=1.0,
    )
    store.settle_rollout(story.KEY, record, good=story.FIRST)
    store.end_run(store.begin_run(0.0), 10.0)
    for number in range(num_crashes):
        recover(store, at=1e4 * number)
        store.touch_run(store.begin_run(1e4 * number), 1e4 * number + served_s)
    recover(store, at=1e6)
    tuned = tuned_values(store, story.KEY)
    assert (tuned.is_safe, tuned.values) == (is_safe, SAFE_VALUES if is_safe else story.FIRST)
    assert story.KNOBS.with_values(SAFE_VALUES)


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_killed_at_every_write_it_starts_on_the_last_known_good(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    *killed, last = map(json.loads, done.stdout.splitlines())
    whole = last["reached"][:-1]
    assert len(killed) == len(whole) > 60 and not last["killed"]
    kinds = {what.split()[0] for what in whole}
    assert kinds >= {"statement", "commit", "apply", "mark_rollout", "settle_rollout"}
    for found in killed:
        number = found["number"]
        assert found["killed"] and found["reached"] == whole[: number - 1]
        done_steps = [what for what in whole[:number] if "_rollout" in what]
        moves = [what for what in done_steps if what.startswith("settle") and "{" in what]
        assert found["good"] == story.GOODS[len(moves)], number
        ends = [what for what in done_steps if what.startswith(("mark", "settle"))]
        assert found["was_marked"] is bool(ends and ends[-1].startswith("mark")), number
        assert found["crashes"] == found["was_marked"] and found["is_stable"], number


def test_a_start_remembers_what_failed_however_many_loads_came_since(tmp_path: Path) -> None:
    store = InMemoryProfileStore()
    failed = RolloutRecord(
        state=RolloutState.REVERTED,
        reason=RolloutReason.CRASHED,
        config_from={"max_num_active_seqs": 4},
        config_to=story.BAD,
        initiated_by="auto",
        at=1000.0,
    )
    store.note_rollout(story.KEY, failed)
    for number in range(2 * MAX_SHOWN):
        switch = replace(
            failed,
            state=RolloutState.SUCCESS,
            reason=RolloutReason.REGIME_SWITCHED,
            initiated_by="regime",
            at=1001.0 + number,
        )
        store.note_rollout(story.KEY, switch)
    host = story.FakeDaemon(store, tmp_path).host
    assert [record.config_to for record in host.barred] == [story.BAD]
    assert len(host.records) == MAX_SHOWN
    assert host.records[0].at == 1000.0 + 2 * MAX_SHOWN, "the newest are shown"
