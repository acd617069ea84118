"""The supervisor over real engine processes that are killed, stopped and starved."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from sparsed.controller.engine_process import WatchLimits, ending_of
from sparsed.controller.startup import StartPlan
from sparsed.controller.supervisor import MAX_DEATHS, Supervisor
from sparsed.core import (
    AddRequest,
    ApplyKnobs,
    EngineReady,
    EngineSpec,
    EngineStats,
    ExitCode,
    FailureCause,
    KnobsApplied,
    SamplingParams,
    StartError,
    TokenBatch,
)
from sparsed.engine.wire import FromEngine

Message = TypeVar("Message")
LIMITS = WatchLimits(silence_s=3.0)


class Watcher:
    """A supervisor, with what it said."""

    def __init__(
        self,
        spec: EngineSpec,
        *,
        run_dir: Path,
        forgiven: Callable[[int], int] = lambda num_lost: 0,
    ) -> None:
        self.messages: asyncio.Queue[FromEngine] = asyncio.Queue()
        self.lost: list[str] = []
        self._forgiven = forgiven
        self.supervisor = Supervisor(
            spec,
            run_dir=run_dir,
            on_message=self.messages.put_nowait,
            on_lost=self._on_lost,
            limits=LIMITS,
        )

    def _on_lost(self, reason: str) -> None:
        self.lost.append(reason)
        self.supervisor.forgive(self._forgiven(len(self.lost)))

    async def until(self, kind: type[Message]) -> Message:
        """The next message of ``kind``; others are skipped."""
        async with asyncio.timeout(60):
            while True:
                message = await self.messages.get()
                if isinstance(message, kind):
                    return message


def request(name: str) -> AddRequest:
    return AddRequest(
        request_id=name,
        prompt_tokens=(1, 2, 3),
        sampling=SamplingParams(max_tokens=1, temperature=0.0),
    )


@pytest.mark.slow
def test_an_engine_that_is_killed_or_hangs_comes_back(
    plan_start: Callable[..., StartPlan], tmp_path: Path
) -> None:
    plan = plan_start()

    async def live() -> None:
        watcher = Watcher(plan.spec, run_dir=tmp_path)
        facts = await watcher.supervisor.start()
        watcher.supervisor.send(request("one"))
        (first,) = (await watcher.until(TokenBatch)).outputs
        knobs = plan.spec.knobs.with_values({"token_budget": 512})
        watcher.supervisor.send(ApplyKnobs(change_id=1, knobs=knobs))
        assert (await watcher.until(KnobsApplied)).knobs == knobs

        os.kill(facts.pid, signal.SIGKILL)
        second = (await watcher.until(EngineReady)).facts
        assert second.pid != facts.pid
        assert watcher.lost == ["it was killed by SIGKILL"]
        assert watcher.supervisor.cause is FailureCause.KILLED
        watcher.supervisor.send(request("one"))
        (again,) = (await watcher.until(TokenBatch)).outputs
        assert again.token_id == first.token_id
        assert (await watcher.until(EngineStats)).knobs == knobs  # live knobs outlive an engine

        os.kill(second.pid, signal.SIGSTOP)
        third = (await watcher.until(EngineReady)).facts
        assert watcher.lost[1].startswith("it was silent for")
        assert watcher.supervisor.cause is FailureCause.HANG
        assert not psutil.pid_exists(second.pid)
        assert watcher.supervisor.restarts == 2
        await watcher.supervisor.stop(10.0)
        assert not psutil.pid_exists(third.pid)
        assert not list(tmp_path.glob("*.sock"))
        await watcher.supervisor.wait()

    asyncio.run(live())


@pytest.mark.parametrize(
    ("returncode", "oom_kills", "cause"),
    [
        (-signal.SIGKILL, (3, 4), FailureCause.HOST_MEMORY),
        (-signal.SIGKILL, (3, 3), FailureCause.KILLED),
        (-signal.SIGKILL, (None, None), FailureCause.KILLED),
        (-signal.SIGKILL, (None, 1), FailureCause.KILLED),
        (-signal.SIGTERM, (3, 4), FailureCause.OTHER),
        (1, (3, 4), FailureCause.OTHER),
    ],
)
def test_a_sigkill_is_the_kernels_only_where_it_counted_one(
    returncode: int, oom_kills: tuple[int | None, int | None], cause: FailureCause
) -> None:
    assert ending_of(returncode, oom_kills=oom_kills).cause is cause


@pytest.mark.slow
def test_an_engine_that_cannot_load_says_why(
    plan_start: Callable[..., StartPlan], tmp_path: Path
) -> None:
    spec = replace(plan_start().spec, model=str(tmp_path / "nothing"))

    async def live() -> None:
        watcher = Watcher(spec, run_dir=tmp_path)
        try:
            await watcher.supervisor.start()
        finally:
            await watcher.supervisor.stop(5.0)

    with pytest.raises(StartError, match="nothing") as caught:
        asyncio.run(live())
    assert caught.value.code is ExitCode.DATA


@pytest.mark.slow
def test_an_engine_that_always_dies_is_given_up(
    plan_start: Callable[..., StartPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsed.controller.supervisor.MAX_BACK_OFF_S", 0.01)
    plan = plan_start()

    async def kill_children() -> None:
        while True:
            for child in psutil.Process().children():
                with suppress(psutil.NoSuchProcess):  # it ended meanwhile
                    child.kill()
            await asyncio.sleep(0.02)

    async def live() -> Watcher:
        watcher = Watcher(plan.spec, run_dir=tmp_path)
        await watcher.supervisor.start()
        killer = asyncio.create_task(kill_children())
        with pytest.raises(StartError, match="died 6 times") as caught:
            await watcher.supervisor.wait()
        assert caught.value.code is ExitCode.SOFTWARE
        killer.cancel()
        await watcher.supervisor.stop(5.0)
        return watcher

    watcher = asyncio.run(live())
    assert len(watcher.lost) == MAX_DEATHS + 1


@pytest.mark.slow
def test_forgiven_deaths_do_not_end_it(
    plan_start: Callable[..., StartPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third death explains two others as well."""
    monkeypatch.setattr("sparsed.controller.supervisor.MAX_BACK_OFF_S", 0.01)
    plan = plan_start()

    async def live() -> None:
        watcher = Watcher(
            plan.spec, run_dir=tmp_path, forgiven=lambda num_lost: 0 if num_lost % 3 else 2
        )
        await watcher.supervisor.start()
        async with asyncio.timeout(60):
            while watcher.supervisor.restarts < MAX_DEATHS + 4:
                for child in psutil.Process().children():
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
                await asyncio.sleep(0.02)
        watcher.supervisor.forgive(100)  # harmless
        await watcher.supervisor.stop(0.0)

    asyncio.run(live())


@pytest.mark.slow
def test_stop_while_loading_leaves_nothing_behind(
    plan_start: Callable[..., StartPlan], tmp_path: Path
) -> None:
    plan = plan_start()

    async def live() -> None:
        watcher = Watcher(plan.spec, run_dir=tmp_path)
        starting = asyncio.create_task(watcher.supervisor.start())
        await asyncio.sleep(0.5)
        starting.cancel()
        await watcher.supervisor.stop(0.0)
        assert not psutil.Process().children()

    asyncio.run(live())
