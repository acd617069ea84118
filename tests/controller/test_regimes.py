"""Regimes in a daemon with a fake engine and a real database: kept, found again, taken back."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsed.controller.live_tuner import LiveTuner
from sparsed.controller.recovery import SAFE_VALUES
from sparsed.controller.rollout_host import RolloutHost
from sparsed.core import (
    HostGauges,
    Platform,
    RolloutReason,
    Slo,
    TunerMode,
    WorkloadContext,
)
from sparsed.db import open_store
from sparsed.db.memory import InMemoryProfileStore
from sparsed.db.store import Store

SCRIPT = Path(__file__).with_name("crashing_tuner.py")
_spec = importlib.util.spec_from_file_location("crashing_tuner_of_regimes", SCRIPT)
assert _spec is not None and _spec.loader is not None
story = importlib.util.module_from_spec(_spec)
sys.modules["crashing_tuner_of_regimes"] = story
_spec.loader.exec_module(story)

CHAT = WorkloadContext(span_s=60.0, num_requests=60, requests_per_s=1.0, input_tokens_p50=500.0)
DOCUMENTS = replace(CHAT, input_tokens_p50=16_000.0)
RULE = replace(story.RULE, dwell_s=8.0)
Scenario = Callable[[Any], Coroutine[Any, Any, None]]


def live(
    store: Store, directory: Path, scenario: Scenario, *, versions: dict[str, str] | None = None
) -> Any:
    """One life of a daemon, in mode auto."""

    async def life() -> Any:
        daemon = story.FakeDaemon(store, directory)
        daemon.host = RolloutHost(
            store,
            story.KEY,
            slo=Slo(tpot_s=0.1),
            apply=daemon._apply,
            read_failures=lambda: daemon.num_failed,
            kill_file=directory / "tuner.kill",
            rule=RULE,
            knobs=daemon.knobs,
            versions=versions or {"torch": "2"},
            clock=lambda: daemon.at,
        )
        daemon.host.set_mode(TunerMode.AUTO)
        worker = asyncio.create_task(daemon.host.work())
        await scenario(daemon)
        await daemon.settled()
        worker.cancel()
        await asyncio.wait({worker})
        await daemon.host.close()
        return daemon

    return asyncio.run(life())


async def serve(daemon: Any, load: WorkloadContext, seconds: int) -> None:
    for _ in range(seconds):
        await daemon.tick(context=load)


async def prove(daemon: Any, load: WorkloadContext, values: dict[str, int]) -> None:
    await serve(daemon, load, 100)
    assert daemon.host.propose(values, initiated_by="auto")
    for _ in range(400):
        await daemon.tick(context=load)
        if daemon.host.records[0].reason is RolloutReason.PROBATION_PASSED:
            return
    raise AssertionError(list(daemon.host.records)[:3])


async def two_loads(daemon: Any) -> None:
    await prove(daemon, CHAT, {"max_num_active_seqs": 6})
    await prove(daemon, DOCUMENTS, {"prefill_chunk": 768})
    await serve(daemon, CHAT, 30)
    assert (daemon.knobs.max_num_active_seqs, daemon.knobs.prefill_chunk) == (6, 512)


def test_a_restart_finds_its_regimes_and_their_incumbents(tmp_path: Path) -> None:
    store = open_store(tmp_path / "sparsed.db")
    first = live(store, tmp_path, two_loads)
    store.close()
    store = open_store(tmp_path / "sparsed.db")

    async def again(daemon: Any) -> None:
        assert daemon.knobs.prefill_chunk == 768, "a start takes the last known good"
        assert daemon.host.load.regimes == first.host.load.regimes
        await serve(daemon, CHAT, 10)
        assert daemon.knobs.prefill_chunk == 512
        await serve(daemon, DOCUMENTS, 30)
        assert daemon.knobs.prefill_chunk == 768
        reasons = [record.reason for record in daemon.host.records][:2]
        assert reasons == [RolloutReason.REGIME_SWITCHED] * 2

    live(store, tmp_path, again)
    assert store.fail_marked(0.0) == ()
    store.close()


def test_what_was_verified_on_another_version_is_not_switched_to(tmp_path: Path) -> None:
    store = InMemoryProfileStore()
    live(store, tmp_path, two_loads)

    async def upgraded(daemon: Any) -> None:
        assert len(daemon.host.load.regimes) == 2
        assert all(regime.incumbent == {} for regime in daemon.host.load.regimes)
        await serve(daemon, CHAT, 30)
        assert daemon.knobs.prefill_chunk == 768
        assert daemon.host.records[0].reason is RolloutReason.PLATFORM_DRIFT

    live(store, tmp_path, upgraded, versions={"torch": "3"})
    assert store.find_good(story.KEY) is None, "the start after this one is not told again"


def test_drift_of_the_platform_forgets_all_that_was_verified(tmp_path: Path) -> None:
    store = InMemoryProfileStore()

    async def scenario(daemon: Any) -> None:
        await two_loads(daemon)
        daemon.host.on_drift("slow link", values=SAFE_VALUES)
        await daemon.settled()
        assert daemon.knobs == daemon.knobs.with_values(SAFE_VALUES)
        assert daemon.host.load.drift == daemon.host.stale == "slow link"

    live(store, tmp_path, scenario)
    assert store.find_good(story.KEY) is None
    assert [regime.incumbent for regime in store.list_regimes(story.KEY)] == [{}, {}]


def test_a_slow_link_degrades_the_daemon_and_its_profile(
    plan_start: Any, configure: Any, monkeypatch: pytest.MonkeyPatch, control: Any
) -> None:
    store = InMemoryProfileStore()
    plan = replace(plan_start(no_profile=True), stale="", profile_id=5)
    marked: list[int] = []
    monkeypatch.setattr(store, "mark_stale", marked.append)
    monkeypatch.setattr(
        "sparsed.controller.live_tuner.platform_of",
        lambda plan, facts: Platform(pcie_generation=5, pcie_width=16),
    )

    async def apply(values: Any) -> None:
        assert not values, "in mode advise nothing is applied"

    async def scenario() -> None:
        tuner = LiveTuner(
            store,
            plan,
            config=configure(regime_dwell=20),
            apply=apply,
            read_failures=lambda: 0,
            read_facts=lambda: control.now.facts,
        )
        serving = asyncio.create_task(tuner.serve())
        loaded = replace(
            control.now.snapshot,
            h2d_bytes=10**10,
            h2d_gb_per_s=20.0,
            host=HostGauges(pcie_generation=4, pcie_width=16),
        )
        for _ in range(60):
            assert tuner.reasons() == ()
            tuner.on_snapshot(loaded)
        (reason,) = tuner.reasons()
        assert "generation 4" in reason and "sparsed tune" in reason
        for _ in range(300):
            await asyncio.sleep(0.01)
            if marked:
                break
        serving.cancel()
        await asyncio.wait({serving})
        await tuner.close()

    asyncio.run(scenario())
    assert marked == [5]


def test_what_the_start_left_out_degrades_the_daemon(plan_start: Any, configure: Any) -> None:
    plan = replace(plan_start(no_profile=True), stale="profile #3 of another platform")

    async def scenario() -> None:
        tuner = LiveTuner(
            InMemoryProfileStore(),
            plan,
            config=configure(),
            apply=lambda values: asyncio.sleep(0),
            read_failures=lambda: 0,
            read_facts=lambda: None,
        )
        assert tuner.reasons() == ("profile #3 of another platform",)
        await tuner.close()

    asyncio.run(scenario())
