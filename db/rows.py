"""Core values to rows and back; nothing but plain Python values reaches the database."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from numbers import Integral, Real
from typing import Any

from sparsed.core import (
    AcceptanceDecision,
    AcceptanceRule,
    AcceptanceVerdict,
    AcceptanceWindow,
    CopyPath,
    Decision,
    DecisionReason,
    DecisionState,
    Direction,
    Guard,
    KnobValue,
    LinkCalibration,
    LinkEntry,
    LinkKey,
    LinkProbe,
    ModelShape,
    Objective,
    Profile,
    ProfileKey,
    ProfileStatus,
    Slo,
    TrialResult,
    TrialStatus,
    WindowStage,
    Workload,
    WorkloadRequest,
)
from sparsed.db.models import (
    AcceptanceRow,
    AcceptanceWindowRow,
    DecisionRow,
    LinkCalibrationRow,
    ProfileRow,
    RollupRow,
    TrialRow,
    WorkloadRow,
)
from sparsed.db.rollup import Rollup


def plain(value: object) -> KnobValue:
    """A numpy scalar as int, float or str; AssertionError for anything that is not a scalar."""
    if value is None:
        return None
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral):
        return int(value)
    assert isinstance(value, Real), f"{value!r} is not a plain value"
    return float(value)


def plain_number(value: object) -> float:
    """A finite float; AssertionError otherwise, as NaN would be stored as NULL."""
    assert isinstance(value, Real) and math.isfinite(value), f"{value!r} is not a finite number"
    return float(value)


def plain_numbers(values: Sequence[object]) -> list[float]:
    return [plain_number(value) for value in values]


def plain_mapping(values: Mapping[str, object]) -> dict[str, KnobValue]:
    return {name: plain(value) for name, value in sorted(values.items())}


def optional_number(value: object) -> float | None:
    return None if value is None else plain_number(value)


def finite_numbers(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Figures by name; None for what is not a finite number."""
    return {
        name: None if value is None or not math.isfinite(value) else float(value)
        for name, value in sorted(values.items())
    }


