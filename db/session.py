"""Opens a SQLite file the one right way: settings, transactions, migration."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from sparsed.core import ExitCode, InputError, StartError
from sparsed.db.migrate import upgrade
from sparsed.db.store import StoreError

PRAGMAS: Final = (
    "PRAGMA busy_timeout = 5000",
    "PRAGMA journal_mode = WAL",
    "PRAGMA foreign_keys = ON",
    "PRAGMA synchronous = NORMAL",
)
# A ValueError: what stands in the file is no text, no JSON, or no value that was ever written.
# Even the messages of SQLite quote the file, and then cannot be decoded.
FAILURES: Final = (SQLAlchemyError, sqlite3.Error, ValueError)


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
    except FAILURES as error:
        engine.dispose()
        raise _start_error(error, path=path) from error
    except StartError:
        engine.dispose()
        raise
    return engine


@contextmanager
def writing(engine: Engine, *, durable: bool = False) -> Iterator[Session]:
    """One transaction that holds the write lock; StoreError if it fails.

    ``durable``: it is on the disk when this returns, and outlives a loss of power; without it a
    transaction outlives the death of the process only.
    """
    bound = engine.execution_options(durable=True) if durable else engine
    with _store_errors(engine), Session(bound) as session, session.begin():
        yield session


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """One transaction that waits for no writer; StoreError if it fails."""
    read_only = engine.execution_options(read_only=True)
    with _store_errors(engine), Session(read_only) as session, session.begin():
        yield session


@contextmanager
def _store_errors(engine: Engine) -> Iterator[None]:
    try:
        yield
    except InputError:  # a ValueError too, but the caller's
        raise
    except FAILURES as error:
        damage = _damage(error, path=engine.url.database)
        raise StoreError(damage or _first_line(error)) from error


def _configure(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
    assert isinstance(connection, sqlite3.Connection)
    connection.isolation_level = None  # the driver would begin late; ``_begin`` does it instead
    for pragma in PRAGMAS:
        connection.execute(pragma)


def _begin(connection: Connection) -> None:
    options = connection.get_execution_options()
    read_only = options.get("read_only", False)
    level = "FULL" if options.get("durable", False) else "NORMAL"  # cannot change later
    connection.exec_driver_sql(f"PRAGMA synchronous = {level}")
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _start_error(error: Exception, *, path: Path) -> StartError:
    if damage := _damage(error, path=path):
        return StartError(damage, code=ExitCode.DATA)
    return StartError(
        f"{path} cannot be opened ({_first_line(error)}); check the state directory",
        code=ExitCode.NO_PERMISSION,
    )


def _damage(error: Exception, *, path: Path | str | None) -> str | None:
    """What to do about a damaged file; None if the error says nothing of the kind."""
    signs = ("not a database", "malformed", "Could not decode")
    if isinstance(error, ValueError) or any(sign in str(error) for sign in signs):
        return f"{path} is not a readable database; move it away to begin with an empty one"
    return None


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]
