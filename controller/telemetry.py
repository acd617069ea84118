"""The daemon's senses: the profiler's window, its gauges and its metrics, kept together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from sparsed.core import EngineStats, HostGauges, RefusalCount, RefusalReason, Slo, Snapshot
from sparsed.profiler.collectors.gauges import open_gauges
from sparsed.profiler.export import Exporter, Telemetry
from sparsed.profiler.window import Window

GAUGES_PERIOD_S = 1.0

logger = logging.getLogger(__name__)


class Senses:
    """Window and metrics of the engine, gauges of the host. Lives on the event loop.

    ``read`` gives what a scrape shows; it is asked only by ``metrics``.
    """

    def __init__(self, read: Callable[[], Telemetry], *, slo: Slo) -> None:
        self._window = Window(clock=time.monotonic)
        self._exporter = Exporter(read, slo=slo)
        self._host = HostGauges()
        self._has_report = False
        self._refused: Counter[RefusalReason] = Counter()

    @property
    def totals(self) -> EngineStats:
        """Counters over every engine of this daemon, and what it has refused itself."""
        totals = self._window.totals
        counts = Counter({one.reason: one.count for one in totals.refusals}) + self._refused
        refusals = tuple(RefusalCount(reason=why, count=count) for why, count in counts.items())
        return replace(totals, refusals=refusals)

    @property
    def stats(self) -> EngineStats | None:
        """``totals``, with the gauges of the last report; None before the first."""
        return self.totals if self._has_report else None

    @property
    def snapshot(self) -> Snapshot | None:
        """The last window; None when the engine has not reported for three seconds."""
        return self._window.latest()

    def on_stats(self, stats: EngineStats) -> Snapshot | None:
        """Close the window with the engine's report of this second."""
        self._has_report = True
        for event in stats.recent_quality:
            reads = "everything" if event.is_dense else f"{event.token_budget} tokens"
            logger.warning(
                "attention recall of %s is %.2f: it reads %s from now on",
                event.request_id,
                event.recall,
                reads,
            )
        self._exporter.observe_steps(stats.recent_step_s)
        return self._window.close(stats, ended_at=time.time(), host=self._host)

    def observe_request(self, *, ttft_s: float, tpot_s: float | None) -> None:
        self._window.observe_request(ttft_s=ttft_s, tpot_s=tpot_s)
        self._exporter.observe_request(ttft_s=ttft_s, tpot_s=tpot_s)

    def observe_refusal(self, reason: RefusalReason) -> None:
        """A request that no engine will see."""
        self._refused[reason] += 1

    def metrics(self) -> bytes:
        """Prometheus text of now."""
        return self._exporter.render()

    async def watch_host(
        self, read_pids: Callable[[], Iterable[int]], *, gpu_index: int | None
    ) -> None:
        """Read the gauges once a second, until cancelled; on a thread, for NVML may block."""
        loop = asyncio.get_running_loop()
        with (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="gauges") as thread,
            open_gauges(read_pids, gpu_index=gpu_index, clock=time.monotonic) as read,
        ):
            while True:
                self._host = await loop.run_in_executor(thread, read)
                await asyncio.sleep(GAUGES_PERIOD_S)
