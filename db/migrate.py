"""Brings a database to the schema of this code; the only caller of Alembic."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from sparsed.core import ExitCode, StartError


def upgrade(connection: Connection, *, path: Path) -> None:
    """Upgrade to the newest revision inside the caller's transaction.

    ``path`` is the database file: it is copied to ``<name>.before-<revision>`` before an existing
    schema changes. Errors: StartError (DATA) if the schema is newer than this code.
    """
    config = alembic_config(connection)
    scripts = ScriptDirectory.from_config(config)
    current = MigrationContext.configure(connection).get_current_revision()
    head = scripts.get_current_head()
    if current == head:
        return
    if current is not None:
        _refuse_newer(current, known=_revisions(scripts), path=path)
        _copy(path, target=path.with_name(f"{path.name}.before-{head}"))
    command.upgrade(config, "head")


def alembic_config(connection: Connection) -> Config:
    """Built in code, so that it works from a wheel and from a source tree alike."""
    config = Config()
    config.set_main_option("script_location", "sparsed.db:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _revisions(scripts: ScriptDirectory) -> set[str]:
    return {script.revision for script in scripts.walk_revisions()}


def _refuse_newer(current: str, *, known: set[str], path: Path) -> None:
    if current not in known:
        raise StartError(
            f"{path} has schema {current}, newer than this version of sparsed knows; upgrade "
            f"sparsed, or restore the copy {path.name}.before-{current} made by the upgrade",
            code=ExitCode.DATA,
        )


def _copy(path: Path, *, target: Path) -> None:
    # The online backup sees pages that still stand in the write-ahead log; a file copy does not.
    with sqlite3.connect(path) as source, sqlite3.connect(target) as copy:
        source.backup(copy)
    source.close()
    copy.close()
