"""What the database remembers, as contracts over core values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sparsed.core import (
    AcceptanceDecision,
    Decision,
    InputError,
    KnobValue,
    LastKnownGood,
    LinkCalibration,
    LinkKey,
    Objective,
    Profile,
    ProfileKey,
    Regime,
    RolloutRecord,
    Slo,
    Snapshot,
    TrialResult,
    TunerControls,
    TunerRun,
    Workload,
)
from sparsed.db.rollup import Rollup


class StoreError(Exception):
    """The storage refused or lost an operation (disk full, locked, damaged); nothing changed."""


def unknown_study(study_id: int) -> InputError:
    return InputError(
        f"no study {study_id}; a run of sparsed tune says its number, and last is the newest",
        field="resume",
    )


def unknown_decision(decision_id: int) -> InputError:
    return InputError(f"no decision {decision_id}; see: sparsed decision list", field="decision_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """An offline search as it was begun; ``workload`` is what its trials served. ``space`` is plain
    data that names what it searches; None: begun by a version that did not keep it."""

    study_id: int
    key: ProfileKey
    workload: Workload
    objective: Objective
    slo: Slo
    seed: int
    space: Mapping[str, Any] | None


class ProfileStore(Protocol):
    """Tuned configurations. Any thread may call; each call is one transaction.

    Errors: StoreError when the storage fails, InputError for an unknown id.
    """

    def save_profile(self, profile: Profile) -> Profile:
        """Add a new row; returns the profile with its id. A pinned one takes over the pin."""
        ...

    def list_profiles(self, key: ProfileKey | None = None) -> tuple[Profile, ...]:
        """Newest first; all keys without ``key``."""
        ...

    def find_verified(self, key: ProfileKey) -> Profile | None:
        """What a start should use: the pinned profile of ``key``, else its newest verified one."""
        ...

    def pin(self, profile_id: int) -> Profile:
        """Prefer this profile from now on; the key's earlier pin is dropped."""
        ...

    def mark_stale(self, profile_id: int) -> None:
        """What it was measured on has changed: starts take it no more, unless it is pinned."""
        ...


class StudyStore(Protocol):
    """Trials of offline tuning. Threads and errors as in ``ProfileStore``."""

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
        """Open a study; returns its id."""
        ...

    def find_study(
        self, key: ProfileKey, *, workload: str, objective: Objective, slo: Slo, seed: int
    ) -> Study | None:
        """The newest study that asked this over a workload of this name, to be resumed."""
        ...

    def get_study(self, study_id: int) -> Study: ...

    def record_trial(self, study_id: int, trial: TrialResult) -> None:
        """Keep one trial. Numbers are unique within a study."""
        ...

    def list_trials(
        self, *, study_id: int | None = None, key: ProfileKey | None = None
    ) -> tuple[TrialResult, ...]:
        """Trials of one study, or of every study of one key, oldest first."""
        ...


class DecisionStore(Protocol):
    """Tested changes with their windows, kept for good. Threads and errors as in
    ``ProfileStore``."""

    def save_acceptance(self, decision: AcceptanceDecision) -> AcceptanceDecision:
        """Add it with all its windows, or nothing; returns it with its id. Figures that are not
        finite numbers come back as None."""
        ...

    def find_acceptance(self, decision_id: int) -> AcceptanceDecision: ...

    def list_acceptances(self) -> tuple[AcceptanceDecision, ...]:
        """Newest first, over all keys."""
        ...


class TelemetryStore(Protocol):
    """What the daemon saw and advised. Threads and errors as in ``ProfileStore``.

    Growth is bounded: minute rollups are kept for a week, hour rollups for half a year, the
    newest thousand decisions for good.
    """

    def record_snapshot(self, key: ProfileKey, snapshot: Snapshot) -> None:
        """Add a window to the running minute and hour; a full one is written."""
        ...

    def list_rollups(self, key: ProfileKey, *, period_s: int) -> tuple[Rollup, ...]:
        """Rollups of one period (a key of ``RETENTION_S``), oldest first."""
        ...

    def record_decision(self, key: ProfileKey, decision: Decision) -> None: ...

    def list_decisions(self, key: ProfileKey) -> tuple[Decision, ...]:
        """Newest first."""
        ...


class LinkStore(Protocol):
    """Calibrations of links, one for each key. Threads and errors as in ``ProfileStore``."""

    def save_calibration(self, calibration: LinkCalibration) -> None:
        """Keep it, instead of an earlier one of the same key."""
        ...

    def find_calibration(self, key: LinkKey) -> LinkCalibration | None: ...


class RolloutStore(Protocol):
    """What the live tuner must not forget. Threads and errors as in ``ProfileStore``; what these
    write is on the disk when they return.

    Growth is bounded: the newest thousand steps, ten last known goods of each key, hundred runs.
    """

    def note_rollout(self, key: ProfileKey, record: RolloutRecord) -> None:
        """Keep a step that leaves marker and last known good alone."""
        ...

    def mark_rollout(self, key: ProfileKey, record: RolloutRecord) -> None:
        """Keep the step, and mark its candidate as in force and unproved."""
        ...

    def settle_rollout(
        self,
        key: ProfileKey,
        record: RolloutRecord,
        *,
        good: Mapping[str, KnobValue] | None,
        versions: Mapping[str, str] | None = None,
        regime: Regime | None = None,
    ) -> None:
        """Keep the step, clear the marker and, with ``good``, move the last known good to it,
        proved on ``versions``; with ``regime``, keep that one as it is then."""
        ...

    def fail_marked(self, at: float) -> tuple[RolloutRecord, ...]:
        """Of every candidate that is marked: keep that it was reverted for a crash, clear the
        marker. For a start, which finds markers only if the process died."""
        ...

    def list_rollouts(self, key: ProfileKey) -> tuple[RolloutRecord, ...]:
        """Newest first."""
        ...

    def find_good(self, key: ProfileKey) -> LastKnownGood | None:
        """None where the live tuner never changed anything, or all of it was taken back."""
        ...

    def begin_run(self, at: float) -> int:
        """Serving with values of the live tuner begins; returns the id of the run."""
        ...

    def touch_run(self, run_id: int, at: float) -> None:
        """It still serves. A hint: not on the disk at once."""
        ...

    def end_run(self, run_id: int, at: float) -> None:
        """It ends as it should."""
        ...

    def list_runs(self) -> tuple[TunerRun, ...]:
        """Newest first."""
        ...

    def controls(self) -> TunerControls: ...

    def keep_controls(self, controls: TunerControls, *, forget_runs: bool = False) -> None:
        """``forget_runs``: crashes so far count no more."""
        ...


class RegimeStore(Protocol):
    """Kinds of load that the live tuner knows. Threads and errors as in ``RolloutStore``."""

    def keep_regimes(self, key: ProfileKey, regimes: Sequence[Regime]) -> None:
        """These, instead of all that were kept for ``key``."""
        ...

    def list_regimes(self, key: ProfileKey) -> tuple[Regime, ...]:
        """By their ids."""
        ...


class Store(
    ProfileStore,
    StudyStore,
    DecisionStore,
    TelemetryStore,
    LinkStore,
    RolloutStore,
    RegimeStore,
    Protocol,
):
    """Everything; the opener owns it and closes it once."""

    def close(self) -> None: ...
