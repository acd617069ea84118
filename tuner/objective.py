"""What a measurement is worth, and whether it may win."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sparsed.core import Guard, Measurement, Objective, Slo, TrialResult, TrialStatus
from sparsed.tuner.acceptance import LEAST_LOSS
from sparsed.tuner.policy import Constraint, Crash, Observation

METRICS: Final = {
    Objective.THROUGHPUT: "output_tokens_per_s",
    Objective.GOODPUT: "goodput_requests_per_s",
    Objective.LATENCY: "reader_answers_per_s",
    Objective.BALANCED: "balanced_rate",
    Objective.CAPACITY: "output_tokens_per_s_per_gib",
}
ANSWER_TOKENS: Final = 256  # of the answer that latency is stated for
GIB: Final = 1 << 30
MAX_HBM_FRAC: Final = 1.0  # of the device, all its users together
MAX_LINK_BUSY_FRAC: Final = 0.9
LEAST_SCORE: Final = 1e-9  # of a run that gave nothing: its logarithm must be finite
CRASHES: Final = {
    TrialStatus.OUT_OF_MEMORY: Crash.OOM_DEVICE,
    TrialStatus.HOST_OUT_OF_MEMORY: Crash.OOM_HOST_PINNED,
    TrialStatus.DEVICE_ERROR: Crash.CUDA_ERROR,
    TrialStatus.INVALID_CONFIG: Crash.INVALID_CONFIG,
    TrialStatus.TIMEOUT: Crash.TIMEOUT,
    TrialStatus.ENGINE_ERROR: Crash.ENGINE_BUG,
    TrialStatus.INTERRUPTED: Crash.INTERRUPTED,
}


class TrialFailed(Exception):
    """Raised by ``measure`` when a configuration could not be measured; ``status`` says why."""

    def __init__(self, message: str, *, status: TrialStatus) -> None:
        super().__init__(message)
        self.status = status


class OutOfTime(Exception):
    """Raised by ``measure`` when the time of the study is used up; nothing was measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """``score``: higher is better, in the objective's unit; None when the run may not win."""

    status: TrialStatus
    score: float | None
    metrics: Mapping[str, float]
    reason: str = ""


def judge(measurement: Measurement, *, objective: Objective, slo: Slo) -> Verdict:
    """Score one measurement and check it against the targets."""
    metrics = describe(measurement, slo=slo)
    status, reason = _check(measurement, metrics=metrics, objective=objective, slo=slo)
    score = metrics.get(METRICS[objective])
    feasible = status is TrialStatus.OK
    return Verdict(status=status, score=score if feasible else None, metrics=metrics, reason=reason)


def describe(measurement: Measurement, *, slo: Slo) -> dict[str, float]:
    """The figures of a measurement that exist, by name with unit; all finite."""
    duration_s = measurement.duration_s
    assert duration_s > 0, "a measurement takes time"
    tokens_per_s = measurement.output_tokens / duration_s
    answers_per_s = _reader_answers_per_s(measurement)
    hot_gib = measurement.hot_peak_bytes / GIB
    figures = {
        "duration_s": duration_s,
        "output_tokens_per_s": tokens_per_s,
        "goodput_requests_per_s": _num_good(measurement, slo=slo) / duration_s,
        "reader_answers_per_s": answers_per_s,
        "balanced_rate": math.sqrt(tokens_per_s * answers_per_s) if answers_per_s else None,
        "output_tokens_per_s_per_gib": tokens_per_s / hot_gib if hot_gib else None,
        "ttft_p95_s": percentile(measurement.ttft_s, 0.95),
        "tpot_p95_s": percentile(measurement.tpot_s, 0.95),
        "sparse_steps": float(measurement.sparse_steps),
        "attention_recall": measurement.attention_recall,
        "hot_hit_frac": measurement.hot_hit_frac,
        "h2d_bytes": float(measurement.h2d_bytes),
        "hot_peak_bytes": float(measurement.hot_peak_bytes),
        "hbm_peak_frac": measurement.hbm_peak_frac,
        "link_busy_frac": measurement.link_busy_frac,
        "errors": float(measurement.errors),
    }
    return {
        name: float(value)
        for name, value in figures.items()
        if value is not None and math.isfinite(value)
    }


def window_metrics(measurement: Measurement, *, slo: Slo) -> dict[str, float | None]:
    """All figures of a window of an acceptance test, those of its guards among them; None where
    something ought to be known and is not."""
    sent = measurement.errors + len(measurement.ttft_s)
    recall = measurement.attention_recall
    guards: dict[str, float | None] = {
        Guard.TTFT: None,
        Guard.TPOT: None,
        Guard.ERRORS: measurement.errors / sent if sent else None,
        Guard.QUALITY: 1.0 if recall is None and not measurement.sparse_steps else recall,
    }
    return {str(name): value for name, value in (guards | describe(measurement, slo=slo)).items()}


