"""The time that a study may take."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sparsed.tuner.objective import OutOfTime

Result = TypeVar("Result")


class TimeBudget:
    """Counts from its making. ``max_s`` None: no end."""

    def __init__(self, max_s: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_s = math.inf if max_s is None else max_s
        self._clock = clock
        self._started_s = clock()

    @property
    def left_s(self) -> float:
        return max(0.0, self._max_s - (self._clock() - self._started_s))

    @property
    def left_frac(self) -> float:
        return 1.0 if math.isinf(self._max_s) else self.left_s / self._max_s

    async def within(
        self, work: Callable[[], Awaitable[Result]], *, on_cut: Callable[[], Awaitable[None]]
    ) -> Result:
        """What ``work`` gives; OutOfTime, after ``on_cut``, if it does not end in the time that
        is left. With none left it is not begun."""
        left_s = self.left_s
        if left_s <= 0:
            raise OutOfTime
        try:
            async with asyncio.timeout(None if math.isinf(left_s) else left_s):
                return await work()
        except TimeoutError:
            await on_cut()
            raise OutOfTime from None
