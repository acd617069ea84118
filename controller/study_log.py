"""What a study measures and decides goes to the store as it comes, with its times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from sparsed.core import AcceptanceDecision, AcceptanceWindow, ProfileKey, TrialResult
from sparsed.db.store import Store, StoreError
from sparsed.tuner.verification import Comparison


class StudyLog:
    """One study. A store that fails costs the row, which ``say`` tells, and never the study."""

    def __init__(
        self,
        store: Store,
        *,
        key: ProfileKey,
        study_id: int,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._key = key
        self._study_id = study_id
        self._say = say
        self._clock = clock
        self._windows: list[AcceptanceWindow] = []
        self._window_began_at = clock()

    def begin_window(self) -> None:
        self._window_began_at = self._clock()

    def record_trial(self, trial: TrialResult) -> None:
        """``started_at`` is known, as several may be under way."""
        timed = replace(trial, ended_at=self._clock())
        try:
            self._store.record_trial(self._study_id, timed)
        except StoreError as error:
            self._say(f"trial {trial.number} could not be stored: {error}")

    def record_window(self, window: AcceptanceWindow) -> None:
        """Kept for the decision it belongs to; windows of a verification come one by one."""
        timed = replace(window, started_at=self._window_began_at, ended_at=self._clock())
        self._windows.append(timed)

    def record_decision(self, found: Comparison) -> None:
        decision = AcceptanceDecision(
            key=self._key,
            config_from=found.config_from,
            config_to=found.config_to,
            rule=found.rule,
            verdict=found.verdict,
            windows=tuple(self._windows),
            initiated_by="tune",
            decided_at=self._clock(),
            study_id=self._study_id,
        )
        try:
            saved = self._store.save_acceptance(decision)
        except StoreError as error:
            self._say(f"the decision could not be stored: {error}")
        else:
            self._say(f"its evidence: sparsed decision show {saved.decision_id}")
