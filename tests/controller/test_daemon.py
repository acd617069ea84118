"""Parts of the daemon that need no process: knobs without an engine, the log of progress."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsed.controller import engine_link
from sparsed.controller.config import DaemonConfig
from sparsed.controller.control import KnobState
from sparsed.controller.daemon import Daemon
from sparsed.controller.engine_link import EngineLink
from sparsed.controller.http_server import bind_port
from sparsed.controller.logs import ProgressLog
from sparsed.controller.startup import StartPlan
from sparsed.controller.telemetry import Senses
from sparsed.core import (
    ApplyKnobs,
    EngineStats,
    ExitCode,
    InputError,
    KnobProgress,
    KnobsApplied,
    KnobValue,
    Slo,
    Snapshot,
    StartError,
)
from sparsed.db.memory import InMemoryProfileStore
from sparsed.engine.wire import ToEngine
from sparsed.profiler.export import Telemetry


def link_engine(plan: StartPlan, run_dir: Path, *, seen: list[Snapshot]) -> EngineLink:
    senses = Senses(lambda: Telemetry(totals=EngineStats()), slo=Slo())
    return EngineLink(plan, run_dir=run_dir, max_queued=9, senses=senses, on_snapshot=seen.append)


def test_knobs_are_refused_while_the_engine_is_away(
    plan_start: Callable[..., StartPlan], tmp_path: Path
) -> None:
    plan = plan_start(no_profile=True)

    async def ask() -> None:
        link = link_engine(plan, tmp_path, seen=[])
        try:
            await link.apply(plan.spec.knobs)
        finally:
            await link.stop()

    with pytest.raises(InputError, match="not running yet"):
        asyncio.run(ask())


def test_the_board_follows_what_the_engine_says(
    plan_start: Callable[..., StartPlan], tmp_path: Path
) -> None:
    plan = plan_start(no_profile=True)
    knobs = plan.spec.knobs.with_values({"token_budget": 512})

    async def hear() -> None:
        link = link_engine(plan, tmp_path, seen=[])
        link.on_message(KnobsApplied(change_id=1, knobs=knobs, error="too much"))
        assert link.board.knobs == plan.spec.knobs
        link.on_message(KnobsApplied(change_id=2, knobs=knobs))  # nobody waits for it any more
        assert link.board.knobs == knobs
        await link.stop()

    asyncio.run(hear())


def sent_changes(link: EngineLink, monkeypatch: pytest.MonkeyPatch) -> list[ApplyKnobs]:
    """Changes that a running engine is asked for, from now on."""
    asked: list[ApplyKnobs] = []

    def send(message: ToEngine) -> None:
        assert isinstance(message, ApplyKnobs)
        asked.append(message)

    link.up = True
    monkeypatch.setattr(link.supervisor, "send", send)
    return asked


def test_an_answer_is_for_its_own_caller_alone(
    plan_start: Callable[..., StartPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_start(no_profile=True)
    wanted = [plan.spec.knobs.with_values({"token_budget": budget}) for budget in (512, 1024)]

    async def live() -> None:
        link = link_engine(plan, tmp_path, seen=[])
        asked = sent_changes(link, monkeypatch)
        callers = [asyncio.create_task(link.apply(knobs)) for knobs in wanted]
        await asyncio.sleep(0)
        assert [message.knobs for message in asked] == wanted
        assert link.board.wanted == wanted[1] and link.board.knobs == plan.spec.knobs
        refusal = KnobsApplied(change_id=asked[1].change_id, knobs=wanted[0], error="too much")
        link.on_message(refusal)
        with pytest.raises(InputError, match="too much"):
            await callers[1]
        assert not callers[0].done() and link.board.wanted == wanted[0]
        link.on_message(KnobsApplied(change_id=asked[0].change_id, knobs=wanted[0]))
        await callers[0]
        assert link.board.knobs == link.board.wanted == wanted[0]
        await link.stop()

    asyncio.run(live())


def test_an_engine_that_gets_ready_is_waited_for(
    plan_start: Callable[..., StartPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_start(no_profile=True)
    knobs = plan.spec.knobs.with_values({"token_budget": 512})
    monkeypatch.setattr(engine_link, "APPLY_TIMEOUT_S", 0.05)

    async def live() -> None:
        link = link_engine(plan, tmp_path, seen=[])
        (asked := sent_changes(link, monkeypatch)).clear()
        progress = KnobProgress(names=("token_budget",), frac=0.5)
        link.on_message(EngineStats(applying=progress))
        caller = asyncio.create_task(link.apply(knobs))
        await asyncio.sleep(0.2)
        assert not caller.done()
        link.on_message(EngineStats())
        with pytest.raises(InputError, match="did not take the knobs"):
            await caller
        late, again = asked[0].change_id, asyncio.create_task(link.apply(plan.spec.knobs))
        await asyncio.sleep(0)
        link.on_message(KnobsApplied(change_id=late, knobs=knobs))
        await asyncio.sleep(0)
        assert not again.done(), "that answer was for another"
        assert link.board.knobs == knobs
        link._on_lost("killed")
        with pytest.raises(InputError, match="died meanwhile: killed"):
            await again
        assert link.board.wanted == knobs
        await link.stop()

    asyncio.run(live())


def test_changes_in_flight_lose_nothing(
    configure: Callable[..., DaemonConfig],
    plan_start: Callable[..., StartPlan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While one change takes its time, others set another hot knob, its own, and one of a
    restart."""
    plan = plan_start(no_profile=True)

    (tmp_path / "s").mkdir()

    async def live() -> None:
        store = InMemoryProfileStore()
        daemon = Daemon(configure(), plan, store=store, store_fault=None, started_s=0.0)
        link = daemon._engine
        asked = sent_changes(link, monkeypatch)

        def change(**values: KnobValue) -> asyncio.Task[tuple[KnobState, ...]]:
            return asyncio.create_task(daemon.set_knobs(values, validate_only=False, reason="test"))

        first = change(token_budget=1024, dense_layers=1)
        await asyncio.sleep(0)
        second = change(prefill_chunk=64)
        await asyncio.sleep(0)
        third = change(token_budget=512)
        await asyncio.sleep(0)
        knobs = asked[-1].knobs
        assert (knobs.token_budget, knobs.prefill_chunk) == (512, 64)
        fourth = change(kv_dram_gib=0.02)
        await asyncio.sleep(0)
        for message in asked:
            link.on_message(KnobsApplied(change_id=message.change_id, knobs=asked[-1].knobs))
        with pytest.raises(InputError, match="token_budget is 512: another change"):
            await first
        await second
        await third
        states = {state.spec.name: state for state in await fourth}
        assert link.board.knobs == knobs
        assert states["dense_layers"].pending == 1 and states["kv_dram_gib"].pending == 0.02
        await link.stop()

    asyncio.run(live())


