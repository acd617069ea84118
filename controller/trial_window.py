"""One window of a trial: what came of each request, what the engine and the device told."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from sparsed.core import (
    Direction,
    EngineFacts,
    EngineStats,
    FinishReason,
    Measurement,
    TokenBatch,
    TokenOutput,
    TrialStatus,
)
from sparsed.tuner.objective import TrialFailed


@dataclass(slots=True)
class _Timing:
    """One request; times of this process's monotonic clock."""

    sent_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    num_tokens: int = 0

    @property
    def tpot_s(self) -> float:
        return (self.last_s - self.first_s) / max(1, self.num_tokens - 1)


@dataclass(slots=True)
class TrialWindow:
    """Everything seen of one window so far."""

    started_s: float
    ended_s: float = 0.0
    hot_peak_bytes: int = 0
    hbm_peak_frac: float | None = None
    sparse_steps: int = 0
    timings: dict[str, _Timing] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)

    @property
    def num_tokens(self) -> int:
        return sum(timing.num_tokens for timing in self.timings.values())

    def expect(self, request_id: str, *, sent_s: float) -> None:
        self.timings[request_id] = _Timing(sent_s=sent_s)

    def look(self, stats: EngineStats, *, hbm_frac: float | None) -> None:
        """``hbm_frac`` of the device's memory is in use; None: not known."""
        self.hot_peak_bytes = max(self.hot_peak_bytes, stats.hot_used_bytes)
        if hbm_frac is not None:
            self.hbm_peak_frac = max(self.hbm_peak_frac or 0.0, hbm_frac)

    def take(self, batch: TokenBatch) -> None:
        now_s = time.monotonic()
        for output in batch.outputs:
            if timing := self.timings.get(output.request_id):
                self._take_one(output, timing=timing, now_s=now_s)

    def _take_one(self, output: TokenOutput, *, timing: _Timing, now_s: float) -> None:
        if output.token_id is not None:
            timing.first_s = timing.first_s or now_s
            timing.last_s, timing.num_tokens = now_s, timing.num_tokens + 1
        if output.finish_reason is FinishReason.ERROR:
            # Requests of a workload are sound: these knobs have no room for one.
            reason = output.error or "a request was refused"
            raise TrialFailed(reason, status=TrialStatus.INVALID_CONFIG)
        if output.finish_reason is not None:
            self.done.add(output.request_id)
            self.sparse_steps += output.sparse.sparse_steps if output.sparse else 0

    def measurement(
        self, *, before: EngineStats, after: EngineStats, link_bytes_per_s: float | None
    ) -> Measurement:
        """By the counters at both ends; ``link_bytes_per_s`` is the calibrated rate, None: no link."""
        timings = self.timings.values()
        samples = after.recall_samples - before.recall_samples
        hits, misses = after.hot_hits - before.hot_hits, after.hot_misses - before.hot_misses
        recall = (after.recall_sum - before.recall_sum) / samples if samples else None
        duration_s, h2d_bytes = self.ended_s - self.started_s, after.h2d_bytes - before.h2d_bytes
        return Measurement(
            duration_s=duration_s,
            output_tokens=self.num_tokens,
            ttft_s=tuple(timing.first_s - timing.sent_s for timing in timings),
            tpot_s=tuple(timing.tpot_s for timing in timings),
            sparse_steps=self.sparse_steps,
            attention_recall=recall,
            hot_hit_frac=hits / (hits + misses) if hits + misses else None,
            h2d_bytes=h2d_bytes,
            hot_peak_bytes=max(self.hot_peak_bytes, after.hot_used_bytes),
            hbm_peak_frac=self.hbm_peak_frac,
            link_busy_frac=h2d_bytes / (duration_s * link_bytes_per_s)
            if link_bytes_per_s
            else None,
        )


def link_rate(facts: EngineFacts) -> float | None:
    """Bytes per second of pages as this engine loads them; None on a CPU, which has no link."""
    loads = (entry.bytes_per_s for entry in facts.copies if entry.direction is Direction.H2D)
    return next(loads, None)
