"""The daemon's senses: the profiler's window, its gauges and its metrics, kept together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from sparsed import __version__
from sparsed.controller.control import LoadState
from sparsed.core import (
    EngineSpec,
    EngineStats,
    HbmUse,
    HostGauges,
    MemoryPlan,
    RefusalCount,
    RefusalReason,
    Slo,
    Snapshot,
)
from sparsed.profiler.collectors.gauges import open_gauges
from sparsed.profiler.context import HORIZON_S
from sparsed.profiler.export import Exporter, LoadMetrics, Telemetry
from sparsed.profiler.occupancy import occupancy
from sparsed.profiler.window import STALE_INTERVALS, STALE_S, Window

GAUGES_PERIOD_S = 1.0
NUM_WINDOWS = STALE_INTERVALS  # kept for a verdict, which says which of them are too old

logger = logging.getLogger(__name__)


def info_labels(spec: EngineSpec, *, name: str) -> dict[str, str]:
    """Labels of ``sparsed_info``; ``name``: of the model, as it is served."""
    return {
        "version": __version__,
        "model": name,
        "device": spec.device,
        "dtype": spec.dtype,
        "selections": "replayed" if spec.selection_trace else "own",
    }


def load_metrics(load: LoadState, *, num_reverts: int, revert_s: float) -> LoadMetrics:
    return LoadMetrics(
        regime_id=load.current,
        num_regimes=len(load.regimes),
        num_verified=sum(bool(one.incumbent) for one in load.regimes),
        loss_frac=load.loss_frac,
        has_drifted=bool(load.drift),
        num_reverts=num_reverts,
        revert_s=revert_s,
    )


class Senses:
    """Window and metrics of the engine, gauges of the host. Lives on the event loop.

    ``read`` gives what a scrape shows; it is asked only by ``metrics``. ``gpu_plan``: what is
    planned for the memory of a GPU, None on a CPU. ``horizon_s``: see ``Window``. Gauges that are
    older than ``STALE_S`` are left out of windows, and ``faults`` says so. While it is switched off
    there are no windows and no gauges, and requests alone are counted.
    """

    def __init__(
        self,
        read: Callable[[], Telemetry],
        *,
        slo: Slo,
        gpu_plan: MemoryPlan | None = None,
        horizon_s: float = HORIZON_S,
    ) -> None:
        self._window = Window(clock=time.monotonic, horizon_s=horizon_s)
        self._exporter = Exporter(read, slo=slo)
        self._host = HostGauges()
        self._host_read_s: float | None = None
        self._has_report = False
        self._reported_s: float | None = None
        self._gpu_plan = gpu_plan
        self._weights_bytes = gpu_plan.weights_bytes if gpu_plan else 0
        self._windows: deque[Snapshot] = deque(maxlen=NUM_WINDOWS)
        self._is_on = True
        self._is_resuming = False
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
        """The last window; None when the engine has not reported for three seconds, or while
        switched off."""
        return self._window.latest() if self._is_on else None

    @property
    def windows(self) -> tuple[Snapshot, ...]:
        """The last windows, the oldest first, however old they are."""
        return tuple(self._windows)

    def switch(self, is_on: bool) -> None:
        """Measure from now on, or no longer."""
        if is_on == self._is_on:
            return
        self._is_on, self._is_resuming = is_on, is_on
        self._windows.clear()
        if is_on:  # reports and gauges are due from now on
            now_s = time.monotonic()
            self._reported_s = self._reported_s and now_s
            self._host, self._host_read_s = HostGauges(), self._host_read_s and now_s

    @property
    def faults(self) -> tuple[str, ...]:
        """Sources that have fallen silent, in words. Call it while an engine runs."""
        if not self._is_on:
            return ()
        sources = (
            ("the engine has not reported", self._reported_s),
            ("the gauges of host and GPU have not been read", self._host_read_s),
        )
        ages = [(words, time.monotonic() - at_s) for words, at_s in sources if at_s is not None]
        return tuple(f"{words} for {age_s:.0f} s" for words, age_s in ages if age_s > STALE_S)

    def on_engine_ready(self, *, weights_bytes: int) -> None:
        """An engine is loaded, with so many bytes of weights: reports are due from now on."""
        self._weights_bytes = weights_bytes
        self._reported_s = time.monotonic()

    def on_stats(self, stats: EngineStats) -> Snapshot | None:
        """Close the window with the engine's report of this second; None where that was none."""
        self._has_report = True
        self._reported_s = time.monotonic()
        if not self._is_on or self._is_resuming:
            self._is_resuming = False
            self._window.skip(stats)
            return None
        for event in stats.recent_quality:
            reads = "everything" if event.is_dense else f"{event.token_budget} tokens"
            logger.warning(
                "attention recall of %s is %.2f: it reads %s from now on",
                event.request_id,
                event.recall,
                reads,
            )
        self._exporter.observe_steps(stats.recent_step_s)
        host = self._fresh_host()
        snapshot = self._window.close(
            stats, ended_at=time.time(), host=host, hbm=self._hbm_use(stats, host)
        )
        if snapshot is not None:
            self._windows.append(snapshot)
        return snapshot

    def observe_arrival(self, *, input_tokens: int) -> None:
        self._window.observe_arrival(input_tokens=input_tokens)

    def observe_request(self, *, ttft_s: float, tpot_s: float | None, output_tokens: int) -> None:
        self._window.observe_request(ttft_s=ttft_s, tpot_s=tpot_s, output_tokens=output_tokens)
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
        """Read the gauges once a second, until cancelled; on a thread, for NVML may block. Rates
        are since the reading before, so the first one after a pause is not kept."""
        loop = asyncio.get_running_loop()
        with (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="gauges") as thread,
            open_gauges(read_pids, gpu_index=gpu_index, clock=time.monotonic) as read,
        ):
            has_paused = False
            while True:
                if self._is_on:
                    gauges = await loop.run_in_executor(thread, read)
                    kept = HostGauges() if has_paused else gauges
                    self._host = replace(kept, read_at=time.time())
                    self._host_read_s = time.monotonic()
                has_paused = not self._is_on
                await asyncio.sleep(GAUGES_PERIOD_S)

    def _fresh_host(self) -> HostGauges:
        read_s = self._host_read_s
        is_fresh = read_s is not None and time.monotonic() - read_s <= STALE_S
        return self._host if is_fresh else HostGauges()

    def _hbm_use(self, stats: EngineStats, host: HostGauges) -> HbmUse | None:
        if self._gpu_plan is None:
            return None
        return occupancy(
            self._gpu_plan,
            host,
            weights_bytes=self._weights_bytes,
            peak_bytes=stats.hbm_peak_bytes,
        )
