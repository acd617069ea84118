"""Opens a SQLite file the one right way: settings, transactions, migration."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DatabaseError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from sparsed.core import ExitCode, StartError
from sparsed.db.migrate import upgrade
from sparsed.db.store import StoreError

PRAGMAS: Final = (
    "PRAGMA busy_timeout = 5000",
    "PRAGMA journal_mode = WAL",
    "PRAGMA foreign_keys = ON",
    "PRAGMA synchronous = NORMAL",
)


def open_engine(path: Path) -> Engine:
    """An engine on the file at ``path``, created and migrated as needed.

    Errors: StartError (DATA) for a damaged file or a newer schema, (NO_PERMISSION) if the file
    cannot be opened.
    """
    engine = create_engine(f"sqlite:///{path}")
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    try:
        with engine.begin() as connection:
            upgrade(connection, path=path)
    except (SQLAlchemyError, sqlite3.Error) as error:
        engine.dispose()
        raise _start_error(error, path=path) from error
    except StartError:
        engine.dispose()
        raise
    return engine


@contextmanager
def writing(engine: Engine) -> Iterator[Session]:
    """One transaction that holds the write lock; StoreError if it fails."""
    try:
        with Session(engine) as session, session.begin():
            yield session
    except SQLAlchemyError as error:
        raise StoreError(_first_line(error)) from error


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """One transaction that waits for no writer; StoreError if it fails."""
    try:
        with Session(engine.execution_options(read_only=True)) as session, session.begin():
            yield session
    except SQLAlchemyError as error:
        raise StoreError(_first_line(error)) from error


def _configure(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
    assert isinstance(connection, sqlite3.Connection)
    connection.isolation_level = None  # the driver would begin late; ``_begin`` does it instead
    for pragma in PRAGMAS:
        connection.execute(pragma)


def _begin(connection: Connection) -> None:
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _start_error(error: Exception, *, path: Path) -> StartError:
    damaged = isinstance(error, DatabaseError) and "not a database" in str(error)
    if damaged or "malformed" in str(error):
        return StartError(
            f"{path} is not a readable database; move it away to begin with an empty one",
            code=ExitCode.DATA,
        )
    return StartError(
        f"{path} cannot be opened ({_first_line(error)}); check the state directory",
        code=ExitCode.NO_PERMISSION,
    )


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]
