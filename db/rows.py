"""Core values to rows and back; nothing but plain Python values reaches the database."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from numbers import Integral, Real
from typing import Any

from sparsed.core import (
    CopyPath,
    Decision,
    Direction,
    KnobValue,
    LinkCalibration,
    LinkEntry,
    LinkKey,
    LinkProbe,
    Objective,
    Profile,
    ProfileKey,
    ProfileStatus,
    Slo,
    TrialResult,
    TrialStatus,
    Workload,
    WorkloadRequest,
)
from sparsed.db.models import (
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
