"""An engine for trials with an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

from sparsed.controller.time_budget import TimeBudget
from sparsed.controller.trials import EngineBench
from sparsed.core import TrialStatus
from sparsed.tuner.objective import TrialFailed

Result = TypeVar("Result")


class BenchThread:
    """Runs one piece of work of ``bench`` at a time. The thread keeps the times of arrival honest:
    neither what another device does between its windows nor a model that is fitted meanwhile holds
    this loop. Used from one other thread, which closes it in the end.
    """

    def __init__(self, bench: EngineBench, *, budget: TimeBudget) -> None:
        self.bench = bench
        self._budget = budget
        self._work: asyncio.Task[None] | None = None  # of the loop's thread alone
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def begin(
        self,
        work: Callable[[], Awaitable[Result]],
        *,
        tell: Callable[[Result | Exception], None],
    ) -> None:
        """Returns at once; ``tell`` gets the result, or the error, OutOfTime at the end of the
        budget among them, in the thread of the loop; TrialFailed for work that something else than
        ``stop`` cancelled. It is not called after ``stop``."""
        asyncio.run_coroutine_threadsafe(self._run(work, tell=tell), self._loop)

    def run(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Begin, and wait for the result."""
        ends: SimpleQueue[Result | Exception] = SimpleQueue()
        self.begin(work, tell=ends.put)
        ended = ends.get()
        if isinstance(ended, Exception):
            raise ended
        return ended

    def stop(self) -> Future[None]:
        """Give up what is running and end the engine; done once both are gone."""
        return asyncio.run_coroutine_threadsafe(self._stop(), self._loop)

    def close(self) -> None:
        """After ``stop``: end the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _run(
        self,
        work: Callable[[], Awaitable[Result]],
        *,
        tell: Callable[[Result | Exception], None],
    ) -> None:
        self._work = task = asyncio.current_task()
        assert task is not None
        try:
            ended: Result | Exception = await self._budget.within(work, on_cut=self.bench.close)
        except asyncio.CancelledError:
            if task.cancelling():  # by ``stop``, and nobody waits any more
                raise
            message = f"the work on {self.bench.device} was cancelled from within"
            ended = TrialFailed(message, status=TrialStatus.ENGINE_ERROR)
        except Exception as error:  # noqa: BLE001  # whoever waits for it raises it
            ended = error
        tell(ended)

    async def _stop(self) -> None:
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait({self._work})
        await self.bench.close()


def stop_all(threads: tuple[BenchThread, ...]) -> None:
    """At once, for each may take its time."""
    for stopping in [thread.stop() for thread in threads]:
        stopping.result()
