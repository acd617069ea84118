"""The life of a candidate of the live tuner: gate, canary, commit, probation; pure.

One candidate at a time. ``advance`` takes what is known and one event, and returns what is known
then and what is to be done, in that order: what must survive a death comes before what it guards.
Time comes in with events.
"""

from __future__ import annotations

from dataclasses import replace

from sparsed.core import (
    AcceptanceWindow,
    DecisionState,
    RolloutReason,
    RolloutState,
    Slo,
    Snapshot,
    WindowStage,
)
from sparsed.tuner.acceptance import decide
from sparsed.tuner.gate import (
    barred,
    forbidden,
    goes_as_far,
    hold,
    is_budget_spent,
    limit,
    missed_for_good,
)
from sparsed.tuner.rollout_end import (
    Step,
    end,
    evidence_of,
    has,
    not_in_force,
    record_of,
    slot_of,
    slots,
    succeed,
    wanted,
    way_back,
)
from sparsed.tuner.rollout_observe import observe_window
from sparsed.tuner.rollout_regime import (
    abroad,
    fall_back,
    follow,
    free_of,
    switch,
    watch_switch,
    with_proved,
)
from sparsed.tuner.rollout_state import (
    Apply,
    Candidate,
    Drifted,
    Event,
    Mark,
    Note,
    Phase,
    Proposed,
    Rollout,
    RolloutRule,
    Settle,
    Steered,
    Ticked,
    Tripped,
    rule_of,
    slot_seconds,
)
from sparsed.tuner.schedule import Slot
from sparsed.tuner.targets import NOTHING
from sparsed.tuner.tripwire import (
    CUSUM_LIMIT,
    count,
    cusum,
    figures,
    is_over_hbm,
    middle,
    reads_less,
    status_of,
    trip,
    usual_tpot,
)


def advance(state: Rollout, event: Event, *, rule: RolloutRule, slo: Slo) -> Step:
    """What is known after ``event``, and what is to be done."""
    match event:
        case Proposed():
            return _propose(state, event, rule=rule, slo=slo)
        case Ticked():
            return _tick(state, event, rule=rule, slo=slo)
        case Tripped():
            return end(state, event.reason, at=event.at, rule=rule)
        case Steered():
            return _steer(state, event, rule=rule)
        case Drifted():
            return fall_back(state, event, rule=rule)


def _propose(state: Rollout, event: Proposed, *, rule: RolloutRule, slo: Slo) -> Step:
    knobs = state.snapshot.knobs if state.snapshot else None
    if state.candidate is not None or knobs is None:
        return state, ()
    if event.profile:
        values = free_of(event.values, state.controls, knobs=knobs, rule=rule)
    else:
        values = limit(event.values, current=knobs, pins=state.controls.pins, rule=rule, slo=slo)
    if not values or any(goes_as_far(values, item) for item in barred(state, at=event.at)):
        return state, ()
    candidate = Candidate(
        phase=Phase.WAITING,
        config_from={name: getattr(knobs, name) for name in values},
        config_to=values,
        initiated_by=event.initiated_by,
        since=event.at,
        regime_id=state.regimes.current,
        profile=event.profile,
    )
    if forbidden(candidate, state.controls):
        return state, ()
    note = Note(
        record=record_of(candidate, RolloutState.ACTIVE, RolloutReason.PROPOSED, at=event.at)
    )
    return replace(state, candidate=candidate), (note,)


def _steer(state: Rollout, event: Steered, *, rule: RolloutRule) -> Step:
    state = replace(state, controls=event.controls)
    if state.candidate is None:
        return state, ()
    reason = forbidden(state.candidate, event.controls)
    is_proved = state.candidate.phase in (Phase.PROBATION, Phase.SWITCHED)
    if reason is None or (is_proved and reason is not RolloutReason.KILLED):
        return state, ()
    return end(state, reason, at=event.at, rule=rule)


# ---- ticks -------------------------------------------------------------------------------------


