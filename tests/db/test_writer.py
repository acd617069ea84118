"""Telemetry never blocks, never raises, and recovers; a killed writer leaves a readable file."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
from sqlalchemy import event

from sparsed.core import Decision, ProfileKey
from sparsed.db.memory import InMemoryProfileStore
from sparsed.db.session import open_engine
from sparsed.db.sql import SqlProfileStore
from sparsed.db.writer import TelemetryWriter

KEY = ProfileKey(hardware="cpu:x:2:4GiB", model="tiny", dtype="float32")
DECISION = Decision(
    made_at=1.0, values={}, reason="r" * 2000, predicted_score=None, current_score=None
)


def decision(number: int) -> Decision:
    return replace(DECISION, made_at=float(number), values={"token_budget": 256 + number})


class BlockedStore(InMemoryProfileStore):
    """A disk that does not answer until released."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.released = Event(), Event()

    def record_decision(self, key: ProfileKey, decision: Decision) -> None:
        self.entered.set()
        assert self.released.wait(10)
        super().record_decision(key, decision)


def test_writes_arrive_in_order(tmp_path: Path) -> None:
    store = SqlProfileStore(open_engine(tmp_path / "sparsed.db"))
    writer = TelemetryWriter(store)
    for number in range(20):
        writer.record_decision(KEY, decision(number))
    writer.close()
    assert [item.made_at for item in store.list_decisions(KEY)] == [*range(19, -1, -1)]
    assert writer.lost_writes == 0
    store.close()


def test_a_slow_disk_costs_writes_and_no_time() -> None:
    store = BlockedStore()
    writer = TelemetryWriter(store, max_queued=2)
    writer.record_decision(KEY, decision(0))
    assert store.entered.wait(10)
    for number in range(1, 6):
        writer.record_decision(KEY, decision(number))
    assert writer.lost_writes == 3
    store.released.set()
    writer.close()
    assert [item.made_at for item in store.list_decisions(KEY)] == [2.0, 1.0, 0.0]


def test_a_full_disk_is_counted_logged_once_and_forgiven(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = open_engine(tmp_path / "sparsed.db")
    store = SqlProfileStore(engine)
    limit = {"pages": 60}

    @event.listens_for(engine, "begin")
    def _bound(connection: object) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {limit['pages']}")  # type: ignore[attr-defined]  # a Connection

    clock = [0.0]
    writer = TelemetryWriter(store, clock=lambda: clock[0])
    with caplog.at_level(logging.WARNING):
        for number in range(200):
            writer.record_decision(KEY, decision(number))
        writer.close()
    lost, kept = writer.lost_writes, len(store.list_decisions(KEY))
    assert lost > 0
    assert lost + kept == 200
    assert len(caplog.records) == 1
    assert "full" in caplog.text
    limit["pages"] = 100_000
    again = TelemetryWriter(store)
    again.record_decision(KEY, decision(1000))
    again.close()
    assert (again.lost_writes, store.list_decisions(KEY)[0].made_at) == (0, 1000.0)
    store.close()


def test_a_lock_held_by_another_process_is_only_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "sparsed.db"
    store = SqlProfileStore(open_engine(path))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writer = TelemetryWriter(store)
    writer.record_decision(KEY, decision(0))
    assert store.list_decisions(KEY) == ()  # readers are not held either
    other.execute("ROLLBACK")
    other.close()
    writer.close()
    assert (writer.lost_writes, len(store.list_decisions(KEY))) == (0, 1)
    store.close()


WRITE_FOR_EVER = """
import sys
from pathlib import Path
from dataclasses import replace
from sparsed.core import Decision, ProfileKey
from sparsed.db import open_store

store = open_store(Path(sys.argv[1]))
key = ProfileKey(hardware="cpu:x:2:4GiB", model="tiny", dtype="float32")
number = 0
while True:
    store.record_decision(key, Decision(made_at=float(number), values={"token_budget": number},
                          reason="r", predicted_score=None, current_score=None))
    print(number, flush=True)
    number += 1
"""


@pytest.mark.slow
def test_kill_during_writes_leaves_every_finished_write_readable(tmp_path: Path) -> None:
    path = tmp_path / "sparsed.db"
    child = subprocess.Popen(
        [sys.executable, "-c", WRITE_FOR_EVER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) == 50:
            break
    os.kill(child.pid, signal.SIGKILL)
    last = max([50, *(int(line) for line in child.stdout.read().splitlines())])
    child.stdout.close()
    child.wait()
    store = SqlProfileStore(open_engine(path))
    found = [int(item.made_at) for item in store.list_decisions(KEY)]
    assert found in ([*range(last, -1, -1)], [*range(last + 1, -1, -1)])
    store.close()
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
