"""How a candidate of the live tuner ends, whatever ends it; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Final

from sparsed.core import (
    AcceptanceVerdict,
    RolloutReason,
    RolloutRecord,
    RolloutState,
    Snapshot,
)
from sparsed.tuner.rollout_state import (
    Action,
    Apply,
    Candidate,
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

Step = tuple[Rollout, tuple[Action, ...]]


@lru_cache(maxsize=8)
def slots(num_pairs: int) -> tuple[Slot, ...]:
    return tuple(paired_slots(num_pairs))


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
    record = record_of(
        candidate,
        RolloutState.REVERTED if is_reverted else RolloutState.EXPIRED,
        reason,
        at=at,
    )
    good = candidate.good_before if rolls_back else None
    state = replace(state, candidate=None, good=state.good if good is None else good)
    state = cool_down(state, at=at, is_fault=is_fault, rule=rule)
    if is_fault:
        kept = tuple((item, until) for item, until in state.failed if until > at)
        state = replace(state, failed=(*kept, (record, at + rule.quarantine_s)))
    if candidate.phase is not Phase.CANARY and not rolls_back:
        return state, (Note(record=record),)
    windows = candidate.windows if verdict else ()
    settle = Settle(
        record=record,
        rule=rule_of(candidate, rule),
        good=good,
        verdict=verdict,
        windows=windows,
    )
    stays = candidate.stands and not is_reverted
    before = candidate.config_to if stays else candidate.config_from
    return state, (Apply(values=before), settle)


def _is_to_blame(candidate: Candidate, reason: RolloutReason, *, rule: RolloutRule) -> bool:
    """What trips while the former values run, their wash-out past, is not the candidate's. Where
    it stands, those are not proved either, and it has to answer for its own windows alone."""
    if candidate.phase is not Phase.CANARY or reason is RolloutReason.NOT_BETTER:
        return candidate.phase is not Phase.WAITING
    slot = slot_of(candidate, rule)
    if candidate.stands:
        return slot.is_candidate
    if reason is RolloutReason.APPLY_FAILED:
        return True
    return slot.is_candidate or (slot.is_discarded and candidate.turn > 0)


def cool_down(state: Rollout, *, at: float, is_fault: bool, rule: RolloutRule) -> Rollout:
    if is_fault:
        longer = max(rule.cooldown_s, 2 * state.cooldown_s)
        state = replace(state, cooldown_s=min(longer, rule.max_cooldown_s))
    return replace(state, cool_at=at + max(state.cooldown_s, rule.cooldown_s))


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
    )


def slot_of(candidate: Candidate, rule: RolloutRule) -> Slot:
    return slots(rule_of(candidate, rule).num_pairs)[candidate.turn]


def wanted(candidate: Candidate, rule: RolloutRule) -> Values:
    return candidate.config_to if slot_of(candidate, rule).is_candidate else candidate.config_from


def has(snapshot: Snapshot, values: Mapping[str, object]) -> bool:
    knobs = snapshot.knobs
    return knobs is not None and all(getattr(knobs, name) == item for name, item in values.items())