def _tick(state: Rollout, event: Ticked, *, rule: RolloutRule, slo: Slo) -> Step:
    failures = max(0, event.num_failed - state.num_failed)
    state = observe_window(state, event, rule=rule, slo=slo)
    state, actions = follow(state, event, rule=rule, slo=slo)
    if actions:
        return state, actions
    match state.candidate:
        case Candidate(phase=Phase.WAITING):
            return _wait(state, at=event.at, rule=rule)
        case Candidate(phase=Phase.CANARY):
            return _canary(state, event, failures=failures, rule=rule, slo=slo)
        case Candidate(phase=Phase.PROBATION) if event.snapshot is not None:
            return _probation(state, event.snapshot, at=event.at, rule=rule)
        case Candidate(phase=Phase.SWITCHED) if event.snapshot is not None:
            return watch_switch(
                state, event.snapshot, failures=failures, at=event.at, rule=rule, slo=slo
            )
        case None if event.snapshot is not None:
            return switch(state, event.snapshot, at=event.at, rule=rule, slo=slo)
    return state, ()


def _wait(state: Rollout, *, at: float, rule: RolloutRule) -> Step:
    candidate = state.candidate
    assert candidate is not None
    if at - candidate.since > rule.expiry_s:
        return end(state, RolloutReason.WAITED_TOO_LONG, at=at, rule=rule)
    if state.snapshot is not None and not has(state.snapshot, candidate.config_from):
        return end(state, RolloutReason.OVERTAKEN, at=at, rule=rule)
    if hold(state, candidate, rule, at=at) is not None:
        return state, ()
    repairs = missed_for_good(state) if is_budget_spent(state, rule) else NOTHING
    candidate = replace(candidate, phase=Phase.CANARY, since=at, turn_since=at, repairs=repairs)
    mark = Mark(record=record_of(candidate, RolloutState.VERIFYING, RolloutReason.CANARY, at=at))
    return replace(state, candidate=candidate), (mark,)


def _canary(state: Rollout, event: Ticked, *, failures: int, rule: RolloutRule, slo: Slo) -> Step:
    candidate, at = state.candidate, event.at
    assert candidate is not None
    if state.explored_s + rule.lag_s > rule.max_explored_frac * state.busy_s:
        return end(state, RolloutReason.BUDGET_SPENT, at=at, rule=rule)
    if state.fresh_at is None or at - state.fresh_at > rule.max_gap_s:
        return end(state, RolloutReason.STALE_DATA, at=at, rule=rule)
    if (snapshot := event.snapshot) is None:
        return replace(
            state, candidate=replace(candidate, failures=candidate.failures + failures)
        ), ()
    if not has(snapshot, wanted(candidate, rule)):
        return not_in_force(state, at=at, rule=rule)
    candidate = count(candidate, snapshot, failures=failures, slo=slo, recall=state.recall.mean)
    state = replace(state, candidate=candidate)
    if (reason := trip(candidate, snapshot, rule)) is not None:
        return end(state, reason, at=at, rule=rule)
    if is_budget_spent(state, rule) and not candidate.repairs:
        return end(state, RolloutReason.BUDGET_SPENT, at=at, rule=rule)
    if state.regimes.elsewhere is not None:
        return abroad(state, snapshot, at=at, rule=rule)
    if (candidate.turn_s or 0.0) < slot_seconds(slot_of(candidate, rule), rule):
        return state, ()
    return _close_window(state, at=at, rule=rule, slo=slo)


