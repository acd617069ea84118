"""Remembers: hardware, models, trials and profiles in SQLite."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsed.db.store import Store


def open_store(path: Path) -> Store:
    """Open the database file at ``path``, creating or upgrading it.

    Errors: StartError, see ``sparsed.db.session.open_engine``.
    """
    # SQLAlchemy and Alembic load where a database is opened, not with the contracts.
    from sparsed.db.session import open_engine
    from sparsed.db.sql import SqlProfileStore

    return SqlProfileStore(open_engine(path))
