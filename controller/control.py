"""What the control surface (gRPC, HTTP health, the command line) may ask of the daemon."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from sparsed.controller.recorder import Recorder
from sparsed.core import (
    Decision,
    DecisionState,
    EngineFacts,
    EngineStats,
    Knobs,
    KnobSpec,
    KnobValue,
    MemoryPlan,
    Regime,
    Remedy,
    RolloutRecord,
    Slo,
    Snapshot,
    TunerMode,
    Verdict,
)
from sparsed.db.store import ProfileStore


class DaemonState(StrEnum):
    LOADING = "loading"
    SERVING = "serving"
    DEGRADED = "degraded"  # serving, but something is lost: ``reasons`` says what
    RESTARTING = "restarting"  # the engine died and is coming back
    DRAINING = "draining"
    STOPPED = "stopped"


class KnobSource(StrEnum):
    """Where a value came from. LIVE: set while serving, now or for this start. TUNER: the last
    known good of the live tuner, or what safe mode takes."""

    DEFAULT = "default"
    MACHINE = "machine"
    PROFILE = "profile"
    FILE = "file"
    ENVIRONMENT = "environment"
    FLAG = "flag"
    LIVE = "live"
    TUNER = "tuner"


@dataclass(frozen=True, kw_only=True, slots=True)
class KnobState:
    """One knob as the operator sees it; ``pending`` waits for a restart, None: nothing waits."""

    spec: KnobSpec
    value: KnobValue
    source: KnobSource
    pending: KnobValue = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DaemonStatus:
    state: DaemonState
    reasons: tuple[str, ...]
    version: str
    pid: int
    uptime_s: float
    http_url: str
    model: str
    device: str
    dtype: str
    knobs: Knobs
    plan: MemoryPlan
    profile: str  # which profile was taken and why, in words
    engine_restarts: int
    requests_failed: int
    store_lost_writes: int
    tuner_mode: TunerMode
    facts: EngineFacts | None = None
    stats: EngineStats | None = None  # counters over every engine, gauges of the last report
    snapshot: Snapshot | None = None
    slo: Slo = field(default_factory=Slo)  # the targets of this start


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadState:
    """The load as the live tuner sees it. ``current``: id of the regime in force; ``is_settled``
    False: the load is on its way to another one. ``drift``: what does not do what it did, in words,
    empty if nothing; ``loss_frac``: of the goodput that was to be expected here, None before
    anything is."""

    regimes: tuple[Regime, ...] = ()
    current: int | None = None
    is_settled: bool = True
    drift: str = ""
    loss_frac: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TunerState:
    """``hold``: why no candidate is tested now, empty while one is. ``pins``: knobs that are left
    alone, by operators and by the start's flags, and the token budget without a floor of recall.
    ``explored_frac``: of the busy time so far."""

    mode: TunerMode
    num_observations: int
    decisions: tuple[Decision, ...] = field(default_factory=tuple)  # newest first
    rollouts: tuple[RolloutRecord, ...] = ()  # newest first
    pins: tuple[str, ...] = ()
    frozen: bool = False
    killed: bool = False
    safe_mode: bool = False
    hold: str = ""
    explored_frac: float = 0.0
    load: LoadState = field(default_factory=LoadState)


class TunerVerb(StrEnum):
    """What operators may tell the live tuner beside its mode."""

    KILL = "kill"  # undo what is not proved, and end tuning, also after restarts
    REVIVE = "revive"  # lift that, and safe mode
    FREEZE = "freeze"
    UNFREEZE = "unfreeze"
    APPROVE = "approve"
    REJECT = "reject"
    PIN = "pin"
    UNPIN = "unpin"


@dataclass(frozen=True, kw_only=True, slots=True)
class TriedChange:
    """A change of knobs that was put to the test; ``words``: what became of it, and by which
    figure."""

    decision_id: int | None
    decided_at: float  # seconds since the epoch
    state: DecisionState
    values: Mapping[str, KnobValue]  # those that differed
    words: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """What binds now, what would help, and what was advised and tried before for this machine
    and model, the newest first. ``rollouts``: how candidates of the live tuner ended."""

    verdict: Verdict
    remedies: tuple[Remedy, ...]
    advised: tuple[Decision, ...]
    tried: tuple[TriedChange, ...]
    rollouts: tuple[RolloutRecord, ...]
    load: LoadState = field(default_factory=LoadState)


class Control(Protocol):
    """Implemented by the daemon. Called on the event loop; only ``drain``, ``set_knobs``,
    ``explain`` and ``steer_tuner`` wait. InputError: a bad value, nothing has changed."""

    @property
    def profiles(self) -> ProfileStore: ...

    @property
    def recorder(self) -> Recorder: ...

    def status(self) -> DaemonStatus: ...

    def list_knobs(self) -> tuple[KnobState, ...]: ...

    async def set_knobs(
        self, values: Mapping[str, KnobValue], *, validate_only: bool, reason: str
    ) -> tuple[KnobState, ...]:
        """Hot knobs change once the engine is ready for them, which is waited for; others become
        ``pending``. InputError, too, for a hot value that a newer change has overtaken."""
        ...

    async def explain(self) -> Explanation:
        """Errors: StoreError when what was tried cannot be read."""
        ...

    async def drain(self, *, timeout_s: float | None) -> int:
        """Refuse new requests, wait for running ones; returns how many were cut off."""
        ...

    def request_stop(self) -> None:
        """Begin an ordered shutdown (drain included); returns at once."""
        ...

    def tuner(self, mode: TunerMode | None = None) -> TunerState:
        """The live tuner's state, after switching to ``mode`` if one is given."""
        ...

    async def steer_tuner(
        self, verb: TunerVerb, *, knob: str, validate_only: bool, reason: str
    ) -> TunerState:
        """Tell the live tuner something; ``knob`` is for pins. Returns once it is kept on the
        disk. InputError for what cannot be done now, StoreError if it could not be kept."""
        ...
