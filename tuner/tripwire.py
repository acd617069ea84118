"""What ends a candidate at once, and what windows are worth; pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median, stdev

from sparsed.core import (
    AcceptanceWindow,
    Guard,
    KnobValue,
    RolloutReason,
    Slo,
    Snapshot,
    TrialStatus,
)
from sparsed.tuner.rollout_state import Candidate, RolloutRule, Values
from sparsed.tuner.targets import has_selected, is_low, is_mostly_late, mean_recall, missed, told

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


def count(
    candidate: Candidate, snapshot: Snapshot, *, failures: int, slo: Slo, recall: float | None
) -> Candidate:
    """``candidate`` after one more window, and requests that failed since the one before.
    ``recall``: the mean of the samples since its knobs are in force, None of too few.

    A target that was missed before it came into force is not its fault while it still is; those
    that its test is to repair never are.
    """
    misses = missed(snapshot, slo, recall=recall)
    met = told(snapshot, slo, recall=recall) - misses
    excused = candidate.excused - met
    is_fault = bool(misses - excused - candidate.repairs)
    candidate = replace(
        candidate,
        breaches=candidate.breaches + 1 if is_fault else 0,
        failures=candidate.failures + failures,
        excused=excused,
    )
    if candidate.turn_s is None:  # the knobs came into force within this window
        return replace(candidate, turn_s=0.0, turn_waiting=snapshot.num_waiting)
    return replace(
        candidate,
        turn_s=candidate.turn_s + snapshot.window_s,
        seen=(*candidate.seen, snapshot),
    )


def figures(
    seen: Sequence[Snapshot], *, failures: int, needs_recall: bool = False
) -> dict[str, float | None]:
    """Figures of a paired window, of the seconds in it: those that ``AcceptanceRule`` names.

    Quality is 1 where nothing was selected, so every token was read. ``needs_recall``: there it is
    unknown, for what runs reads less than what ran before, and some of it must be measured.
    """
    reads_all = not needs_recall and not has_selected(seen)
    finished = sum(item.requests_finished for item in seen)
    seconds = sum(item.window_s for item in seen)
    tokens = sum(item.generated_tokens_per_s * item.window_s for item in seen)
    ended = failures + finished
    quality = mean_recall(seen)
    return {
        "output_tokens_per_s": tokens / seconds if seconds else None,
        Guard.TTFT.value: middle([item.ttft_p95_s for item in seen]),
        Guard.TPOT.value: middle([item.tpot_p95_s for item in seen]),
        Guard.ERRORS.value: failures / ended if ended else None,
        Guard.QUALITY.value: 1.0 if quality is None and reads_all else quality,
    }


def reads_less(values: Values, *, before: Values) -> bool:
    """Whether ``values`` let a step read fewer tokens than ``before``, or choose them less often."""
    fewer = _is_under(values.get("token_budget"), before.get("token_budget"))
    return fewer or _is_under(before.get("retrieval_stride"), values.get("retrieval_stride"))


def _is_under(low: KnobValue, high: KnobValue) -> bool:
    """False where one of them is not given."""
    return isinstance(low, int) and isinstance(high, int) and low < high


def status_of(seen: Sequence[Snapshot], slo: Slo) -> TrialStatus:
    """A window is broken where most of its seconds that tell of a latency miss their target, or
    where the mean of its samples of recall is under the floor."""
    if is_mostly_late(seen, slo):
        return TrialStatus.SLO_BROKEN
    return TrialStatus.RECALL_BROKEN if is_low(mean_recall(seen), slo) else TrialStatus.OK


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
