"""Windows of a second become rollups of a minute and of an hour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from sparsed.core import Snapshot

MINUTE_S: Final = 60
HOUR_S: Final = 3600
RETENTION_S: Final[Mapping[int, float]] = {MINUTE_S: 7 * 86400.0, HOUR_S: 180 * 86400.0}
MAX_DECISIONS: Final = 1000
ROLLUP_METRICS: Final = (
    "step_p50_s",
    "step_p95_s",
    "prompt_tokens_per_s",
    "generated_tokens_per_s",
    "hot_hit_frac",
    "misses_per_step",
    "miss_bytes_per_step",
    "h2d_bytes",
    "d2h_bytes",
    "h2d_gb_per_s",
    "d2h_gb_per_s",
    "attention_recall",
    "num_running",
    "num_waiting",
    "hot_used_frac",
    "dram_used_frac",
    "working_set_bytes",
    "metadata_bytes",
    "ttft_p95_s",
    "tpot_p95_s",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollup:
    """One metric over one period; windows without the figure are not counted."""

    period_s: int
    started_at: float  # end of the first window in it
    metric: str
    num_samples: int
    mean: float
    p50: float
    p95: float


class RollupBuilder:
    """Collects windows of one period. Not thread-safe; time is the windows' own."""

    def __init__(self, period_s: int) -> None:
        self._period_s = period_s
        self._windows: list[Snapshot] = []

    def add(self, snapshot: Snapshot) -> tuple[Rollup, ...]:
        """Add a window; returns the rollups of the period it closes, mostly none."""
        finished: tuple[Rollup, ...] = ()
        if self._windows and self._slot(snapshot) != self._slot(self._windows[0]):
            finished = self.flush()
        self._windows.append(snapshot)
        return finished

    def flush(self) -> tuple[Rollup, ...]:
        """The rollups of the unfinished period; begins a new one."""
        windows, self._windows = self._windows, []
        rollups = (self._roll(metric, windows) for metric in ROLLUP_METRICS)
        return tuple(rollup for rollup in rollups if rollup is not None)

    def _slot(self, snapshot: Snapshot) -> int:
        return int(snapshot.ended_at // self._period_s)

    def _roll(self, metric: str, windows: Sequence[Snapshot]) -> Rollup | None:
        samples = sorted(
            float(value) for window in windows if (value := getattr(window, metric)) is not None
        )
        if not samples:
            return None
        return Rollup(
            period_s=self._period_s,
            started_at=windows[0].ended_at,
            metric=metric,
            num_samples=len(samples),
            mean=fmean(samples),
            p50=nearest_rank(samples, 0.50),
            p95=nearest_rank(samples, 0.95),
        )


def nearest_rank(ordered: Sequence[float], frac: float) -> float:
    """The nearest-rank percentile of sorted, non-empty values."""
    return ordered[min(len(ordered) - 1, int(frac * len(ordered)))]
