"""Telemetry goes to the disk on a thread of its own, and never holds serving."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from queue import Full, Queue
from threading import Thread
from typing import Final

from sparsed.core import Decision, ProfileKey, Snapshot
from sparsed.db.store import StoreError, TelemetryStore

logger = logging.getLogger(__name__)
LOG_INTERVAL_S: Final = 60.0

Write = Callable[[], None]


class TelemetryWriter:
    """The two writes of ``TelemetryStore``, queued. The caller keeps the store and closes it after.

    Calls return at once, from any thread, and never raise: a write that finds the queue full or
    the store failing (disk full, locked) is counted in ``lost_writes`` and logged at most once a
    minute; the next one is tried again.
    """

    def __init__(
        self,
        store: TelemetryStore,
        *,
        max_queued: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store: Final = store
        self._clock: Final = clock
        self._queue: Queue[Write | None] = Queue(max_queued)
        self._lost_full = 0  # counted by callers
        self._lost_failed = 0  # counted by the thread
        self._logged_at = -LOG_INTERVAL_S
        self._thread = Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    @property
    def lost_writes(self) -> int:
        """Writes that did not reach the store since the start."""
        return self._lost_full + self._lost_failed

    def record_snapshot(self, key: ProfileKey, snapshot: Snapshot) -> None:
        self._put(partial(self._store.record_snapshot, key, snapshot))

    def record_decision(self, key: ProfileKey, decision: Decision) -> None:
        self._put(partial(self._store.record_decision, key, decision))

    def close(self, *, timeout_s: float = 5.0) -> None:
        """Write what is queued, for at most about ``timeout_s``; what is left then is lost."""
        deadline_s = self._clock() + timeout_s
        try:
            self._queue.put(None, timeout=timeout_s)
        except Full:
            return
        self._thread.join(max(0.0, deadline_s - self._clock()))

    def _put(self, write: Write) -> None:
        try:
            self._queue.put_nowait(write)
        except Full:
            self._lost_full += 1

    def _run(self) -> None:
        while (write := self._queue.get()) is not None:
            try:
                write()
            except StoreError as error:
                self._lost_failed += 1
                self._log(error)

    def _log(self, error: StoreError) -> None:
        if self._clock() - self._logged_at >= LOG_INTERVAL_S:
            self._logged_at = self._clock()
            logger.warning("the store lost a write (%s); %d lost so far", error, self.lost_writes)
