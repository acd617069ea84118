"""The profiler's window: engine statistics in, one Snapshot a second out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sparsed.core import EngineStats, HbmUse, HostGauges, Snapshot
from sparsed.profiler.context import HORIZON_S, ContextMeter
from sparsed.profiler.counters import advance
from sparsed.profiler.span import Span

INTERVAL_S = 1.0
STALE_INTERVALS = 3
STALE_S = STALE_INTERVALS * INTERVAL_S  # what is older tells nothing of now
MIN_WINDOW_S = 0.02  # the shortest any source can fill; shorter windows have no rates


class Window:
    """Differences of the engine's counters between two reports, with the clock's time between.

    Call ``close`` for every report that arrives, ``observe_arrival`` for every request that is
    taken, and ``observe_request`` for every one that ends. One thread. ``clock`` gives seconds and
    only runs forward; ``horizon_s``: seconds that the context of a Snapshot covers.
    """

    def __init__(self, *, clock: Callable[[], float], horizon_s: float = HORIZON_S) -> None:
        self._clock = clock
        self._last = EngineStats()
        self._totals = EngineStats()
        self._span = Span(self._totals, started_s=clock())
        self._latest: Snapshot | None = None
        self._context = ContextMeter(horizon_s=horizon_s)

    @property
    def totals(self) -> EngineStats:
        """Counters since the window began, over every engine; they never go back."""
        return self._totals

    def observe_arrival(self, *, input_tokens: int) -> None:
        """A request was taken."""
        self._span.add_arrival(input_tokens=input_tokens)

    def observe_request(self, *, ttft_s: float, tpot_s: float | None, output_tokens: int) -> None:
        """A request ended; ``tpot_s`` None: it had fewer than two tokens."""
        self._span.add_request(ttft_s=ttft_s, tpot_s=tpot_s, output_tokens=output_tokens)

    def close(
        self,
        stats: EngineStats,
        *,
        ended_at: float,
        host: HostGauges | None = None,
        hbm: HbmUse | None = None,
    ) -> Snapshot | None:
        """End the window with the report that just arrived; ``ended_at`` is epoch seconds.

        None: the window is too short to have rates, and what it counted goes into the next.
        """
        self._totals = advance(self._totals, before=self._last, now=stats)
        self._last = stats
        self._span.add_steps(stats.recent_step_s)
        now_s = self._clock()
        if now_s - self._span.started_s < MIN_WINDOW_S:
            return None
        snapshot = self._span.close(
            self._totals, now_s=now_s, ended_at=ended_at, host=host or HostGauges(), hbm=hbm
        )
        span, self._span = self._span, Span(self._totals, started_s=now_s)
        context = self._context.add(
            snapshot, input_tokens=span.input_tokens, output_tokens=span.output_tokens
        )
        snapshot = self._latest = replace(snapshot, context=context)
        return snapshot

    def skip(self, stats: EngineStats) -> None:
        """Take a report whose time belongs to no window: nobody looked. The next begins here."""
        self._totals = advance(self._totals, before=self._last, now=stats)
        self._last = stats
        self._span = Span(self._totals, started_s=self._clock())
        self._latest = None

    def latest(self) -> Snapshot | None:
        """The last window; None once three intervals have passed without a new report."""
        age_s = self._clock() - self._span.started_s
        return self._latest if age_s <= STALE_S else None
