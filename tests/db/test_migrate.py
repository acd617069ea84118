"""Databases of every released schema open, upgrade and read."""

from __future__ import annotations

import sqlite3
import warnings
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from sparsed.core import ExitCode, Guard, LinkKey, ProfileKey, StartError
from sparsed.db import open_store
from sparsed.db.models import Base
from sparsed.db.session import PRAGMAS, open_engine
from sparsed.db.store import StoreError

ASSETS = sorted((Path(__file__).parent / "assets").glob("*.sql"))
LINK = LinkKey(gpu_name="asset", driver="1", link="gen5x16", torch="2", triton="3")
KEY = ProfileKey(hardware="cpu:asset:2:4GiB", model="smollm2-135m", dtype="float32")


def restore(dump: Path, path: Path) -> Path:
    connection = sqlite3.connect(path)
    connection.executescript(dump.read_text())
    connection.close()
    return path


@pytest.mark.parametrize("dump", ASSETS, ids=lambda path: path.stem)
def test_every_released_schema_upgrades_and_reads(dump: Path, tmp_path: Path) -> None:
    store = open_store(restore(dump, tmp_path / "sparsed.db"))
    profile = store.find_verified(KEY)
    assert profile is not None
    assert profile.values == {"hbm_budget": None, "token_budget": 1024}
    assert (profile.shape is not None and profile.shape.num_layers == 30) is (dump.stem >= "0007")
    (trial,) = store.list_trials(key=KEY)
    assert (trial.score, trial.metrics) == (2.0, {"duration_s": 3.0})
    assert trial.device == ("cuda:1" if dump.stem >= "0008" else None)
    space = store.get_study(1).space
    assert space == ({"token_budget": [512, 1024]} if dump.stem >= "0005" else None)
    assert store.list_decisions(KEY)[0].reason == "asset"
    calibration = store.find_calibration(LINK)
    if dump.stem >= "0002":
        assert calibration is not None
        assert [entry.programs for entry in calibration.entries] == [16]
    else:
        assert calibration is None
    acceptances = store.list_acceptances()
    assert [item.initiated_by for item in acceptances] == ["asset"] * (dump.stem >= "0003")
    assert all(item.rule.targets == {Guard.TPOT: 0.05} for item in acceptances)
    has_rollouts = dump.stem >= "0004"
    good = store.find_good(KEY)
    assert (good is not None and good.values == {"token_budget": 1536}) is has_rollouts
    assert [item.initiated_by for item in store.list_rollouts(KEY)] == ["asset"] * 2 * has_rollouts
    assert store.controls().pins == (("prefill_chunk",) if has_rollouts else ())
    assert len(store.list_runs()) == has_rollouts
    has_regimes = dump.stem >= "0006"
    known = [(regime.signature, regime.incumbent) for regime in store.list_regimes(KEY)]
    assert known == [("asset", {"token_budget": 1536})] * has_regimes
    assert good is None or good.versions == ({"torch": "2"} if has_regimes else {})
    newest = [item.regime_id for item in store.list_rollouts(KEY)[:1]]
    assert newest == [1 if has_regimes else None] * has_rollouts
    profiles = [item.profile for item in store.list_rollouts(KEY)[:1]]
    assert profiles == ["profile #1 on sparsed 0.1.0" * (dump.stem >= "0007")] * has_rollouts
    store.close()


def test_there_is_a_dump_of_the_newest_schema(tmp_path: Path) -> None:
    path = tmp_path / "sparsed.db"
    open_store(path).close()
    assert ASSETS[-1].stem == query(path, "SELECT version_num FROM alembic_version")


def test_migrations_and_models_agree(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "sparsed.db")
    with engine.connect() as connection, warnings.catch_warnings():
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_connections_are_configured(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "sparsed.db")
    with engine.connect() as connection:
        for pragma in PRAGMAS:
            name, wanted = pragma.removeprefix("PRAGMA ").split(" = ")
            names = {"wal": "WAL", "1": "ON" if name == "foreign_keys" else "NORMAL"}
            found = str(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())
            assert names.get(found, found) == wanted
    engine.dispose()


def test_a_newer_schema_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "sparsed.db"
    open_store(path).close()
    query(path, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StartError, match="newer than this version") as caught:
        open_store(path)
    assert caught.value.code is ExitCode.DATA
    assert len(str(caught.value).splitlines()) == 1
    assert query(path, "SELECT version_num FROM alembic_version") == "9999"


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sparsed.db"
    path.write_bytes(b"not a database, but long enough to be looked at " * 100)
    with pytest.raises(StartError, match="not a readable database") as caught:
        open_store(path)
    assert caught.value.code is ExitCode.DATA


@pytest.mark.parametrize(("begin", "stride"), [(0, 7), (4096, 97), (4096, 7), (8192, 31)])
def test_a_damaged_file_is_refused(tmp_path: Path, begin: int, stride: int) -> None:
    """Damage may reach the messages of SQLite, which then are no UTF-8."""
    path = tmp_path / "sparsed.db"
    open_store(path).close()
    content = bytearray(path.read_bytes())
    content[begin::stride] = bytes(byte ^ 255 for byte in content[begin::stride])
    path.write_bytes(content)
    with pytest.raises(StartError, match="not a readable database; move it away") as caught:
        open_store(path)
    assert caught.value.code is ExitCode.DATA
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE config SET \"values\" = CAST(x'ff7b' AS TEXT)",
        "UPDATE config SET \"values\" = '{'",
        "UPDATE profile SET status = 'verifiec'",
    ],
)
def test_a_damaged_value_is_a_failure_of_the_store(tmp_path: Path, damage: str) -> None:
    path = restore(ASSETS[-1], tmp_path / "sparsed.db")
    query(path, damage)
    store = open_store(path)
    with pytest.raises(StoreError, match=r"sparsed\.db is not a readable database"):
        store.list_profiles()
    with pytest.raises(StoreError, match="not a readable database"):
        store.pin(1)
    store.close()


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="cannot be opened") as caught:
        open_store(tmp_path / "missing" / "sparsed.db")
    assert caught.value.code is ExitCode.NO_PERMISSION


def test_an_upgrade_leaves_a_copy_of_the_old_file(tmp_path: Path) -> None:
    path = restore(ASSETS[0], tmp_path / "sparsed.db")
    before = set(_tables(path))
    open_store(path).close()
    copy = tmp_path / f"sparsed.db.before-{ASSETS[-1].stem}"
    assert query(copy, "SELECT fingerprint FROM hardware") == KEY.hardware
    assert set(_tables(copy)) == before
    assert Base.metadata.tables.keys() <= set(_tables(path))


def query(path: Path, statement: str) -> str | None:
    connection = sqlite3.connect(path, isolation_level=None)
    row = connection.execute(statement).fetchone()
    connection.close()
    return row and str(row[0])


def _tables(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    connection.close()
    return [name for (name,) in rows]
