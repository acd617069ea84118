"""The live tuner from one load to the next: what is verified for a regime comes into force in it;
pure. Not exploration: nothing here is tried that a paired test has not accepted."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from sparsed.core import (
    InputError,
    Knobs,
    KnobValue,
    LastKnownGood,
    Regime,
    RolloutReason,
    RolloutRecord,
    RolloutState,
    Slo,
    Snapshot,
    TunerMode,
)
from sparsed.tuner.drift import Drift, watch
from sparsed.tuner.gate import is_quarantined
from sparsed.tuner.regimes import observe, with_incumbent
from sparsed.tuner.rollout_end import Step, end, has, not_in_force, record_of
from sparsed.tuner.rollout_state import (
    Action,
    Apply,
    Candidate,
    Controls,
    Drifted,
    Note,
    Phase,
    Rollout,
    RolloutRule,
    Settle,
    Ticked,
    Values,
)
from sparsed.tuner.space import largest_chunk
from sparsed.tuner.targets import missed
from sparsed.tuner.tripwire import count, trip

REGIME: Final = "regime"  # who initiated a switch
DRIFT: Final = "drift"
LIVE_KNOBS: Final = (
    "token_budget",
    "hbm_budget",
    "max_num_active_seqs",
    "prefill_chunk",
    "residency_watermark",
    "retrieval_stride",
)
ADDED: Final = {"retrieval_stride": 1}  # of incumbents that were kept before there was the knob


def live_values(knobs: Knobs) -> dict[str, KnobValue]:
    """Of all that the live tuner may change: what is verified is verified together."""
    return {name: getattr(knobs, name) for name in LIVE_KNOBS}


def follow(state: Rollout, event: Ticked, *, rule: RolloutRule, slo: Slo) -> Step:
    """Where the load is now, and how the values in force do there. A candidate belongs to one
    regime and ends with it."""
    if (snapshot := event.snapshot) is None:
        return state, ()
    before = state.regimes.current
    regimes = observe(state.regimes, snapshot.context, at=event.at, dwell_s=rule.dwell_s)
    state = replace(state, regimes=regimes)
    state = replace(state, drift=_watched(state, snapshot, rule=rule, slo=slo))
    if regimes.current == before:
        return state, ()
    return end(state, RolloutReason.REGIME_CHANGED, at=event.at, rule=rule)


def switch(state: Rollout, snapshot: Snapshot, *, at: float, rule: RolloutRule, slo: Slo) -> Step:
    """Once in every stay in a regime, and with no candidate about: have its incumbent in force, or
    where there is none the last known good."""
    standing, knobs = state.regimes.standing, snapshot.knobs
    is_due = standing is not None and standing.regime_id != state.settled
    if not is_due or state.regimes.elsewhere or state.stale or not _may_switch(state.controls):
        return state, ()
    assert standing is not None
    if knobs is None:
        return state, ()
    values = wanted(state, standing, knobs=knobs, rule=rule)
    state = replace(state, settled=standing.regime_id)
    if not values or is_quarantined(values, state, at=at):
        return state, ()
    switched = state.switched | values.keys() if standing.incumbent else frozenset[str]()
    candidate = Candidate(
        phase=Phase.SWITCHED,
        config_from={name: getattr(knobs, name) for name in values},
        config_to=values,
        initiated_by=REGIME,
        since=at,
        turn_since=at,
        regime_id=standing.regime_id,
        excused=missed(snapshot, slo, recall=state.recall.mean),
    )
    record = record_of(candidate, RolloutState.SUCCESS, RolloutReason.REGIME_SWITCHED, at=at)
    state = replace(state, candidate=candidate, switched=switched)
    return state, (Apply(values=values), Note(record=record))


def wanted(
    state: Rollout, regime: Regime, *, knobs: Knobs, rule: RolloutRule
) -> dict[str, KnobValue]:
    """What ``regime`` would change of ``knobs``; pinned ones stay. Empty, too, if the rest does
    not fit them."""
    values: Values = regime.incumbent and {**ADDED, **regime.incumbent}
    if not values:
        good = {**state.base, **state.good}
        values = {name: good[name] for name in state.switched if name in good}
    return free_of(values, state.controls, knobs=knobs, rule=rule)


def watch_switch(
    state: Rollout,
    snapshot: Snapshot,
    *,
    failures: int,
    at: float,
    rule: RolloutRule,
    slo: Slo,
) -> Step:
    """The tripwires of a canary, for a while: the machine may not be what it was."""
    candidate = state.candidate
    assert candidate is not None
    if not has(snapshot, candidate.config_to):
        return not_in_force(state, at=at, rule=rule)
    candidate = count(candidate, snapshot, failures=failures, slo=slo, recall=state.recall.mean)
    candidate = replace(candidate, seen=())
    state = replace(state, candidate=candidate)
    if (reason := trip(candidate, snapshot, rule)) is not None:
        return end(state, reason, at=at, rule=rule)
    if at - candidate.since >= rule.watch_s:
        return replace(state, candidate=None), ()
    return state, ()


def abroad(state: Rollout, snapshot: Snapshot, *, at: float, rule: RolloutRule) -> Step:
    """A window of another load in a paired test: its turn begins anew; too many end the test."""
    candidate = state.candidate
    assert candidate is not None
    foreign_s = candidate.foreign_s + snapshot.window_s
    if foreign_s >= rule.window_s:
        return end(state, RolloutReason.REGIME_CHANGED, at=at, rule=rule)
    candidate = replace(
        candidate, foreign_s=foreign_s, turn_s=0.0, turn_since=at, seen=(), failures=0
    )
    return replace(state, candidate=candidate), ()


def with_proved(state: Rollout, candidate: Candidate, *, at: float) -> Rollout:
    """``candidate`` is accepted: the last known good, and the incumbent of its regime, with all
    that was in force beside it."""
    assert state.snapshot is not None and state.snapshot.knobs is not None
    beside = live_values(state.snapshot.knobs)
    stood = {name: beside[name] for name in state.switched}
    incumbent = {**beside, **candidate.config_to}
    return replace(
        state,
        good={**state.good, **stood, **candidate.config_to},
        regimes=with_incumbent(state.regimes, incumbent, at=at, versions=state.versions),
    )


def fall_back(state: Rollout, event: Drifted, *, rule: RolloutRule) -> Step:
    """Nothing that was verified here holds any more: it is forgotten. In mode ``auto`` safe values
    come into force, else the next start takes them."""
    knobs = state.snapshot.knobs if state.snapshot else None
    if state.stale or knobs is None:
        return state, ()
    state, ending = end(state, RolloutReason.PLATFORM_DRIFT, at=event.at, rule=rule)
    known = tuple(
        replace(one, incumbent={}, verified_at=None, versions={}) for one in state.regimes.known
    )
    state = replace(
        state,
        stale=event.reason,
        good={},
        switched=frozenset(),
        regimes=replace(state.regimes, known=known),
    )
    may_apply = _may_switch(state.controls)
    safe = _safe(event.values, knobs=knobs, rule=rule)
    values = free_of(safe, state.controls, knobs=knobs, rule=rule) if may_apply else {}
    record = RolloutRecord(
        state=RolloutState.EXPIRED,
        reason=RolloutReason.PLATFORM_DRIFT,
        config_from={name: getattr(knobs, name) for name in values},
        config_to=values,
        initiated_by=DRIFT,
        at=event.at,
        regime_id=state.regimes.current,
    )
    undone = [action for action in ending if not isinstance(action, Note)]
    noted = [action for action in ending if isinstance(action, Note)]
    actions: tuple[Action, ...] = (
        *undone,
        Apply(values=values),
        Settle(record=record, good={}),
        *noted,
    )
    return state, actions


def forgotten(good: LastKnownGood, *, at: float) -> RolloutRecord:
    """That a last known good of another platform holds no more."""
    return RolloutRecord(
        state=RolloutState.EXPIRED,
        reason=RolloutReason.PLATFORM_DRIFT,
        config_from=good.values,
        config_to={},
        initiated_by=DRIFT,
        at=at,
    )


def _watched(state: Rollout, snapshot: Snapshot, *, rule: RolloutRule, slo: Slo) -> Drift:
    """Windows of a test are left out, and those of a load that is on its way."""
    if state.is_testing or state.regimes.elsewhere is not None or snapshot.knobs is None:
        return state.drift
    return watch(
        state.drift,
        snapshot,
        regime_id=state.regimes.current,
        knobs=live_values(snapshot.knobs),
        window_s=rule.window_s,
        slo=slo,
    )


def _may_switch(controls: Controls) -> bool:
    return controls.mode is TunerMode.AUTO and not controls.frozen and not controls.killed


def free_of(
    values: Values, controls: Controls, *, knobs: Knobs, rule: RolloutRule
) -> dict[str, KnobValue]:
    """What differs from ``knobs`` of what is not pinned; nothing if it does not fit them, or memory
    has no room for its chunks."""
    free = {
        name: value
        for name, value in values.items()
        if name not in controls.pins and value != getattr(knobs, name)
    }
    try:
        chunk = knobs.with_values(free).prefill_chunk
    except InputError:
        return {}
    return free if chunk <= largest_chunk(knobs, rule.max_prefill_chunk) else {}


def _safe(values: Values, *, knobs: Knobs, rule: RolloutRule) -> Values:
    """Without a chunk that memory has no room for: each safe value is safe by itself."""
    chunk = values.get("prefill_chunk")
    if not isinstance(chunk, int) or chunk <= largest_chunk(knobs, rule.max_prefill_chunk):
        return values
    return {name: value for name, value in values.items() if name != "prefill_chunk"}
