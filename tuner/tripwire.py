"""What ends a candidate at once, and what windows are worth; pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median, stdev

from sparsed.core import (
    AcceptanceWindow,
    Guard,
    RolloutReason,
    Slo,
    Snapshot,
    TrialStatus,
)
from sparsed.tuner.rollout_state import Candidate, RolloutRule
from sparsed.tuner.targets import breaks_target, misses_targets

MAX_BREACHES = 2  # windows of the profiler in a row
CUSUM_SLACK = 0.5  # deviations that count as nothing
CUSUM_LIMIT = 5.0  # deviations
MIN_DEVIATION = 0.02  # of the logarithm of the time per token


def is_over_hbm(snapshot: Snapshot, rule: RolloutRule) -> bool:
    used, total = snapshot.host.gpu_used_bytes, snapshot.host.gpu_total_bytes
    return used is not None and bool(total) and used > rule.hbm_soft_frac * (total or 0)


def trip(candidate: Candidate, snapshot: Snapshot, rule: RolloutRule) -> RolloutReason | None:
    """What this window, already counted in ``candidate``, says against going on."""
    if candidate.breaches >= MAX_BREACHES:
        return RolloutReason.SLO_BREACH
    if candidate.failures:
        return RolloutReason.ERRORS
    if snapshot.num_waiting - candidate.turn_waiting > rule.max_queue_growth:
        return RolloutReason.QUEUE_GROWTH
    return RolloutReason.HBM_OVER_LIMIT if is_over_hbm(snapshot, rule) else None


def count(candidate: Candidate, snapshot: Snapshot, *, failures: int, slo: Slo) -> Candidate:
    """``candidate`` after one more window, and requests that failed since the one before.

    Targets that were missed before it came into force are not its fault while they still are; those
    that its test is to repair never are.
    """
    is_broken = breaks_target(snapshot, slo)
    is_armed = candidate.is_armed or not is_broken
    is_fault = is_broken and is_armed and not candidate.repairs
    breaches = candidate.breaches + 1 if is_fault else 0
    failures += candidate.failures
    candidate = replace(candidate, breaches=breaches, failures=failures, is_armed=is_armed)
    if candidate.turn_s is None:  # the knobs came into force within this window
        return replace(candidate, turn_s=0.0, turn_waiting=snapshot.num_waiting)
    return replace(
        candidate,
        turn_s=candidate.turn_s + snapshot.window_s,
        seen=(*candidate.seen, snapshot),
    )


def figures(seen: Sequence[Snapshot], *, failures: int) -> dict[str, float | None]:
    """Figures of a paired window, of the seconds in it: those that ``AcceptanceRule`` names.

    Quality is 1 where nothing was selected, so every token was read.
    """
    recalls = [item.attention_recall for item in seen]
    has_selected = any(item.hot_hit_frac is not None for item in seen)
    finished = sum(item.requests_finished for item in seen)
    seconds = sum(item.window_s for item in seen)
    tokens = sum(item.generated_tokens_per_s * item.window_s for item in seen)
    ended = failures + finished
    quality = middle(recalls)
    return {
        "output_tokens_per_s": tokens / seconds if seconds else None,
        Guard.TTFT.value: middle([item.ttft_p95_s for item in seen]),
        Guard.TPOT.value: middle([item.tpot_p95_s for item in seen]),
        Guard.ERRORS.value: failures / ended if ended else None,
        Guard.QUALITY.value: 1.0 if quality is None and not has_selected else quality,
    }


def status_of(seen: Sequence[Snapshot], slo: Slo) -> TrialStatus:
    """A window is broken where most of its seconds that tell of a target miss it."""
    return TrialStatus.SLO_BROKEN if misses_targets(seen, slo) else TrialStatus.OK


def middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def usual_tpot(windows: Sequence[AcceptanceWindow]) -> tuple[float, float] | None:
    """Mean and deviation of the logarithm of the time per token; None of fewer than two figures."""
    known = [window.metrics.get(Guard.TPOT.value) for window in windows]
    logs = [math.log(value) for value in known if value]
    return (fmean(logs), max(stdev(logs), MIN_DEVIATION)) if len(logs) > 1 else None


def cusum(excess: float, tpot_s: float | None, *, usual: tuple[float, float] | None) -> float:
    """The cumulated sum after one more window. It goes by the time per token: throughput follows
    the load, and every evening would look like a regression."""
    if usual is None or not tpot_s:
        return excess
    mean, deviation = usual
    return max(0.0, excess + (math.log(tpot_s) - mean) / deviation - CUSUM_SLACK)
