"""A stretch of time under measurement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from sparsed.core import EngineStats, HbmUse, HostGauges, Snapshot, WaitCount
from sparsed.profiler.counters import difference


class Span:
    """Collects samples from its start on; ``close`` turns them into one Snapshot.

    ``totals`` are the engine's counters at the start, as ``counters.advance`` keeps them, and
    ``started_s`` is the start on a clock that only runs forward.
    """

    def __init__(self, totals: EngineStats, *, started_s: float) -> None:
        self.started_s = started_s
        self._totals = totals
        self._step_s: list[float] = []
        self._ttft_s: list[float] = []
        self._tpot_s: list[float] = []
        self.input_tokens: list[int] = []  # of the requests that came
        self.output_tokens: list[int] = []  # of those that finished

    def add_steps(self, step_s: Iterable[float]) -> None:
        self._step_s.extend(step_s)

    def add_arrival(self, *, input_tokens: int) -> None:
        self.input_tokens.append(input_tokens)

    def add_request(self, *, ttft_s: float, tpot_s: float | None, output_tokens: int) -> None:
        self.output_tokens.append(output_tokens)
        self._ttft_s.append(ttft_s)
        if tpot_s is not None:
            self._tpot_s.append(tpot_s)

    def close(
        self,
        totals: EngineStats,
        *,
        now_s: float,
        ended_at: float,
        host: HostGauges,
        hbm: HbmUse | None = None,
    ) -> Snapshot:
        """The figures from the start to ``now_s``, which must lie after it."""
        window_s = now_s - self.started_s
        grown = difference(self._totals, now=totals)
        step_s, ttft_s, tpot_s = sorted(self._step_s), sorted(self._ttft_s), sorted(self._tpot_s)
        return Snapshot(
            ended_at=ended_at,
            window_s=window_s,
            steps=grown.steps,
            step_p50_s=percentile(step_s, 0.50),
            step_p95_s=percentile(step_s, 0.95),
            step_p99_s=percentile(step_s, 0.99),
            prompt_tokens_per_s=grown.prompt_tokens / window_s,
            generated_tokens_per_s=grown.generated_tokens / window_s,
            hot_hit_frac=_ratio(grown.hot_hits, grown.hot_hits + grown.hot_misses),
            misses_per_step=_ratio(grown.hot_misses, grown.steps),
            miss_bytes_per_step=_ratio(grown.h2d_bytes, grown.steps),
            h2d_bytes=grown.h2d_bytes,
            d2h_bytes=grown.d2h_bytes,
            h2d_gb_per_s=_ratio(grown.h2d_bytes / 1e9, grown.h2d_s),
            d2h_gb_per_s=_ratio(grown.d2h_bytes / 1e9, grown.d2h_s),
            attention_recall=_ratio(grown.recall_sum, grown.recall_samples),
            num_running=grown.num_running,
            num_waiting=grown.num_waiting,
            hot_used_frac=_ratio(grown.hot_used_bytes, grown.hot_total_bytes) or 0.0,
            dram_used_frac=_ratio(grown.dram_used_bytes, grown.dram_total_bytes) or 0.0,
            working_set_pages=grown.working_set_pages,
            working_set_bytes=grown.working_set_bytes,
            metadata_bytes=grown.metadata_bytes,
            requests_finished=grown.requests_finished,
            ttft_p50_s=percentile(ttft_s, 0.50),
            ttft_p95_s=percentile(ttft_s, 0.95),
            tpot_p50_s=percentile(tpot_s, 0.50),
            tpot_p95_s=percentile(tpot_s, 0.95),
            host=host,
            knobs=grown.knobs,
            step_s=grown.step_s,
            selected_pages_per_step=_ratio(grown.hot_hits + grown.hot_misses, grown.steps),
            exposed_s_per_step=_ratio(grown.exposed_s, grown.timed_steps),
            waiting=_waiting(totals),
            hbm=hbm,
            recall_samples=grown.recall_samples,
        )


def _waiting(stats: EngineStats) -> tuple[WaitCount, ...]:
    reasons = Counter(one.reason for one in stats.waiting)
    return tuple(WaitCount(reason=reason, count=count) for reason, count in reasons.most_common())


def percentile(ordered: Sequence[float], frac: float) -> float | None:
    """Linear between the two nearest ranks; ``ordered`` ascends; None if it is empty."""
    if not ordered:
        return None
    rank = frac * (len(ordered) - 1)
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None