def observe(trial: TrialResult, *, objective: Objective, slo: Slo) -> Observation:
    """What a search may learn of a trial, also of one that missed its targets."""
    if crash := CRASHES.get(trial.status):
        return Observation(values=trial.values, objective=None, crash=crash)
    score = max(trial.metrics.get(METRICS[objective], 0.0), LEAST_SCORE)
    return Observation(
        values=trial.values,
        objective=math.log(score),
        slacks=slacks(trial.metrics, objective=objective, slo=slo),
    )


def slacks(
    metrics: Mapping[str, float], *, objective: Objective, slo: Slo
) -> dict[Constraint, float]:
    """Figure over target minus one, of every target that the objective holds a run against;
    quality is the attention lost over what may be lost. Device memory and the link where a GPU
    told of them."""
    found: dict[Constraint, float] = {}
    for constraint, name, limit in (
        (Constraint.HBM, "hbm_peak_frac", MAX_HBM_FRAC),
        (Constraint.LINK, "link_busy_frac", MAX_LINK_BUSY_FRAC),
    ):
        if name in metrics:
            found[constraint] = metrics[name] / limit - 1.0
    if objective is not Objective.GOODPUT:
        for constraint, name, target in (
            (Constraint.TTFT, "ttft_p95_s", slo.ttft_s),
            (Constraint.TPOT, "tpot_p95_s", slo.tpot_s),
        ):
            if target is not None and name in metrics:
                found[constraint] = metrics[name] / target - 1.0
    if slo.min_recall is not None and metrics.get("sparse_steps", 0.0) > 0:
        lost = 1.0 - metrics.get("attention_recall", 0.0)  # unknown is no better than none
        found[Constraint.QUALITY] = lost / max(1.0 - slo.min_recall, LEAST_LOSS) - 1.0
    return found


def percentile(values: Sequence[float], frac: float) -> float | None:
    """Nearest-rank percentile; None of nothing."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(frac * len(values)) - 1)]


def _reader_answers_per_s(measurement: Measurement) -> float | None:
    """How many answers one after the other a reader gets in a second who meets the p95 of both
    latencies; None where nothing was answered."""
    ttft_s, tpot_s = (percentile(x, 0.95) for x in (measurement.ttft_s, measurement.tpot_s))
    if ttft_s is None or tpot_s is None:
        return None
    answer_s = ttft_s + (ANSWER_TOKENS - 1) * tpot_s
    return 1.0 / answer_s if answer_s > 0 else None


def _num_good(measurement: Measurement, *, slo: Slo) -> int:
    """Requests that met every target."""
    return sum(
        (slo.ttft_s is None or ttft_s <= slo.ttft_s)
        and (slo.tpot_s is None or tpot_s <= slo.tpot_s)
        for ttft_s, tpot_s in zip(measurement.ttft_s, measurement.tpot_s, strict=True)
    )


def _check(
    measurement: Measurement, *, metrics: Mapping[str, float], objective: Objective, slo: Slo
) -> tuple[TrialStatus, str]:
    if measurement.errors:
        return TrialStatus.ENGINE_ERROR, f"{measurement.errors} requests failed"
    if fault := _recall_fault(measurement, min_recall=slo.min_recall):
        return TrialStatus.RECALL_BROKEN, fault
    if objective is Objective.GOODPUT:
        # Late requests do not count there already, so a single late one breaks nothing.
        if metrics["goodput_requests_per_s"] > 0:
            return TrialStatus.OK, ""
        return TrialStatus.SLO_BROKEN, "no request met its targets"
    for name, target in (("ttft_p95_s", slo.ttft_s), ("tpot_p95_s", slo.tpot_s)):
        if target is not None and metrics.get(name, 0.0) > target:
            reason = f"{name} {metrics[name]:.3f} is above {target:.3f}"
            return TrialStatus.SLO_BROKEN, reason
    if not metrics["output_tokens_per_s"] > 0:
        return TrialStatus.TIMEOUT, "no token came out"
    if METRICS[objective] not in metrics:
        return (
            TrialStatus.ENGINE_ERROR,
            f"{METRICS[objective]} could not be measured: the window was too short",
        )
    return TrialStatus.OK, ""


def _recall_fault(measurement: Measurement, *, min_recall: float | None) -> str | None:
    """Why the floor of attention recall does not hold; None if it does. A window in which every
    step read every token has no recall, and lost nothing."""
    recall, num_sparse = measurement.attention_recall, measurement.sparse_steps
    if min_recall is None or (recall is None and not num_sparse):
        return None
    if recall is None:
        return (
            f"attention recall was never sampled in {num_sparse} sparse steps, so the floor of "
            f"{min_recall:.3f} is unchecked"
        )
    if not recall >= min_recall:
        return f"attention recall {recall:.3f} is below {min_recall:.3f}"
    return None
