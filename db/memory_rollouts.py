"""``RolloutStore`` without a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from threading import Lock

from sparsed.core import (
    KnobValue,
    LastKnownGood,
    ProfileKey,
    RolloutRecord,
    TunerControls,
    TunerRun,
)
from sparsed.db.rollouts import crashed


class InMemoryRollouts:
    """Forgotten with the process, so a start finds neither marker nor last known good."""

    def __init__(self) -> None:
        self._rollouts_lock = Lock()
        self._rollouts: list[tuple[ProfileKey, RolloutRecord]] = []
        self._markers: dict[ProfileKey, RolloutRecord] = {}
        self._goods: dict[ProfileKey, LastKnownGood] = {}
        self._runs: list[TunerRun] = []
        self._last_run_id = 0
        self._controls = TunerControls()

    def note_rollout(self, key: ProfileKey, record: RolloutRecord) -> None:
        with self._rollouts_lock:
            self._rollouts.append((key, record))

    def mark_rollout(self, key: ProfileKey, record: RolloutRecord) -> None:
        with self._rollouts_lock:
            self._rollouts.append((key, record))
            self._markers[key] = record

    def settle_rollout(
        self, key: ProfileKey, record: RolloutRecord, *, good: Mapping[str, KnobValue] | None
    ) -> None:
        with self._rollouts_lock:
            self._rollouts.append((key, record))
            self._markers.pop(key, None)
            if good is not None:
                self._goods[key] = LastKnownGood(values=dict(good), moved_at=record.at)

    def fail_marked(self, at: float) -> tuple[RolloutRecord, ...]:
        with self._rollouts_lock:
            failed = [(key, crashed(item, at=at)) for key, item in self._markers.items()]
            self._rollouts += failed
            self._markers.clear()
            return tuple(record for _, record in failed)

    def list_rollouts(self, key: ProfileKey) -> tuple[RolloutRecord, ...]:
        with self._rollouts_lock:
            return tuple(record for owner, record in reversed(self._rollouts) if owner == key)

    def find_good(self, key: ProfileKey) -> LastKnownGood | None:
        with self._rollouts_lock:
            good = self._goods.get(key)
            return good if good and good.values else None

    def begin_run(self, at: float) -> int:
        with self._rollouts_lock:
            self._last_run_id += 1
            run_id = self._last_run_id
            self._runs.append(TunerRun(run_id=run_id, started_at=at, alive_at=at, ended=False))
            return run_id

    def touch_run(self, run_id: int, at: float) -> None:
        self._change_run(run_id, at=at, ended=False)

    def end_run(self, run_id: int, at: float) -> None:
        self._change_run(run_id, at=at, ended=True)

    def _change_run(self, run_id: int, *, at: float, ended: bool) -> None:
        with self._rollouts_lock:
            self._runs = [
                replace(run, alive_at=at, ended=ended) if run.run_id == run_id else run
                for run in self._runs
            ]

    def list_runs(self) -> tuple[TunerRun, ...]:
        with self._rollouts_lock:
            return tuple(reversed(self._runs))

    def controls(self) -> TunerControls:
        with self._rollouts_lock:
            return self._controls

    def keep_controls(self, controls: TunerControls, *, forget_runs: bool = False) -> None:
        with self._rollouts_lock:
            self._controls = controls
            if forget_runs:
                self._runs = []
