"""What the live tuner must not forget, in SQL: steps, markers, last known good, runs, controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from sparsed.core import (
    VERDICT_REASONS,
    VERDICT_STATES,
    KnobValue,
    LastKnownGood,
    ProfileKey,
    Regime,
    RolloutReason,
    RolloutRecord,
    RolloutState,
    TunerControls,
    TunerRun,
)
from sparsed.db import lookup, rows
from sparsed.db.models import (
    ConfigRow,
    LastKnownGoodRow,
    RolloutRow,
    TunerControlRow,
    TunerMarkerRow,
    TunerRunRow,
)
from sparsed.db.regimes import SqlRegimes, put
from sparsed.db.session import reading, writing

MAX_ROLLOUTS: Final = 1000  # but for verdicts on profiles
VERDICTS: Final = (VERDICT_STATES, VERDICT_REASONS)
MAX_GOODS: Final = 10  # of one key
MAX_RUNS: Final = 100


def crashed(record: RolloutRecord, *, at: float) -> RolloutRecord:
    """What became of a candidate under which the process died."""
    return replace(record, state=RolloutState.REVERTED, reason=RolloutReason.CRASHED, at=at)


class SqlRollouts(SqlRegimes):
    """``RolloutStore`` and ``RegimeStore`` over an engine from ``open_engine``."""

    def note_rollout(self, key: ProfileKey, record: RolloutRecord) -> None:
        with writing(self._engine, durable=True) as session:
            _add_step(session, key, record)

    def mark_rollout(self, key: ProfileKey, record: RolloutRecord) -> None:
        with writing(self._engine, durable=True) as session:
            row = _add_step(session, key, record)
            _clear_marker(session, row)
            session.add(
                TunerMarkerRow(
                    hardware_id=row.hardware_id, model_id=row.model_id, rollout_id=row.id
                )
            )

    def settle_rollout(
        self,
        key: ProfileKey,
        record: RolloutRecord,
        *,
        good: Mapping[str, KnobValue] | None,
        versions: Mapping[str, str] | None = None,
        regime: Regime | None = None,
    ) -> None:
        with writing(self._engine, durable=True) as session:
            row = _add_step(session, key, record)
            _clear_marker(session, row)
            if good is not None:
                _move_good(session, row, good, versions=versions or {})
            if regime is not None:
                put(session, regime, hardware_id=row.hardware_id, model_id=row.model_id)

    def fail_marked(self, at: float) -> tuple[RolloutRecord, ...]:
        query = select(TunerMarkerRow, RolloutRow).join(RolloutRow).order_by(TunerMarkerRow.id)
        with writing(self._engine, durable=True) as session:
            failed = []
            for marker, row in session.execute(query).all():
                step = crashed(_record(session, row), at=at)
                failed.append(step)
                ids = {"hardware_id": row.hardware_id, "model_id": row.model_id}
                session.add(_step_row(session, step, **ids))
                session.delete(marker)
            return tuple(failed)

    def list_rollouts(self, key: ProfileKey) -> tuple[RolloutRecord, ...]:
        query = lookup.of_key(select(RolloutRow), key, row=RolloutRow)
        with reading(self._engine) as session:
            found = session.scalars(query.order_by(RolloutRow.id.desc())).all()
            return tuple(_record(session, row) for row in found)

    def find_good(self, key: ProfileKey) -> LastKnownGood | None:
        query = lookup.of_key(
            select(LastKnownGoodRow, ConfigRow).join(ConfigRow), key, row=LastKnownGoodRow
        ).order_by(LastKnownGoodRow.id.desc())
        with reading(self._engine) as session:
            found = session.execute(query.limit(1)).first()
            if found is None or not found[1].values:
                return None
            return LastKnownGood(
                values=found[1].values,
                moved_at=found[0].moved_at,
                versions=found[0].versions or {},
            )

    def begin_run(self, at: float) -> int:
        with writing(self._engine, durable=True) as session:
            row = TunerRunRow(started_at=at, alive_at=at, ended=False)
            session.add(row)
            session.flush()
            session.execute(delete(TunerRunRow).where(TunerRunRow.id <= row.id - MAX_RUNS))
            return row.id

    def touch_run(self, run_id: int, at: float) -> None:
        with writing(self._engine) as session:
            if (row := session.get(TunerRunRow, run_id)) is not None:
                row.alive_at = at

    def end_run(self, run_id: int, at: float) -> None:
        with writing(self._engine, durable=True) as session:
            if (row := session.get(TunerRunRow, run_id)) is not None:
                row.alive_at, row.ended = at, True

    def list_runs(self) -> tuple[TunerRun, ...]:
        with reading(self._engine) as session:
            return tuple(
                TunerRun(
                    run_id=row.id,
                    started_at=row.started_at,
                    alive_at=row.alive_at,
                    ended=row.ended,
                )
                for row in session.scalars(select(TunerRunRow).order_by(TunerRunRow.id.desc()))
            )

    def controls(self) -> TunerControls:
        with reading(self._engine) as session:
            row = session.scalars(select(TunerControlRow)).first()
            if row is None:
                return TunerControls()
            return TunerControls(pins=tuple(row.pins), frozen=row.frozen, safe_since=row.safe_since)

    def keep_controls(self, controls: TunerControls, *, forget_runs: bool = False) -> None:
        with writing(self._engine, durable=True) as session:
            session.execute(delete(TunerControlRow))
            session.add(
                TunerControlRow(
                    pins=list(controls.pins),
                    frozen=controls.frozen,
                    safe_since=controls.safe_since,
                )
            )
            if forget_runs:
                session.execute(delete(TunerRunRow))


def _add_step(session: Session, key: ProfileKey, record: RolloutRecord) -> RolloutRow:
    hardware, model = lookup.key_ids(session, key)
    row = _step_row(session, record, hardware_id=hardware, model_id=model)
    session.add(row)
    session.flush()
    kept = select(TunerMarkerRow.rollout_id)
    old = RolloutRow.id <= row.id - MAX_ROLLOUTS
    states, reasons = ([item.value for item in kinds] for kinds in VERDICTS)
    is_verdict = RolloutRow.state.in_(states) | RolloutRow.reason.in_(reasons)
    forgettable = RolloutRow.profile.is_(None) | ~is_verdict  # no profile is tested twice
    session.execute(delete(RolloutRow).where(old, RolloutRow.id.not_in(kept), forgettable))
    return row


def _step_row(session: Session, record: RolloutRecord, **ids: Any) -> RolloutRow:
    return RolloutRow(
        **ids,
        config_from_id=lookup.config_id(session, record.config_from),
        config_to_id=lookup.config_id(session, record.config_to),
        state=record.state.value,
        reason=record.reason.value,
        initiated_by=record.initiated_by,
        at=rows.plain_number(record.at),
        regime_number=record.regime_id,
        profile=record.profile or None,
    )


def _clear_marker(session: Session, row: RolloutRow) -> None:
    same_key = (
        TunerMarkerRow.hardware_id == row.hardware_id,
        TunerMarkerRow.model_id == row.model_id,
    )
    session.execute(delete(TunerMarkerRow).where(*same_key))


def _move_good(
    session: Session,
    row: RolloutRow,
    good: Mapping[str, KnobValue],
    *,
    versions: Mapping[str, str],
) -> None:
    ids = {"hardware_id": row.hardware_id, "model_id": row.model_id}
    moved = LastKnownGoodRow(
        **ids,
        config_id=lookup.config_id(session, good),
        moved_at=row.at,
        versions=rows.plain_mapping(versions) or None,
    )
    session.add(moved)
    session.flush()
    of_key = select(LastKnownGoodRow.id).filter_by(**ids).order_by(LastKnownGoodRow.id.desc())
    old = session.scalars(of_key.offset(MAX_GOODS)).all()
    session.execute(delete(LastKnownGoodRow).where(LastKnownGoodRow.id.in_(old)))


def _record(session: Session, row: RolloutRow) -> RolloutRecord:
    before, after = (
        session.get_one(ConfigRow, number).values
        for number in (row.config_from_id, row.config_to_id)
    )
    return RolloutRecord(
        state=RolloutState(row.state),
        reason=RolloutReason(row.reason),
        config_from=before,
        config_to=after,
        initiated_by=row.initiated_by,
        at=row.at,
        regime_id=row.regime_number,
        profile=row.profile or "",
    )
