"""How a candidate of the live tuner ends, whatever ends it; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Final

from sparsed.core import (
    AcceptanceVerdict,
    Regime,
    RolloutReason,
    RolloutRecord,
    RolloutState,
    Snapshot,
)
from sparsed.tuner.regimes import Regimes, with_incumbent
from sparsed.tuner.rollout_state import (
    Action,
    Apply,
    Candidate,
    Evidence,
    Note,
    Phase,
    Rollout,
    RolloutRule,
    Settle,
    Values,
    rule_of,
)
from sparsed.tuner.schedule import Slot, paired_slots

FAULTS: Final = frozenset(
    {
        RolloutReason.CRASHED,
        RolloutReason.ENGINE_DIED,
        RolloutReason.OUT_OF_MEMORY,
        RolloutReason.SLO_BREACH,
        RolloutReason.ERRORS,
        RolloutReason.QUEUE_GROWTH,
        RolloutReason.HBM_OVER_LIMIT,
        RolloutReason.NOT_BETTER,
        RolloutReason.REGRESSED,
        RolloutReason.APPLY_FAILED,
    }
)
# On probation the candidate is the last known good, and everything else leaves it there.
ROLL_BACK: Final = FAULTS | {RolloutReason.KILLED, RolloutReason.STORE_FAILED}
# A paired test had shown it to be better, and a longer time per token alone may be the machine's:
# it is taken back at once, and may be tested again after a wait that doubles each time.
RETRIED: Final = frozenset({RolloutReason.REGRESSED})
VERDICTS: Final = frozenset({RolloutReason.NOT_BETTER, RolloutReason.APPLY_FAILED})

Step = tuple[Rollout, tuple[Action, ...]]


@lru_cache(maxsize=8)
def slots(num_pairs: int) -> tuple[Slot, ...]:
    return tuple(paired_slots(num_pairs))


def resume(good: Values, records: tuple[RolloutRecord, ...], *, rule: RolloutRule) -> Rollout:
    """The state after a start, from what was stored: ``records`` are the newest, newest first."""
    failed = [item for item in records if item.state is RolloutState.REVERTED]
    undone = [(item.config_from, item.config_to) for item in failed]
    proved = [
        item
        for item in records
        if item.reason is RolloutReason.COMMITTED
        and (item.config_from, item.config_to) not in undone
    ]
    state = Rollout(
        good=good,
        failed=tuple(
            (item, item.at + rule.quarantine_s) for item in failed if item.reason not in RETRIED
        ),
        beaten=tuple((way_back(item), item.at + rule.quarantine_s) for item in proved),
    )
    for record in reversed(records):
        if record.reason is RolloutReason.PROBATION_PASSED:
            state = replace(state, cooldown_s=0.0)
        elif record.state is RolloutState.REVERTED:
            state = cool_down(state, at=record.at, is_fault=record.reason in FAULTS, rule=rule)
    return state


def succeed(state: Rollout, *, at: float, rule: RolloutRule) -> Step:
    candidate = state.candidate
    assert candidate is not None
    reason = RolloutReason.PROBATION_PASSED
    note = Note(record=record_of(candidate, RolloutState.SUCCESS, reason, at=at))
    state = replace(state, candidate=None, cooldown_s=0.0)
    return cool_down(state, at=at, is_fault=False, rule=rule), (note,)


def end(
    state: Rollout,
    reason: RolloutReason,
    *,
    at: float,
    rule: RolloutRule,
    verdict: AcceptanceVerdict | None = None,
) -> Step:
    """Back to what ran before, first in force, then in the store."""
    candidate = state.candidate
    if candidate is None:
        return state, ()
    is_fault = reason in FAULTS and _is_to_blame(candidate, reason, rule=rule)
    rolls_back = candidate.phase is Phase.PROBATION and reason in ROLL_BACK
    is_reverted = is_fault or rolls_back
    leaves_it = candidate.phase is Phase.SWITCHED and not is_fault
    record = record_of(
        candidate,
        RolloutState.REVERTED if is_reverted else RolloutState.EXPIRED,
        reason,
        at=at,
    )
    good = candidate.good_before if rolls_back else None
    regime = candidate.regime_before if rolls_back else None
    state = replace(state, candidate=None, good=state.good if good is None else good)
    if rolls_back:
        state = replace(state, beaten=state.beaten[:-1])  # it was no better after all
    if regime is not None:
        state = replace(state, regimes=_with_former(state.regimes, regime))
    state = cool_down(state, at=at, is_fault=is_fault, rule=rule)
    if is_fault and reason not in RETRIED:
        kept = tuple((item, until) for item, until in state.failed if until > at)
        state = replace(state, failed=(*kept, (record, at + rule.quarantine_s)))
    is_in_force = candidate.phase in (Phase.CANARY, Phase.SWITCHED) or rolls_back
    if leaves_it or not is_in_force:
        return state, (Note(record=record),)
    evidence = None if verdict is None else evidence_of(candidate, verdict, rule=rule)
    changed = state.regimes.standing if regime is not None else None
    settle = Settle(record=record, good=good, evidence=evidence, regime=changed)
    return state, (Apply(values=candidate.config_from), settle)


def not_in_force(state: Rollout, *, at: float, rule: RolloutRule) -> Step:
    """A window with other knobs than were asked for: not yet, or not any more."""
    candidate = state.candidate
    assert candidate is not None
    if candidate.turn_s is not None:
        return end(state, RolloutReason.OVERTAKEN, at=at, rule=rule)
    if at - candidate.turn_since > rule.apply_s:
        return end(state, RolloutReason.APPLY_FAILED, at=at, rule=rule)
    return state, ()


def _with_former(regimes: Regimes, before: Regime) -> Regimes:
    return with_incumbent(
        regimes, before.incumbent, at=before.verified_at, versions=before.versions
    )


def _is_to_blame(candidate: Candidate, reason: RolloutReason, *, rule: RolloutRule) -> bool:
    """What trips while the former values run, their wash-out past, is not the candidate's."""
    if candidate.phase is not Phase.CANARY or reason in VERDICTS:
        return candidate.phase is not Phase.WAITING
    slot = slot_of(candidate, rule)
    return slot.is_candidate or (slot.is_discarded and candidate.turn > 0)