def _close_window(state: Rollout, *, at: float, rule: RolloutRule, slo: Slo) -> Step:
    candidate = state.candidate
    assert candidate is not None
    slot = slot_of(candidate, rule)
    if sum(item.steps > 0 for item in candidate.seen) < rule.min_busy_frac * len(candidate.seen):
        return end(state, RolloutReason.NO_TRAFFIC, at=at, rule=rule)
    windows = candidate.windows
    if not slot.is_discarded:
        windows = (*windows, _window(candidate, slot, at=at, rule=rule, slo=slo))
    candidate = replace(
        candidate, windows=windows, seen=(), failures=0, foreign_s=0.0, turn_since=at
    )
    if candidate.turn + 1 == len(slots(rule_of(candidate, rule).num_pairs)):
        return _judge(replace(state, candidate=candidate), at=at, rule=rule)
    before, candidate = slot, replace(candidate, turn=candidate.turn + 1, turn_s=0.0)
    if slot_of(candidate, rule).is_candidate is before.is_candidate:
        return replace(state, candidate=candidate), ()
    candidate = replace(candidate, turn_s=None, breaches=0)
    change = Apply(
        values=wanted(candidate, rule), needs_marker=slot_of(candidate, rule).is_candidate
    )
    return replace(state, candidate=candidate), (change,)


def _window(
    candidate: Candidate, slot: Slot, *, at: float, rule: RolloutRule, slo: Slo
) -> AcceptanceWindow:
    return AcceptanceWindow(
        number=len(candidate.windows),
        stage=WindowStage.TEST,
        round=slot.pair,
        order=0,
        values=wanted(candidate, rule),
        status=status_of(candidate.seen, slo),
        metrics=figures(
            candidate.seen,
            failures=candidate.failures,
            needs_recall=slot.is_candidate
            and reads_less(candidate.config_to, before=candidate.config_from),
        ),
        started_at=candidate.turn_since,
        ended_at=at,
    )


def _judge(state: Rollout, *, at: float, rule: RolloutRule) -> Step:
    candidate = state.candidate
    assert candidate is not None
    verdict = decide(
        candidate.windows,
        rule=rule_of(candidate, rule),
        config_from=candidate.config_from,
        config_to=candidate.config_to,
    )
    if verdict.state is not DecisionState.ACCEPTED:
        is_held = verdict.state is DecisionState.HELD
        reason = RolloutReason.UNDECIDED if is_held else RolloutReason.NOT_BETTER
        return end(state, reason, at=at, rule=rule, verdict=verdict)
    good_before, regime_before = state.good, state.regimes.standing
    state = with_proved(state, candidate, at=at)
    record = record_of(candidate, RolloutState.VERIFYING, RolloutReason.COMMITTED, at=at)
    kept = tuple((item, until) for item, until in state.beaten if until > at)
    state = replace(state, beaten=(*kept, (way_back(record), at + rule.quarantine_s)))
    settle = Settle(
        record=record,
        good=state.good,
        evidence=evidence_of(candidate, verdict, rule=rule),
        regime=state.regimes.standing,
    )
    tested = [item for item in candidate.windows if item.values == candidate.config_to]
    on_probation = replace(
        candidate,
        phase=Phase.PROBATION,
        since=at,
        turn_s=None,
        turn_since=at,
        windows=(),
        usual=usual_tpot(tested),
        good_before=good_before,
        regime_before=regime_before,
    )
    change = Apply(values=candidate.config_to)
    return replace(state, candidate=on_probation), (settle, change)


def _probation(state: Rollout, snapshot: Snapshot, *, at: float, rule: RolloutRule) -> Step:
    candidate = state.candidate
    assert candidate is not None
    if not has(snapshot, candidate.config_to):
        return not_in_force(state, at=at, rule=rule)
    if is_over_hbm(snapshot, rule):
        return end(state, RolloutReason.HBM_OVER_LIMIT, at=at, rule=rule)
    if at - candidate.since >= rule.probation_s:
        return succeed(state, at=at, rule=rule)
    seen = (*candidate.seen, snapshot)
    candidate = replace(candidate, seen=seen, turn_s=sum(item.window_s for item in seen))
    if (candidate.turn_s or 0.0) >= rule.window_s:
        tpot_s = middle([item.tpot_p95_s for item in seen])
        excess = cusum(candidate.excess, tpot_s, usual=candidate.usual)
        candidate = replace(candidate, seen=(), excess=excess)
    state = replace(state, candidate=candidate)
    if candidate.excess > CUSUM_LIMIT:
        return end(state, RolloutReason.REGRESSED, at=at, rule=rule)
    return state, ()
