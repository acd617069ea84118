"""Queries that several operations of the SQL store share: shared rows, keys, profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import ColumnElement, Select, select, update
from sqlalchemy.orm import Session, aliased

from sparsed.core import (
    AcceptanceDecision,
    AcceptanceWindow,
    Objective,
    Profile,
    ProfileKey,
    Slo,
    Workload,
)
from sparsed.db import rows
from sparsed.db.models import (
    AcceptanceRow,
    AcceptanceWindowRow,
    ConfigRow,
    DecisionRow,
    HardwareRow,
    LastKnownGoodRow,
    ModelRow,
    ProfileRow,
    RegimeRow,
    RolloutRow,
    RollupRow,
    SoftwareRow,
    StudyRow,
    TrialMetricRow,
    WorkloadRow,
)
from sparsed.db.store import Study

SharedRow = TypeVar("SharedRow", HardwareRow, SoftwareRow, ModelRow, WorkloadRow, ConfigRow)
Query = TypeVar("Query", bound="Select[*tuple[Any, ...]]")
KeyedRow = (
    type[ProfileRow]
    | type[StudyRow]
    | type[RollupRow]
    | type[DecisionRow]
    | type[AcceptanceRow]
    | type[RolloutRow]
    | type[LastKnownGoodRow]
    | type[RegimeRow]
)

if TYPE_CHECKING:
    ProfileSelect = Select[ProfileRow, HardwareRow, ModelRow, ConfigRow, SoftwareRow]


def key_ids(session: Session, key: ProfileKey) -> tuple[int, int]:
    """Ids of the hardware and the model row of ``key``, added where missing."""
    hardware = _ensure(session, HardwareRow, unique={"fingerprint": key.hardware})
    model = _ensure(session, ModelRow, unique={"name": key.model, "dtype": key.dtype})
    return hardware, model


def software_id(session: Session, versions: Mapping[str, str]) -> int:
    values = rows.plain_mapping(versions)
    unique = {"sha256": rows.sha256(values)}
    return _ensure(session, SoftwareRow, unique=unique, others={"versions": values})


def config_id(session: Session, values: Mapping[str, object]) -> int:
    plain = rows.plain_mapping(values)
    unique = {"sha256": rows.sha256(plain)}
    return _ensure(session, ConfigRow, unique=unique, others={"values": plain})


def workload_id(session: Session, workload: Workload) -> int:
    requests = rows.workload_requests(workload)
    unique = {"sha256": rows.sha256([workload.name, requests])}
    others = {"name": workload.name, "requests": requests}
    return _ensure(session, WorkloadRow, unique=unique, others=others)


def of_key(query: Query, key: ProfileKey | None, *, row: KeyedRow) -> Query:
    """Only rows of ``key``; all without one. Joins hardware and model."""
    query = query.join(HardwareRow, HardwareRow.id == row.hardware_id)
    query = query.join(ModelRow, ModelRow.id == row.model_id)
    if key is None:
        return query
    return query.where(
        HardwareRow.fingerprint == key.hardware,
        ModelRow.name == key.model,
        ModelRow.dtype == key.dtype,
    )


def select_profiles(key: ProfileKey | None) -> ProfileSelect:
    """Profiles with all that belongs to them, newest first."""
    query = select(ProfileRow, HardwareRow, ModelRow, ConfigRow, SoftwareRow)
    query = of_key(query.select_from(ProfileRow), key, row=ProfileRow)
    query = query.join(ConfigRow, ConfigRow.id == ProfileRow.config_id)
    query = query.join(SoftwareRow, SoftwareRow.id == ProfileRow.software_id)
    return query.order_by(ProfileRow.id.desc())


def profiles(session: Session, query: ProfileSelect) -> tuple[Profile, ...]:
    return tuple(
        rows.profile_of(
            row,
            key=ProfileKey(hardware=hardware.fingerprint, model=model.name, dtype=model.dtype),
            values=config.values,
            versions=software.versions,
        )
        for row, hardware, model, config, software in session.execute(query)
    )


def profile(session: Session, profile_id: int) -> Profile:
    (found,) = profiles(session, select_profiles(None).where(ProfileRow.id == profile_id))
    return found


def studies(
    session: Session, key: ProfileKey | None, *conditions: ColumnElement[bool]
) -> list[Study]:
    """Studies of ``key``, of all keys without one, newest first."""
    query = select(StudyRow, HardwareRow, ModelRow, WorkloadRow)
    query = of_key(query.select_from(StudyRow), key, row=StudyRow)
    query = query.join(WorkloadRow, WorkloadRow.id == StudyRow.workload_id)
    query = query.where(*conditions).order_by(StudyRow.id.desc())
    return [
        Study(
            study_id=row.id,
            key=ProfileKey(hardware=hardware.fingerprint, model=model.name, dtype=model.dtype),
            workload=rows.workload_of(served),
            objective=Objective(row.objective),
            slo=Slo(**row.slo),
            seed=row.seed,
            space=row.space,
        )
        for row, hardware, model, served in session.execute(query)
    ]


def acceptances(
    session: Session, *conditions: ColumnElement[bool]
) -> tuple[AcceptanceDecision, ...]:
    """Decisions with their windows, newest first."""
    before, after = aliased(ConfigRow), aliased(ConfigRow)
    query = of_key(
        select(AcceptanceRow, HardwareRow, ModelRow, before, after), None, row=AcceptanceRow
    )
    query = query.join(before, before.id == AcceptanceRow.config_from_id)
    query = query.join(after, after.id == AcceptanceRow.config_to_id)
    query = query.where(*conditions).order_by(AcceptanceRow.id.desc())
    found = session.execute(query).all()
    windows = _windows(session, [row.id for row, *_ in found])
    return tuple(
        rows.acceptance_of(
            row,
            key=ProfileKey(hardware=hardware.fingerprint, model=model.name, dtype=model.dtype),
            config_from=config_from.values,
            config_to=config_to.values,
            windows=windows.get(row.id, []),
        )
        for row, hardware, model, config_from, config_to in found
    )


def _windows(session: Session, ids: Sequence[int]) -> dict[int, list[AcceptanceWindow]]:
    """Windows of each decision, in the order of time."""
    query = select(AcceptanceWindowRow, ConfigRow)
    query = query.join(ConfigRow, ConfigRow.id == AcceptanceWindowRow.config_id)
    query = query.where(AcceptanceWindowRow.acceptance_id.in_(ids))
    found: dict[int, list[AcceptanceWindow]] = {}
    for row, config in session.execute(query.order_by(AcceptanceWindowRow.number)):
        found.setdefault(row.acceptance_id, []).append(rows.window_of(row, values=config.values))
    return found


def unpin(session: Session, *, hardware: int, model: int) -> None:
    of_same_key = (ProfileRow.hardware_id == hardware, ProfileRow.model_id == model)
    session.execute(update(ProfileRow).where(*of_same_key).values(pinned=False))


def metrics(session: Session, trial_ids: Sequence[int]) -> dict[int, dict[str, float]]:
    """Metrics of each trial by name."""
    query = select(TrialMetricRow).where(TrialMetricRow.trial_id.in_(trial_ids))
    found: dict[int, dict[str, float]] = {}
    for row in session.scalars(query):
        found.setdefault(row.trial_id, {})[row.name] = row.value
    return found


def _ensure(
    session: Session,
    table: type[SharedRow],
    *,
    unique: Mapping[str, Any],
    others: Mapping[str, Any] | None = None,
) -> int:
    """The id of the row with these unique values, added where missing."""
    row = session.scalars(select(table).filter_by(**unique)).one_or_none()
    if row is None:
        row = table(**unique, **(others or {}))
        session.add(row)
        session.flush()
    return row.id
