"""Parts of the daemon that need no process: knobs without an engine, the log of progress."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsed.controller.engine_link import EngineLink
from sparsed.controller.http_server import bind_port
from sparsed.controller.logs import ProgressLog
from sparsed.controller.startup import StartPlan
from sparsed.controller.telemetry import Senses
from sparsed.core import (
    EngineStats,
    ExitCode,
    InputError,
    KnobsApplied,
    Slo,
    Snapshot,
    StartError,
)
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
        link.on_message(KnobsApplied(knobs=knobs, error="token_budget: too much"))
        assert link.board.knobs == plan.spec.knobs
        link.on_message(KnobsApplied(knobs=knobs))  # nobody waits for it any more
        assert link.board.knobs == knobs
        await link.stop()

    asyncio.run(hear())


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
