"""Keeps an engine alive: start, watch, and start again with the same memory."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import zmq.asyncio

from sparsed.controller.engine_process import Ending, EngineProcess, WatchLimits
from sparsed.core import (
    EngineFacts,
    EngineFailed,
    EngineReady,
    EngineSpec,
    ExitCode,
    FailureCause,
    Knobs,
    KnobsApplied,
    StartError,
)
from sparsed.engine.wire import FromEngine, ToEngine

MAX_DEATHS = 5  # not forgiven, within the window
DEATHS_WINDOW_S = 300.0
MAX_BACK_OFF_S = 10.0

logger = logging.getLogger(__name__)


class Supervisor:
    """Owner of the engine process and of the memory file that holds the DRAM tier.

    Lives on the event loop; the caller holds the lock of ``run_dir``, which several may share. ``on_message`` gets every
    message but heartbeats, ``EngineReady`` of every new process included; ``on_lost`` gets the
    reason, once for each process that ended unasked; ``cause`` is what kind of reason it was.
    """

    def __init__(
        self,
        spec: EngineSpec,
        *,
        run_dir: Path,
        on_message: Callable[[FromEngine], None],
        on_lost: Callable[[str], None],
        limits: WatchLimits | None = None,
    ) -> None:
        self._spec = spec
        self._run_dir = run_dir
        self._on_message = on_message
        self._on_lost = on_lost
        self._limits = limits or WatchLimits()
        self._context = zmq.asyncio.Context()
        self._pool_fd = os.memfd_create("sparsed-kv")
        self._engine: EngineProcess | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._facts: asyncio.Future[EngineFacts] = asyncio.get_running_loop().create_future()
        self._failure: EngineFailed | None = None
        self._deaths_s: deque[float] = deque()
        self._stopping = False
        self.restarts = 0
        self.cause = FailureCause.OTHER  # of the latest end

    async def start(self) -> EngineFacts:
        """Start the engine and wait until it is loaded.

        Errors: StartError when it cannot load, with its own words and exit code; it is not
        tried again.
        """
        self._keeper = asyncio.create_task(self._keep_alive())
        either: set[asyncio.Future[Any]] = {self._keeper, self._facts}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._keeper.done():
            self._keeper.result()
        return self._facts.result()

    async def wait(self) -> None:
        """Return after ``stop``. StartError SOFTWARE: the engine died too often, we gave up."""
        assert self._keeper is not None, "start first"
        await asyncio.shield(self._keeper)

    def send(self, message: ToEngine) -> None:
        """Queue a message for the engine that is running now; lost if that one dies."""
        if self._engine is not None:
            self._engine.send(message)

    def restart_with(self, knobs: Knobs) -> None:
        """The next process begins with ``knobs``, whatever the last one had."""
        self._spec = replace(self._spec, knobs=knobs)

    def forgive(self, num_deaths: int) -> None:
        """Forget the latest ``num_deaths``, whose cause is known and gone; also from ``on_lost``,
        whose death is the latest one."""
        for _ in range(min(num_deaths, len(self._deaths_s))):
            self._deaths_s.pop()

    async def stop(self, timeout_s: float) -> None:
        """End the engine, by force after ``timeout_s``, and give its memory back."""
        self._stopping = True
        if self._engine is not None:
            await self._engine.stop(timeout_s)
        elif self._keeper is not None:  # between two engines
            self._keeper.cancel()
        if self._keeper is not None:
            await asyncio.wait({self._keeper})
        self._context.destroy(linger=0)
        os.close(self._pool_fd)

    async def _keep_alive(self) -> None:
        while not self._stopping:
            reason = await self._run_engine()
            if self._stopping:
                return
            self._raise_if_never_started(reason)
            logger.error("the engine is gone: %s", reason)
            self._deaths_s.append(time.monotonic())
            self._on_lost(reason)
            await asyncio.sleep(self._back_off_s(reason))
            self.restarts += 1

    async def _run_engine(self) -> str:
        self._failure = None
        self._engine = await EngineProcess.spawn(
            self._spec,
            context=self._context,
            endpoint=self._run_dir / f"engine.{secrets.token_hex(4)}.sock",
            pool_fd=self._pool_fd,
            on_message=self._receive,
            limits=self._limits,
        )
        try:
            ending = await self._engine.run()
        finally:
            self._engine = None
        if self._failure is not None:
            ending = Ending(self._failure.message, self._failure.cause)
        self.cause = ending.cause
        return ending.reason

    def _receive(self, message: FromEngine) -> None:
        if isinstance(message, EngineFailed):
            self._failure = message
        elif isinstance(message, KnobsApplied) and message.error is None:
            self.restart_with(message.knobs)
        elif isinstance(message, EngineReady):
            self._on_ready(message.facts)
        self._on_message(message)

    def _on_ready(self, facts: EngineFacts) -> None:
        if facts.calibration is not None:  # for the next process, which need not measure then
            self._spec = replace(self._spec, calibration=facts.calibration)
        if not self._facts.done():
            self._facts.set_result(facts)

    def _raise_if_never_started(self, reason: str) -> None:
        if self._facts.done():
            return
        if self._failure is None:
            raise StartError(
                f"the engine could not start: {reason}", code=ExitCode.SOFTWARE, cause=self.cause
            )
        raise StartError(reason, code=_exit_code(self._failure.exit_code), cause=self.cause)

    def _back_off_s(self, reason: str) -> float:
        """Seconds before the next try. StartError when there have been too many."""
        while self._deaths_s and self._deaths_s[0] < time.monotonic() - DEATHS_WINDOW_S:
            self._deaths_s.popleft()
        if len(self._deaths_s) > MAX_DEATHS:
            raise StartError(
                f"the engine died {len(self._deaths_s)} times within {DEATHS_WINDOW_S:.0f} s, "
                f"last because {reason}",
                code=ExitCode.SOFTWARE,
            )
        return min(0.05 * 2.0 ** len(self._deaths_s), MAX_BACK_OFF_S)


def _exit_code(number: int) -> ExitCode:
    return ExitCode(number) if number in set(ExitCode) else ExitCode.SOFTWARE
