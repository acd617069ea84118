"""A daemon's rollout with a fake engine and a real database, killed at each of its writes.

``python -P crashing_tuner.py DIR``, with ``tests/samples`` on the path, forks one process for every write; each dies by SIGKILL there,
and what the next start finds is compared with what the dead one is known to have reached. One
line of JSON for each.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from serving import KNOBS, SNAPSHOT
from sqlalchemy import Engine, event

from sparsed.controller.recovery import recover, tuned_values
from sparsed.controller.rollout_host import RolloutHost
from sparsed.core import (
    AcceptanceRule,
    ProfileKey,
    RolloutReason,
    Slo,
    TunerMode,
)
from sparsed.db import open_store
from sparsed.db.sql import SqlProfileStore
from sparsed.db.store import Store
from sparsed.tuner.rollout_state import RolloutRule, Values

KEY = ProfileKey(hardware="cpu:x:2:4GiB", model="tiny", dtype="float32")
RULE = RolloutRule(
    acceptance=AcceptanceRule(metric="output_tokens_per_s", num_pairs=6),
    window_s=1.0,
    washout_s=1.0,
    probation_s=4.0,
    cooldown_s=2.0,
    max_explored_frac=0.5,
    min_busy_s=5.0,
)
FIRST: Values = {"max_num_active_seqs": 6}
BAD: Values = {"max_num_active_seqs": 8}
SECOND: Values = {"prefill_chunk": 768}
GOODS: tuple[Values, ...] = ({}, FIRST, {**FIRST, **SECOND}, FIRST)  # in the order of the story


class FakeDaemon:
    """Windows of an engine that has what it was told at once; ``on_apply`` sees every change."""

    def __init__(
        self, store: Store, directory: Path, *, on_apply: Callable[[Values], None] = lambda _: None
    ) -> None:
        self.at = 1000.0
        self.knobs = KNOBS.with_values(tuned_values(store, KEY).values)
        self.num_failed = 0
        self.applied: list[Values] = []
        self._on_apply = on_apply
        self.host = RolloutHost(
            store,
            KEY,
            slo=Slo(tpot_s=0.1),
            apply=self._apply,
            read_failures=lambda: self.num_failed,
            kill_file=directory / "tuner.kill",
            rule=RULE,
            clock=lambda: self.at,
        )
        self.host.set_mode(TunerMode.AUTO)

    async def _apply(self, values: Values) -> None:
        self._on_apply(values)
        self.knobs = self.knobs.with_values(values)
        self.applied.append(values)

    async def tick(self, **figures: Any) -> None:
        """One second: larger values give more tokens. Returns with everything done."""
        self.at += 1.0
        gain = self.knobs.max_num_active_seqs * self.knobs.prefill_chunk / (4 * 512)
        base = replace(
            SNAPSHOT,
            ended_at=self.at,
            generated_tokens_per_s=50.0 * gain,
            knobs=self.knobs,
        )
        self.host.on_snapshot(replace(base, **figures))
        await self.settled()

    async def settled(self) -> None:
        while self.host._batches.qsize() or self.host._applying:
            await self.host._batches.join()
            await asyncio.gather(*self.host._applying)
        await self.host._batches.join()

    async def until(self, reason: RolloutReason, *, max_ticks: int = 400) -> None:
        """Serve until the newest step has this reason."""
        for _ in range(max_ticks):
            if self.host.records and self.host.records[0].reason is reason:
                return
            await self.tick()
        raise AssertionError(f"no {reason} in {max_ticks} s: {list(self.host.records)[:3]}")

    async def until_in_force(self, values: Values) -> None:
        for _ in range(400):
            await self.tick()
            if self.knobs == self.knobs.with_values(values):
                return
        raise AssertionError(f"{values} never came into force")


async def story(store: Store, directory: Path, *, on_apply: Callable[[Values], None]) -> None:
    """One candidate is committed and stays, one trips, one is killed on probation."""
    daemon = FakeDaemon(store, directory, on_apply=on_apply)
    worker = asyncio.create_task(daemon.host.work())
    for _ in range(80):
        await daemon.tick()
    daemon.host.propose(FIRST, initiated_by="auto")
    await daemon.until(RolloutReason.PROBATION_PASSED)
    for _ in range(80):
        await daemon.tick()
    daemon.host.propose(BAD, initiated_by="auto")
    await daemon.until_in_force(BAD)
    await daemon.tick()
    for _ in range(2):
        await daemon.tick(tpot_p95_s=0.2)
    assert daemon.host.records[0].reason is RolloutReason.SLO_BREACH
    for _ in range(3 * 80):
        await daemon.tick()
    daemon.host.propose(SECOND, initiated_by="auto")
    await daemon.until(RolloutReason.COMMITTED)
    daemon.host.kill()
    await daemon.settled()
    worker.cancel()
    await asyncio.wait({worker})
    await daemon.host.close()


class Killer:
    """Counts writes and dies at one of them; tells ``pipe`` what was reached before."""

    def __init__(self, at: int, pipe: int) -> None:
        self._at = at
        self._pipe = pipe
        self.count = 0

    def write(self, what: str) -> None:
        self.count += 1
        if self.count == self._at:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(self._pipe, f"{what}\n".encode())


class Told:
    """The store; says which good each settled step has left, once it is on the disk."""

    def __init__(self, store: Store, killer: Killer) -> None:
        self._store = store
        self._killer = killer

    def __getattr__(self, name: str) -> object:
        method = getattr(self._store, name)
        if not name.endswith("_rollout"):
            return method

        def call(*args: object, **kwargs: object) -> None:
            method(*args, **kwargs)
            good = json.dumps(kwargs.get("good"))
            self._killer.write(f"{name} {good}")

        return call


def die_at(number: int, directory: Path, pipe: int) -> int:
    """Tell the story, and die at write ``number``; returns how many there were, if it was more."""
    store = open_store(directory / "sparsed.db")
    killer = Killer(number, pipe)
    engine = _engine_of(store)

    def on_statement(_c: object, _cur: object, statement: str, *_rest: object) -> None:
        if statement.split()[0] in ("INSERT", "UPDATE", "DELETE"):
            killer.write("statement")

    event.listen(engine, "before_cursor_execute", on_statement)
    event.listen(engine, "commit", lambda _connection: killer.write("commit"))
    told = cast(Store, Told(store, killer))  # it has what the store has, by name
    recover(told, at=999.0)

    def on_apply(values: Values) -> None:
        killer.write(f"apply {json.dumps(dict(values))}")

    asyncio.run(story(told, directory, on_apply=on_apply))
    store.close()
    return killer.count


def run_one(number: int, template: Path, directory: Path) -> dict[str, object]:
    """Die at one write, then start again twice."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    shutil.copy(template, directory / "sparsed.db")
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(reader)
        count = die_at(number, directory, writer)
        os.write(writer, f"finished {count}\n".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        reached = lines.read().splitlines()
    _, status = os.waitpid(pid, 0)
    store = open_store(directory / "sparsed.db")
    was_marked = _num_markers(store) > 0
    recover(store, at=5000.0)
    good = tuned_values(store, KEY).values
    crashes = [item for item in store.list_rollouts(KEY) if item.reason is RolloutReason.CRASHED]
    recover(store, at=6000.0)
    again = [item for item in store.list_rollouts(KEY) if item.reason is RolloutReason.CRASHED]
    num_markers = _num_markers(store)
    good_again = tuned_values(store, KEY).values
    store.close()
    return {
        "number": number,
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "reached": reached,
        "was_marked": was_marked,
        "good": dict(good),
        "crashes": len(crashes),
        "is_stable": (len(again), num_markers, good_again) == (len(crashes), 0, good),
    }


def _engine_of(store: Store) -> Engine:
    """What lies below the store: statements and commits are seen there alone."""
    assert isinstance(store, SqlProfileStore)
    return store._engine


def _num_markers(store: Store) -> int:
    with _engine_of(store).connect() as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM tuner_marker").scalar_one())


def main(directory: Path) -> None:
    template = directory / "template.db"
    open_store(template).close()
    number = 1
    while True:
        found = run_one(number, template, directory / "run")
        print(json.dumps(found), flush=True)
        if not found["killed"]:
            return
        number += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
