"""Whether the client itself keeps up: how late its event loop wakes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

PERIOD_S: Final = 0.01


@asynccontextmanager
async def watch_lag() -> AsyncIterator[Sequence[float]]:
    """Seconds by which each wake-up was late; the sequence grows until the context ends.

    Nothing is measured more exactly than this: a token that arrives while the loop is late is
    seen late.
    """
    lags_s: list[float] = []
    task = asyncio.create_task(_watch(lags_s))
    try:
        yield lags_s
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _watch(lags_s: list[float]) -> None:
    while True:
        due_s = time.perf_counter() + PERIOD_S
        await asyncio.sleep(PERIOD_S)
        lags_s.append(max(0.0, time.perf_counter() - due_s))
