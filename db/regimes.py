"""Kinds of load and what is verified for them, in SQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from sqlalchemy import Engine, delete, select
from sqlalchemy.orm import Session

from sparsed.core import ProfileKey, Regime
from sparsed.db import lookup, rows
from sparsed.db.models import ConfigRow, RegimeRow
from sparsed.db.session import reading, writing


class SqlRegimes:
    """``RegimeStore`` over an engine from ``open_engine``."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Final = engine

    def keep_regimes(self, key: ProfileKey, regimes: Sequence[Regime]) -> None:
        with writing(self._engine, durable=True) as session:
            hardware, model = lookup.key_ids(session, key)
            ids = {"hardware_id": hardware, "model_id": model}
            of_key = select(RegimeRow.id).filter_by(**ids)
            session.execute(delete(RegimeRow).where(RegimeRow.id.in_(of_key)))
            session.add_all([_row(session, regime, ids) for regime in regimes])

    def list_regimes(self, key: ProfileKey) -> tuple[Regime, ...]:
        query = lookup.of_key(
            select(RegimeRow, ConfigRow).outerjoin(ConfigRow), key, row=RegimeRow
        ).order_by(RegimeRow.number)
        with reading(self._engine) as session:
            return tuple(_regime(row, config) for row, config in session.execute(query).all())


def put(session: Session, regime: Regime, *, hardware_id: int, model_id: int) -> None:
    """``regime`` in the place of the one with its number, if there is one."""
    ids = {"hardware_id": hardware_id, "model_id": model_id}
    same = select(RegimeRow.id).filter_by(**ids, number=regime.regime_id)
    session.execute(delete(RegimeRow).where(RegimeRow.id.in_(same)))
    session.add(_row(session, regime, ids))


def _row(session: Session, regime: Regime, ids: Mapping[str, int]) -> RegimeRow:
    incumbent = regime.incumbent
    return RegimeRow(
        **ids,
        number=regime.regime_id,
        centroid=rows.plain_mapping(regime.centroid),
        signature=regime.signature,
        seen_s=rows.plain_number(regime.seen_s),
        seen_at=rows.plain_number(regime.seen_at),
        config_id=lookup.config_id(session, incumbent) if incumbent else None,
        verified_at=rows.optional_number(regime.verified_at),
        versions=rows.plain_mapping(regime.versions),
    )


def _regime(row: RegimeRow, config: ConfigRow | None) -> Regime:
    return Regime(
        regime_id=row.number,
        centroid=row.centroid,
        signature=row.signature,
        seen_s=row.seen_s,
        seen_at=row.seen_at,
        incumbent=config.values if config else {},
        verified_at=row.verified_at,
        versions=row.versions,
    )