def sha256(value: object) -> str:
    """Digest of plain data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def workload_requests(workload: Workload) -> list[list[float | int]]:
    return [
        [plain_number(item.arrival_s), int(item.input_tokens), int(item.output_tokens)]
        for item in workload.requests
    ]


def workload_of(row: WorkloadRow) -> Workload:
    requests = (
        WorkloadRequest(arrival_s=arrival_s, input_tokens=num_input, output_tokens=num_output)
        for arrival_s, num_input, num_output in row.requests
    )
    return Workload(name=row.name, requests=tuple(requests))


def slo_values(slo: Slo) -> dict[str, Any]:
    return plain_mapping(asdict(slo))


def trial_of(
    row: TrialRow, *, values: Mapping[str, Any], metrics: Mapping[str, float]
) -> TrialResult:
    return TrialResult(
        number=row.number,
        arm=row.arm,
        values=values,
        status=TrialStatus(row.status),
        score=row.score,
        spread_frac=row.spread_frac,
        metrics=metrics,
        reason=row.reason,
        device=row.device,
        started_at=row.started_at,
        ended_at=row.ended_at,
    )


def profile_of(
    row: ProfileRow, *, key: ProfileKey, values: Mapping[str, Any], versions: Mapping[str, str]
) -> Profile:
    return Profile(
        key=key,
        values=values,
        status=ProfileStatus(row.status),
        workload=row.workload,
        objective=Objective(row.objective),
        default_scores=tuple(row.default_scores),
        winner_scores=tuple(row.winner_scores),
        versions=versions,
        created_at=row.created_at,
        pinned=row.pinned,
        profile_id=row.id,
        shape=None if row.shape is None else ModelShape(**row.shape),
    )


def rollup_of(row: RollupRow) -> Rollup:
    return Rollup(
        period_s=row.period_s,
        started_at=row.started_at,
        metric=row.metric,
        num_samples=row.num_samples,
        mean=row.mean,
        p50=row.p50,
        p95=row.p95,
    )


def decision_of(row: DecisionRow, *, values: Mapping[str, Any]) -> Decision:
    return Decision(
        made_at=row.made_at,
        values=values,
        reason=row.reason,
        predicted_score=row.predicted_score,
        current_score=row.current_score,
    )


def plain_decision(decision: AcceptanceDecision) -> AcceptanceDecision:
    """With nothing but what the database gives back."""
    windows = (
        replace(
            window,
            values=plain_mapping(window.values),
            metrics=finite_numbers(window.metrics),
        )
        for window in decision.windows
    )
    return replace(
        decision,
        config_from=plain_mapping(decision.config_from),
        config_to=plain_mapping(decision.config_to),
        windows=tuple(windows),
    )


def verdict_values(verdict: AcceptanceVerdict) -> dict[str, Any]:
    """Columns of an ``AcceptanceRow``."""
    statistics = {name: getattr(verdict, name) for name in ("hl", "ci_lo", "ci_hi", "p", "cv")}
    return {
        "state": verdict.state.value,
        "reason": verdict.reason.value,
        "n_pairs": int(verdict.num_pairs),
        **{name: optional_number(value) for name, value in statistics.items()},
        "loss_bounds": {name: plain_number(x) for name, x in verdict.loss_bounds.items()},
    }


def rule_values(rule: AcceptanceRule) -> dict[str, Any]:
    return {
        **asdict(rule),
        "guards": [guard.value for guard in rule.guards],
        "targets": {guard.value: plain_number(x) for guard, x in rule.targets.items()},
    }


def _rule_of(values: Mapping[str, Any]) -> AcceptanceRule:
    guards = tuple(map(Guard, values["guards"]))
    targets = {Guard(name): target for name, target in values["targets"].items()}
    before = {"takes_sure_gains": False}  # of rules that were stored without that field
    return AcceptanceRule(**{**before, **values, "guards": guards, "targets": targets})


def acceptance_of(
    row: AcceptanceRow,
    *,
    key: ProfileKey,
    config_from: Mapping[str, Any],
    config_to: Mapping[str, Any],
    windows: Sequence[AcceptanceWindow],
) -> AcceptanceDecision:
    return AcceptanceDecision(
        key=key,
        config_from=config_from,
        config_to=config_to,
        rule=_rule_of(row.rule),
        verdict=AcceptanceVerdict(
            state=DecisionState(row.state),
            reason=DecisionReason(row.reason),
            num_pairs=row.n_pairs,
            hl=row.hl,
            ci_lo=row.ci_lo,
            ci_hi=row.ci_hi,
            p=row.p,
            cv=row.cv,
            loss_bounds=row.loss_bounds,
        ),
        windows=tuple(windows),
        initiated_by=row.initiated_by,
        decided_at=row.decided_at,
        study_id=row.study_id,
        decision_id=row.id,
    )


def window_of(row: AcceptanceWindowRow, *, values: Mapping[str, Any]) -> AcceptanceWindow:
    return AcceptanceWindow(
        number=row.number,
        stage=WindowStage(row.stage),
        round=row.round,
        order=row.arrival_order,
        values=values,
        status=TrialStatus(row.status),
        metrics=row.metrics,
        started_at=row.started_at,
        ended_at=row.ended_at,
    )


def window_row(
    window: AcceptanceWindow, *, acceptance_id: int, config_id: int
) -> AcceptanceWindowRow:
    return AcceptanceWindowRow(
        acceptance_id=acceptance_id,
        config_id=config_id,
        number=int(window.number),
        stage=window.stage.value,
        round=int(window.round),
        arrival_order=int(window.order),
        status=window.status.value,
        metrics=dict(window.metrics),
        started_at=plain_number(window.started_at),
        ended_at=plain_number(window.ended_at),
    )


def rollup_row(rollup: Rollup, *, hardware_id: int, model_id: int) -> RollupRow:
    return RollupRow(hardware_id=hardware_id, model_id=model_id, **asdict(rollup))


def calibration_row(calibration: LinkCalibration) -> LinkCalibrationRow:
    key, contiguous = calibration.key, calibration.contiguous
    return LinkCalibrationRow(
        sha256=sha256(asdict(key)),
        **asdict(key),
        h2d_bytes_per_s=plain_number(contiguous.h2d_bytes_per_s),
        d2h_bytes_per_s=plain_number(contiguous.d2h_bytes_per_s),
        entries=[plain_mapping(asdict(entry)) for entry in calibration.entries],
        measured_at=plain_number(calibration.measured_at),
    )


def calibration_of(row: LinkCalibrationRow) -> LinkCalibration:
    return LinkCalibration(
        key=LinkKey(
            gpu_name=row.gpu_name,
            driver=row.driver,
            link=row.link,
            torch=row.torch,
            triton=row.triton,
        ),
        contiguous=LinkProbe(
            h2d_bytes_per_s=row.h2d_bytes_per_s, d2h_bytes_per_s=row.d2h_bytes_per_s
        ),
        entries=tuple(_link_entry(values) for values in row.entries),
        measured_at=row.measured_at,
    )


def _link_entry(values: Mapping[str, Any]) -> LinkEntry:
    enums = {"direction": Direction(values["direction"]), "path": CopyPath(values["path"])}
    return LinkEntry(**{**values, **enums})