def test_a_report_closes_a_window(plan_start: Callable[..., StartPlan], tmp_path: Path) -> None:
    plan, seen = plan_start(no_profile=True), list[Snapshot]()

    async def hear() -> None:
        link = link_engine(plan, tmp_path, seen=seen)
        await asyncio.sleep(0.05)
        link.on_message(EngineStats(steps=3, generated_tokens=30))
        await link.stop()

    asyncio.run(hear())
    (snapshot,) = seen
    assert snapshot.steps == 3
    assert snapshot.generated_tokens_per_s > 0


def test_status_and_metrics_count_over_every_engine() -> None:
    senses = Senses(lambda: Telemetry(totals=senses.totals), slo=Slo())
    assert senses.stats is None
    for steps, pages in ((90, 30), (2, 5)):  # the second one is of a new engine
        senses.on_stats(EngineStats(steps=steps, verify_checked_pages=pages, num_running=steps))
    assert senses.stats is not None
    assert senses.stats.verify_checked_pages == 35
    assert senses.stats.num_running == 2
    assert b"sparsed_kv_verified_pages_total 35.0" in senses.metrics()


def test_a_port_in_use_is_named() -> None:
    with bind_port("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"127.0.0.1:{port}") as caught:
            bind_port("127.0.0.1", port)
    assert caught.value.code is ExitCode.UNAVAILABLE


def test_progress_is_logged_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    times_s = iter([10.0, 10.1, 10.9, 11.2, 11.3])
    progress = ProgressLog(lambda: next(times_s))
    with caplog.at_level(logging.INFO):
        for phase, frac in (("a", 0.1), ("a", 0.2), ("a", 0.3), ("a", 0.4), ("b", 0.0)):
            progress(phase, frac)
    assert caplog.messages == ["a, 10 %", "a, 40 %", "b"]


def test_the_engine_after_a_death_begins_with_what_was_proved(
    plan_start: Callable[..., StartPlan], tmp_path: Path
) -> None:
    plan = plan_start(no_profile=True)
    candidate = plan.spec.knobs.with_values({"token_budget": 512})
    before = {"token_budget": plan.spec.knobs.token_budget}
    reasons: list[str] = []

    async def live() -> None:
        senses = Senses(lambda: Telemetry(totals=EngineStats()), slo=Slo())
        link = EngineLink(
            plan,
            run_dir=tmp_path,
            max_queued=9,
            senses=senses,
            on_snapshot=lambda snapshot: None,
            on_lost=reasons.append,
        )
        link.supervisor._receive(KnobsApplied(change_id=1, knobs=candidate))
        assert link.supervisor._spec.knobs == link.board.knobs == candidate
        link._on_lost("it died")
        await link.have(before)
        assert link.supervisor._spec.knobs == link.board.knobs == plan.spec.knobs
        await link.stop()

    asyncio.run(live())
    assert reasons == ["it died"]
