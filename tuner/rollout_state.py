"""What the live tuner knows of its one candidate, what may happen to it, and what is to be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from sparsed.core import (
    AcceptanceRule,
    AcceptanceVerdict,
    AcceptanceWindow,
    InputError,
    KnobValue,
    RolloutReason,
    RolloutRecord,
    Snapshot,
    TunerMode,
)
from sparsed.tuner.schedule import Slot

Values = Mapping[str, KnobValue]


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRule:
    """Times in seconds. InputError for a rule under which no candidate could ever be tested.

    ``acceptance``: of what is to take the place of what runs; ``harmless``: of what a start took
    unproved, which need not be better than what the start would take without it.

    ``max_gap_s``: without a new window of the profiler for longer, the data are stale.
    ``max_explored_frac``: of the busy time; ``slo_budget_frac``: of the windows of about the last
    ``slo_horizon_s`` that may break a target. ``hbm_soft_frac``: of the memory of the GPU.
    ``max_queue_growth``: waiting requests more than when the candidate's turn began.
    """

    acceptance: AcceptanceRule = field(
        default_factory=lambda: AcceptanceRule(metric="output_tokens_per_s")
    )
    harmless: AcceptanceRule = field(
        default_factory=lambda: AcceptanceRule(
            metric="output_tokens_per_s", num_pairs=8, needs_gain=False
        )
    )
    window_s: float = 60.0
    washout_s: float = 30.0
    probation_s: float = 1800.0
    expiry_s: float = 86400.0
    apply_s: float = 120.0
    cooldown_s: float = 600.0
    max_cooldown_s: float = 86400.0
    quarantine_s: float = 86400.0
    max_gap_s: float = 3.0
    max_explored_frac: float = 0.05
    slo_budget_frac: float = 0.01
    slo_horizon_s: float = 3600.0
    min_busy_s: float = 30.0
    min_busy_frac: float = 0.5
    hbm_soft_frac: float = 0.97
    max_queue_growth: int = 16

    def __post_init__(self) -> None:
        for name in ("window_s", "washout_s", "max_gap_s", "max_explored_frac"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is not above 0; give a number above 0", field=name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Controls:
    """What operators allow now. ``pins``: knobs to leave alone."""

    mode: TunerMode = TunerMode.ADVISE
    pins: frozenset[str] = frozenset()
    frozen: bool = False
    killed: bool = False


class Phase(StrEnum):
    WAITING = "waiting"
    CANARY = "canary"
    PROBATION = "probation"


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """``turn``: which slot of the paired test runs; ``turn_s``: seconds of it, from the first
    window in which its knobs were in force, None before. ``good_before``: the last known good
    that probation falls back to. ``stands``: ``config_to`` was in force before the test, from the
    start on, and is in force again after it unless something is wrong with it."""

    phase: Phase
    config_from: Values
    config_to: Values
    initiated_by: str
    since: float  # when this phase began
    turn: int = 0
    turn_s: float | None = None
    turn_since: float = 0.0
    turn_waiting: int = 0  # requests in the queue as it began
    seen: tuple[Snapshot, ...] = ()  # of this window
    failures: int = 0  # of requests, in this window
    breaches: int = 0  # in a row
    windows: tuple[AcceptanceWindow, ...] = ()
    usual: tuple[float, float] | None = None  # log of the time per token: mean, deviation
    excess: float = 0.0  # the cumulated sum of probation
    good_before: Values = field(default_factory=dict)
    stands: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """Everything. ``good``: the last known good as it is stored, ``failed``: quarantined
    candidates and until when; ``busy_s`` and ``explored_s`` count this life of the daemon."""

    good: Values = field(default_factory=dict)
    controls: Controls = field(default_factory=Controls)
    candidate: Candidate | None = None
    at: float | None = None
    fresh_at: float | None = None
    snapshot: Snapshot | None = None
    num_failed: int = 0
    busy_s: float = 0.0
    explored_s: float = 0.0
    recent_s: float = 0.0  # decaying seconds of windows, of busy ones, and of broken targets
    recent_busy_s: float = 0.0
    recent_broken_s: float = 0.0
    cooldown_s: float = 0.0
    cool_at: float = 0.0
    failed: tuple[tuple[RolloutRecord, float], ...] = ()

    @property
    def is_testing(self) -> bool:
        """A candidate is or was in force, unproved: the marker stands."""
        return self.candidate is not None and self.candidate.phase is Phase.CANARY


# ---- events: each carries the time, seconds since the epoch ------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposed:
    """Advice to be tested; ``initiated_by`` is the tuner or an operator. ``against``: it is no
    advice, but what the start took unproved, to be tested against these."""

    at: float
    values: Values
    initiated_by: str
    against: Values | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticked:
    """About once a second. ``snapshot`` None: no new window; ``num_failed``: requests that failed
    since the daemon began."""

    at: float
    snapshot: Snapshot | None
    num_failed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Tripped:
    """Something outside the windows ends the candidate at once."""

    at: float
    reason: RolloutReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Steered:
    """Operators allow other things from now on."""

    at: float
    controls: Controls


Event = Proposed | Ticked | Tripped | Steered


# ---- actions: to be done in their order --------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """Record a step that changes nothing in force."""

    record: RolloutRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """Record, and set the dirty marker, durably, before anything that follows."""

    record: RolloutRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Apply:
    """Have these hot knobs in force. ``needs_marker``: only if the marker is on the disk."""

    values: Values
    needs_marker: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Settle:
    """Record, clear the marker and, with ``good``, move the last known good: one transaction.
    ``verdict`` by ``rule`` with ``windows``: the evidence, to be kept beside it."""

    record: RolloutRecord
    rule: AcceptanceRule
    good: Values | None = None
    verdict: AcceptanceVerdict | None = None
    windows: tuple[AcceptanceWindow, ...] = ()


Action = Note | Mark | Apply | Settle


def rule_of(candidate: Candidate, rule: RolloutRule) -> AcceptanceRule:
    return rule.harmless if candidate.stands else rule.acceptance


def slot_seconds(slot: Slot, rule: RolloutRule) -> float:
    return rule.washout_s if slot.is_discarded else rule.window_s
