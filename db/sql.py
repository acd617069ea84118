"""The store in one SQLite file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from threading import Lock
from typing import Any

from sqlalchemy import Engine, delete, select

from sparsed.core import (
    AcceptanceDecision,
    Decision,
    InputError,
    LinkCalibration,
    LinkKey,
    Objective,
    Profile,
    ProfileKey,
    ProfileStatus,
    Slo,
    Snapshot,
    TrialResult,
    Workload,
)
from sparsed.db import lookup, rows
from sparsed.db.models import (
    AcceptanceRow,
    ConfigRow,
    DecisionRow,
    LinkCalibrationRow,
    ProfileRow,
    RollupRow,
    StudyRow,
    TrialMetricRow,
    TrialRow,
    WorkloadRow,
)
from sparsed.db.rollouts import SqlRollouts
from sparsed.db.rollup import MAX_DECISIONS, RETENTION_S, Rollup, RollupBuilder
from sparsed.db.session import reading, writing
from sparsed.db.store import Study, unknown_decision, unknown_study


class SqlProfileStore(SqlRollouts):
    """``Store`` over an engine from ``open_engine``, which it owns."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._builders = tuple(RollupBuilder(period_s) for period_s in RETENTION_S)
        self._builders_lock = Lock()

    def close(self) -> None:
        self._engine.dispose()

    # profiles

    def save_profile(self, profile: Profile) -> Profile:
        with writing(self._engine) as session:
            hardware, model = lookup.key_ids(session, profile.key)
            if profile.pinned:
                lookup.unpin(session, hardware=hardware, model=model)
            row = ProfileRow(
                hardware_id=hardware,
                model_id=model,
                software_id=lookup.software_id(session, profile.versions),
                config_id=lookup.config_id(session, profile.values),
                status=profile.status.value,
                workload=profile.workload,
                objective=profile.objective.value,
                default_scores=rows.plain_numbers(profile.default_scores),
                winner_scores=rows.plain_numbers(profile.winner_scores),
                created_at=rows.plain_number(profile.created_at),
                pinned=profile.pinned,
                shape=asdict(profile.shape) if profile.shape else None,
            )
            session.add(row)
            session.flush()
            return lookup.profile(session, row.id)

    def list_profiles(self, key: ProfileKey | None = None) -> tuple[Profile, ...]:
        with reading(self._engine) as session:
            return lookup.profiles(session, lookup.select_profiles(key))

    def find_verified(self, key: ProfileKey) -> Profile | None:
        usable = ProfileRow.pinned | (ProfileRow.status == ProfileStatus.VERIFIED.value)
        with reading(self._engine) as session:
            found = lookup.profiles(session, lookup.select_profiles(key).where(usable))
        return next((item for item in found if item.pinned), next(iter(found), None))

    def pin(self, profile_id: int) -> Profile:
        with writing(self._engine) as session:
            row = session.get(ProfileRow, profile_id)
            if row is None:
                raise InputError(
                    f"no profile {profile_id}; see: sparsed profile list", field="profile_id"
                )
            lookup.unpin(session, hardware=row.hardware_id, model=row.model_id)
            row.pinned = True
            session.flush()
            return lookup.profile(session, profile_id)

    def mark_stale(self, profile_id: int) -> None:
        with writing(self._engine) as session:
            if (row := session.get(ProfileRow, profile_id)) is not None:
                row.status = ProfileStatus.STALE.value

    # studies

    def start_study(
        self,
        key: ProfileKey,
        *,
        workload: Workload,
        objective: Objective,
        slo: Slo,
        seed: int,
        space: Mapping[str, Any],
        versions: Mapping[str, str],
        started_at: float,
    ) -> int:
        with writing(self._engine) as session:
            hardware, model = lookup.key_ids(session, key)
            row = StudyRow(
                hardware_id=hardware,
                model_id=model,
                software_id=lookup.software_id(session, versions),
                workload_id=lookup.workload_id(session, workload),
                objective=objective.value,
                slo=rows.slo_values(slo),
                space=dict(space),
                seed=int(seed),
                started_at=rows.plain_number(started_at),
            )
            session.add(row)
            session.flush()
            return row.id

    def find_study(
        self, key: ProfileKey, *, workload: str, objective: Objective, slo: Slo, seed: int
    ) -> Study | None:
        same = (
            WorkloadRow.name == workload,
            StudyRow.objective == objective.value,
            StudyRow.seed == int(seed),
        )
        with reading(self._engine) as session:
            found = lookup.studies(session, key, *same)
        return next((study for study in found if study.slo == slo), None)

    def get_study(self, study_id: int) -> Study:
        with reading(self._engine) as session:
            found = lookup.studies(session, None, StudyRow.id == study_id)
        if not found:
            raise unknown_study(study_id)
        return found[0]

    def record_trial(self, study_id: int, trial: TrialResult) -> None:
        with writing(self._engine) as session:
            row = TrialRow(
                study_id=study_id,
                config_id=lookup.config_id(session, trial.values),
                number=int(trial.number),
                arm=trial.arm,
                status=trial.status.value,
                score=rows.optional_number(trial.score),
                spread_frac=rows.optional_number(trial.spread_frac),
                reason=trial.reason,
                device=trial.device,
                started_at=rows.plain_number(trial.started_at),
                ended_at=rows.plain_number(trial.ended_at),
            )
            session.add(row)
            session.flush()
            session.add_all(
                TrialMetricRow(trial_id=row.id, name=name, value=rows.plain_number(value))
                for name, value in trial.metrics.items()
            )

    def list_trials(
        self, *, study_id: int | None = None, key: ProfileKey | None = None
    ) -> tuple[TrialResult, ...]:
        query = (
            select(TrialRow, ConfigRow)
            .join(ConfigRow, ConfigRow.id == TrialRow.config_id)
            .join(StudyRow, StudyRow.id == TrialRow.study_id)
            .order_by(TrialRow.id)
        )
        if study_id is not None:
            query = query.where(TrialRow.study_id == study_id)
        with reading(self._engine) as session:
            found = session.execute(lookup.of_key(query, key, row=StudyRow)).all()
            metrics = lookup.metrics(session, [trial.id for trial, _ in found])
            return tuple(
                rows.trial_of(trial, values=config.values, metrics=metrics.get(trial.id, {}))
                for trial, config in found
            )

    # decisions

    def save_acceptance(self, decision: AcceptanceDecision) -> AcceptanceDecision:
        plain = rows.plain_decision(decision)
        with writing(self._engine) as session:
            hardware, model = lookup.key_ids(session, plain.key)
            row = AcceptanceRow(
                hardware_id=hardware,
                model_id=model,
                study_id=plain.study_id,
                config_from_id=lookup.config_id(session, plain.config_from),
                config_to_id=lookup.config_id(session, plain.config_to),
                rule=rows.rule_values(plain.rule),
                initiated_by=plain.initiated_by,
                decided_at=rows.plain_number(plain.decided_at),
                **rows.verdict_values(plain.verdict),
            )
            session.add(row)
            session.flush()
            session.add_all(
                rows.window_row(
                    window,
                    acceptance_id=row.id,
                    config_id=lookup.config_id(session, window.values),
                )
                for window in plain.windows
            )
            session.flush()
            return lookup.acceptances(session, AcceptanceRow.id == row.id)[0]

    def find_acceptance(self, decision_id: int) -> AcceptanceDecision:
        with reading(self._engine) as session:
            found = lookup.acceptances(session, AcceptanceRow.id == decision_id)
        if not found:
            raise unknown_decision(decision_id)
        return found[0]

    def list_acceptances(self) -> tuple[AcceptanceDecision, ...]:
        with reading(self._engine) as session:
            return lookup.acceptances(session)

    # telemetry

    def record_snapshot(self, key: ProfileKey, snapshot: Snapshot) -> None:
        with self._builders_lock:
            finished = [item for builder in self._builders for item in builder.add(snapshot)]
        if not finished:
            return
        with writing(self._engine) as session:
            hardware, model = lookup.key_ids(session, key)
            session.add_all(
                rows.rollup_row(item, hardware_id=hardware, model_id=model) for item in finished
            )
            for period_s, kept_s in RETENTION_S.items():
                old = RollupRow.started_at < snapshot.ended_at - kept_s
                session.execute(delete(RollupRow).where(RollupRow.period_s == period_s, old))

    def list_rollups(self, key: ProfileKey, *, period_s: int) -> tuple[Rollup, ...]:
        query = lookup.of_key(select(RollupRow), key, row=RollupRow)
        query = query.where(RollupRow.period_s == period_s).order_by(RollupRow.id)
        with reading(self._engine) as session:
            return tuple(rows.rollup_of(row) for row in session.scalars(query))

    def record_decision(self, key: ProfileKey, decision: Decision) -> None:
        with writing(self._engine) as session:
            hardware, model = lookup.key_ids(session, key)
            row = DecisionRow(
                hardware_id=hardware,
                model_id=model,
                config_id=lookup.config_id(session, decision.values),
                made_at=rows.plain_number(decision.made_at),
                reason=decision.reason,
                predicted_score=rows.optional_number(decision.predicted_score),
                current_score=rows.optional_number(decision.current_score),
            )
            session.add(row)
            session.flush()
            session.execute(delete(DecisionRow).where(DecisionRow.id <= row.id - MAX_DECISIONS))

    def list_decisions(self, key: ProfileKey) -> tuple[Decision, ...]:
        query = select(DecisionRow, ConfigRow).join(ConfigRow).order_by(DecisionRow.id.desc())
        with reading(self._engine) as session:
            found = session.execute(lookup.of_key(query, key, row=DecisionRow))
            return tuple(rows.decision_of(row, values=config.values) for row, config in found)

    # links

    def save_calibration(self, calibration: LinkCalibration) -> None:
        row = rows.calibration_row(calibration)
        with writing(self._engine) as session:
            same_key = LinkCalibrationRow.sha256 == row.sha256
            session.execute(delete(LinkCalibrationRow).where(same_key))
            session.add(row)

    def find_calibration(self, key: LinkKey) -> LinkCalibration | None:
        query = select(LinkCalibrationRow).where(
            LinkCalibrationRow.sha256 == rows.sha256(asdict(key))
        )
        with reading(self._engine) as session:
            row = session.scalars(query).one_or_none()
            return None if row is None else rows.calibration_of(row)
