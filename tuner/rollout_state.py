"""What the live tuner knows of its one candidate, what may happen to it, and what is to be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from sparsed.core import (
    RECALL_KNOBS,
    AcceptanceRule,
    AcceptanceVerdict,
    AcceptanceWindow,
    Guard,
    InputError,
    KnobValue,
    Regime,
    RolloutReason,
    RolloutRecord,
    Slo,
    Snapshot,
    TunerMode,
)
from sparsed.tuner.drift import Drift
from sparsed.tuner.regimes import Regimes
from sparsed.tuner.schedule import Slot
from sparsed.tuner.targets import NOTHING, Guards, Recall, guard_targets

DWELL_S: Final = 600.0

Values = Mapping[str, KnobValue]


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRule:
    """Times in seconds. InputError for a rule under which no candidate could ever be tested.

    ``acceptance``: of what is to take the place of what runs; ``harmless``: of the values of a
    compatible profile, which need not be better. ``max_gap_s``: without a new window of the profiler
    for longer, the data are stale; a long step of prompts is no silence. ``lag_s``: of a change to
    come into force, with the window in which it does.
    ``max_explored_frac``: of the busy time; ``slo_budget_frac``: of the windows of about the last
    ``slo_horizon_s`` that may break a target. ``hbm_soft_frac``: of the memory of the GPU.
    ``max_queue_growth``: waiting requests more than when the candidate's turn began. ``dwell_s``:
    of a load, before it is another regime. ``max_prefill_chunk``: what memory has room for, None:
    any chunk.
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
    max_gap_s: float = 10.0
    lag_s: float = 3.0
    max_explored_frac: float = 0.05
    slo_budget_frac: float = 0.01
    slo_horizon_s: float = 3600.0
    min_busy_s: float = 30.0
    min_busy_frac: float = 0.5
    hbm_soft_frac: float = 0.97
    max_queue_growth: int = 16
    dwell_s: float = DWELL_S
    max_prefill_chunk: int | None = None

    @property
    def watch_s(self) -> float:
        """Of tripwires after a switch of regimes: it is over before the next one can come."""
        return self.dwell_s / 2

    def __post_init__(self) -> None:
        for name in ("window_s", "washout_s", "max_gap_s", "lag_s", "max_explored_frac", "dwell_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is not above 0; give a number above 0", field=name)


def live_rule(
    slo: Slo, *, dwell_s: float = DWELL_S, max_prefill_chunk: int | None = None
) -> RolloutRule:
    """The rule of a daemon with these targets: latency within its target, and recall over its
    floor, are no loss, as in the test of ``sparsed tune``; without a target any loss counts."""
    targets = guard_targets(slo)
    rule = RolloutRule(dwell_s=dwell_s, max_prefill_chunk=max_prefill_chunk)
    return replace(
        rule,
        acceptance=replace(rule.acceptance, targets=targets),
        harmless=replace(rule.harmless, targets=targets),
    )


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
    SWITCHED = "switched"  # no candidate, but values verified for another load than the one before


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """``turn``: which slot of the paired test runs; ``turn_s``: seconds of it, from the first
    window in which its knobs were in force, None before. ``good_before`` and ``regime_before``:
    what probation falls back to, the latter None where no regime was known. ``excused``:
    targets that were missed before it, and have not been met since. ``repairs``: those that were
    missed for good when its test began. ``profile``: as in ``RolloutRecord``."""

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
    regime_id: int | None = None
    regime_before: Regime | None = None
    foreign_s: float = 0.0  # of this turn, under another load
    excused: Guards = NOTHING
    profile: str = ""
    repairs: Guards = NOTHING


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """Everything. ``good``: the last known good as it is stored, ``failed``: quarantined
    candidates and until when, ``beaten``: the ways back from proved ones likewise; ``busy_s`` and
    ``explored_s`` count this life of the daemon.

    ``base``: the knobs of ``LIVE_KNOBS`` that this life began with; ``versions``: what it runs on;
    ``settled``: id of the regime whose values are in force, or were tried; ``switched``: knobs that
    have values of a regime; ``stale``: why nothing that was measured holds, in words."""

    good: Values = field(default_factory=dict)
    controls: Controls = field(default_factory=Controls)
    candidate: Candidate | None = None
    at: float | None = None
    fresh_at: float | None = None
    snapshot: Snapshot | None = None
    num_failed: int = 0
    busy_s: float = 0.0
    explored_s: float = 0.0
    recall: Recall = field(default_factory=Recall)  # under the knobs in force
    # Decaying seconds of windows: all, busy ones, those that missed any target, and for each target
    # those that tell of it, and that missed it.
    recent_s: float = 0.0
    recent_busy_s: float = 0.0
    recent_broken_s: float = 0.0
    recent_told_s: Mapping[Guard, float] = field(default_factory=dict)
    recent_missed_s: Mapping[Guard, float] = field(default_factory=dict)
    cooldown_s: float = 0.0
    cool_at: float = 0.0
    failed: tuple[tuple[RolloutRecord, float], ...] = ()
    beaten: tuple[tuple[RolloutRecord, float], ...] = ()
    base: Values = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    regimes: Regimes = field(default_factory=Regimes)
    settled: int | None = None
    switched: frozenset[str] = frozenset()
    drift: Drift = field(default_factory=Drift)
    stale: str = ""

    @property
    def is_testing(self) -> bool:
        """A candidate is or was in force, unproved: the marker stands."""
        return self.candidate is not None and self.candidate.phase is Phase.CANARY


# ---- events: each carries the time, seconds since the epoch ------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposed:
    """Advice to be tested; ``initiated_by`` is the tuner or an operator. ``profile``: of which the
    values are to be tested all together, as in ``RolloutRecord``."""

    at: float
    values: Values
    initiated_by: str
    profile: str = ""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Drifted:
    """What was measured on this machine holds no more; ``reason`` in words. ``values``: safe ones,
    for hot knobs."""

    at: float
    reason: str
    values: Values


Event = Proposed | Ticked | Tripped | Steered | Drifted


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
class Evidence:
    """``verdict`` is what ``rule`` says of ``windows``."""

    rule: AcceptanceRule
    verdict: AcceptanceVerdict
    windows: tuple[AcceptanceWindow, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settle:
    """Record, clear the marker, with ``good`` move the last known good, and with ``regime`` keep
    that one: one transaction. ``evidence``: to be kept beside it."""

    record: RolloutRecord
    good: Values | None = None
    evidence: Evidence | None = None
    regime: Regime | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Keep:
    """Remember the regimes as they are."""

    regimes: tuple[Regime, ...]


Action = Note | Mark | Apply | Settle


def rule_of(candidate: Candidate, rule: RolloutRule) -> AcceptanceRule:
    """Quality is a guard of a candidate that changes which tokens are read. Any other reads as
    ever, and the samples of its windows, of a layer each and few, would tell of chance alone."""
    chosen = rule.harmless if candidate.profile else rule.acceptance
    if RECALL_KNOBS & candidate.config_to.keys():
        return chosen
    guards = tuple(guard for guard in chosen.guards if guard is not Guard.QUALITY)
    return replace(chosen, guards=guards)


def slot_seconds(slot: Slot, rule: RolloutRule) -> float:
    return rule.washout_s if slot.is_discarded else rule.window_s