def cool_down(state: Rollout, *, at: float, is_fault: bool, rule: RolloutRule) -> Rollout:
    if is_fault:
        longer = max(rule.cooldown_s, 2 * state.cooldown_s)
        state = replace(state, cooldown_s=min(longer, rule.max_cooldown_s))
    return replace(state, cool_at=at + max(state.cooldown_s, rule.cooldown_s))


def evidence_of(candidate: Candidate, verdict: AcceptanceVerdict, *, rule: RolloutRule) -> Evidence:
    return Evidence(rule=rule_of(candidate, rule), verdict=verdict, windows=candidate.windows)


def record_of(
    candidate: Candidate, state: RolloutState, reason: RolloutReason, *, at: float
) -> RolloutRecord:
    return RolloutRecord(
        state=state,
        reason=reason,
        config_from=candidate.config_from,
        config_to=candidate.config_to,
        initiated_by=candidate.initiated_by,
        at=at,
        regime_id=candidate.regime_id,
        profile=candidate.profile,
    )


def way_back(record: RolloutRecord) -> RolloutRecord:
    """The change that would undo ``record``."""
    return replace(record, config_from=record.config_to, config_to=record.config_from)


def slot_of(candidate: Candidate, rule: RolloutRule) -> Slot:
    return slots(rule_of(candidate, rule).num_pairs)[candidate.turn]


def wanted(candidate: Candidate, rule: RolloutRule) -> Values:
    return candidate.config_to if slot_of(candidate, rule).is_candidate else candidate.config_from


def has(snapshot: Snapshot, values: Mapping[str, object]) -> bool:
    knobs = snapshot.knobs
    return knobs is not None and all(getattr(knobs, name) == item for name, item in values.items())
