"""The store without a file: for tests, and for a daemon whose disk refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

from sparsed.core import (
    AcceptanceDecision,
    Decision,
    InputError,
    LinkCalibration,
    LinkKey,
    Objective,
    Profile,
    ProfileKey,
    ProfileStatus,
    Slo,
    Snapshot,
    TrialResult,
    Workload,
)
from sparsed.db import rows
from sparsed.db.memory_rollouts import InMemoryRollouts
from sparsed.db.rollup import MAX_DECISIONS, RETENTION_S, Rollup, RollupBuilder
from sparsed.db.store import StoreError, Study, unknown_decision, unknown_study


@dataclass(frozen=True, kw_only=True, slots=True)
class _Study:
    begun: Study
    trials: list[TrialResult] = field(default_factory=list)


class InMemoryProfileStore(InMemoryRollouts):
    """``Store`` in this process; ids count from 1 as in SQL."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = Lock()
        self._profiles: list[Profile] = []
        self._studies: list[_Study] = []
        self._builders = tuple(RollupBuilder(period_s) for period_s in RETENTION_S)
        self._rollups: list[tuple[ProfileKey, Rollup]] = []
        self._decisions: list[tuple[ProfileKey, Decision]] = []
        self._acceptances: list[AcceptanceDecision] = []
        self._calibrations: dict[LinkKey, LinkCalibration] = {}

    def close(self) -> None:
        """Nothing to release; what was remembered stays readable."""

    # profiles

    def save_profile(self, profile: Profile) -> Profile:
        with self._lock:
            if profile.pinned:
                self._unpin(profile.key)
            saved = replace(
                profile,
                values=rows.plain_mapping(profile.values),
                default_scores=tuple(rows.plain_numbers(profile.default_scores)),
                winner_scores=tuple(rows.plain_numbers(profile.winner_scores)),
                profile_id=len(self._profiles) + 1,
                seed=None,
            )
            self._profiles.append(saved)
            return saved

    def list_profiles(self, key: ProfileKey | None = None) -> tuple[Profile, ...]:
        with self._lock:
            return tuple(item for item in reversed(self._profiles) if key in (None, item.key))

    def find_verified(self, key: ProfileKey) -> Profile | None:
        found = self.list_profiles(key)
        verified = (item for item in found if item.status is ProfileStatus.VERIFIED)
        return next((item for item in found if item.pinned), next(verified, None))

    def pin(self, profile_id: int) -> Profile:
        with self._lock:
            if not 1 <= profile_id <= len(self._profiles):
                raise InputError(
                    f"no profile {profile_id}; see: sparsed profile list", field="profile_id"
                )
            self._unpin(self._profiles[profile_id - 1].key)
            pinned = replace(self._profiles[profile_id - 1], pinned=True)
            self._profiles[profile_id - 1] = pinned
            return pinned

    def mark_stale(self, profile_id: int) -> None:
        with self._lock:
            self._profiles = [
                replace(item, status=ProfileStatus.STALE) if item.profile_id == profile_id else item
                for item in self._profiles
            ]

    def _unpin(self, key: ProfileKey) -> None:
        self._profiles = [
            replace(item, pinned=False) if item.key == key else item for item in self._profiles
        ]

    # studies

    def start_study(
        self,
        key: ProfileKey,
        *,
        workload: Workload,
        objective: Objective,
        slo: Slo,
        seed: int,
        space: Mapping[str, Any],
        versions: Mapping[str, str],
        started_at: float,
    ) -> int:
        del versions, started_at  # no reader asks for them
        with self._lock:
            study = Study(
                study_id=len(self._studies) + 1,
                key=key,
                workload=workload,
                objective=objective,
                slo=slo,
                seed=seed,
                space=dict(space),
            )
            self._studies.append(_Study(begun=study))
            return study.study_id

    def find_study(
        self, key: ProfileKey, *, workload: str, objective: Objective, slo: Slo, seed: int
    ) -> Study | None:
        wanted = (key, workload, objective, slo, seed)
        with self._lock:
            for study in (item.begun for item in reversed(self._studies)):
                has = (study.key, study.workload.name, study.objective, study.slo, study.seed)
                if has == wanted:
                    return study
        return None

    def get_study(self, study_id: int) -> Study:
        with self._lock:
            if not 1 <= study_id <= len(self._studies):
                raise unknown_study(study_id)
            return self._studies[study_id - 1].begun

    def record_trial(self, study_id: int, trial: TrialResult) -> None:
        with self._lock:
            if not 1 <= study_id <= len(self._studies):
                raise StoreError(f"no study {study_id}")
            trials = self._studies[study_id - 1].trials
            if any(item.number == trial.number for item in trials):
                raise StoreError(f"trial {trial.number} of study {study_id} exists")
            trials.append(replace(trial, values=rows.plain_mapping(trial.values)))

    def list_trials(
        self, *, study_id: int | None = None, key: ProfileKey | None = None
    ) -> tuple[TrialResult, ...]:
        with self._lock:
            return tuple(
                trial
                for number, study in enumerate(self._studies, start=1)
                for trial in study.trials
                if study_id in (None, number) and key in (None, study.begun.key)
            )

    # decisions

    def save_acceptance(self, decision: AcceptanceDecision) -> AcceptanceDecision:
        plain = rows.plain_decision(decision)
        with self._lock:
            numbers = [window.number for window in plain.windows]
            if len(set(numbers)) < len(numbers):
                raise StoreError("two windows of a decision have the same number")
            if plain.study_id is not None and not 1 <= plain.study_id <= len(self._studies):
                raise StoreError(f"no study {plain.study_id}")
            saved = replace(plain, decision_id=len(self._acceptances) + 1)
            self._acceptances.append(saved)
            return saved

    def find_acceptance(self, decision_id: int) -> AcceptanceDecision:
        with self._lock:
            for decision in self._acceptances:
                if decision.decision_id == decision_id:
                    return decision
        raise unknown_decision(decision_id)

    def list_acceptances(self) -> tuple[AcceptanceDecision, ...]:
        with self._lock:
            return tuple(reversed(self._acceptances))

    # telemetry

    def record_snapshot(self, key: ProfileKey, snapshot: Snapshot) -> None:
        with self._lock:
            finished = [item for builder in self._builders for item in builder.add(snapshot)]
            kept = (
                (owner, item)
                for owner, item in self._rollups
                if item.started_at >= snapshot.ended_at - RETENTION_S[item.period_s]
            )
            if finished:
                self._rollups = [*kept, *((key, item) for item in finished)]

    def list_rollups(self, key: ProfileKey, *, period_s: int) -> tuple[Rollup, ...]:
        with self._lock:
            return tuple(
                item for owner, item in self._rollups if (owner, item.period_s) == (key, period_s)
            )

    def record_decision(self, key: ProfileKey, decision: Decision) -> None:
        with self._lock:
            self._decisions = [*self._decisions, (key, decision)][-MAX_DECISIONS:]

    def list_decisions(self, key: ProfileKey) -> tuple[Decision, ...]:
        with self._lock:
            return tuple(item for owner, item in reversed(self._decisions) if owner == key)

    # links

    def save_calibration(self, calibration: LinkCalibration) -> None:
        with self._lock:
            self._calibrations[calibration.key] = calibration

    def find_calibration(self, key: LinkKey) -> LinkCalibration | None:
        with self._lock:
            return self._calibrations.get(key)
