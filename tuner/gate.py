"""Whether a candidate may be tested now; every refusal has a word and a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

from sparsed.core import Knobs, KnobValue, RolloutReason, RolloutRecord, Slo, TunerMode
from sparsed.tuner.guard import guard
from sparsed.tuner.rollout_state import (
    Candidate,
    Controls,
    Rollout,
    RolloutRule,
    Values,
    rule_of,
    slot_seconds,
)
from sparsed.tuner.schedule import paired_slots
from sparsed.tuner.space import live_space
from sparsed.tuner.targets import Guards
from sparsed.tuner.tripwire import is_over_hbm

TUNER: Final = "auto"  # who initiated what no operator approved
OPERATOR: Final = "operator"
MISSING_FRAC: Final = 0.5  # of the windows that tell: then a target is missed for good
BREAKDOWNS: Final = (
    RolloutReason.CRASHED,
    RolloutReason.ENGINE_DIED,
    RolloutReason.OUT_OF_MEMORY,
    RolloutReason.HBM_OVER_LIMIT,
)


def forbidden(candidate: Candidate, controls: Controls) -> RolloutReason | None:
    """Why operators do not allow this candidate; None if they do."""
    if controls.killed:
        return RolloutReason.KILLED
    if controls.frozen:
        return RolloutReason.FROZEN
    if controls.pins & candidate.config_to.keys():
        return RolloutReason.PINNED
    is_own = candidate.initiated_by == TUNER
    allowed = (TunerMode.AUTO,) if is_own else (TunerMode.ADVISE, TunerMode.AUTO)
    return None if controls.mode in allowed else RolloutReason.SWITCHED_OFF


def limit(
    values: Values, *, current: Knobs, pins: frozenset[str], rule: RolloutRule, slo: Slo
) -> dict[str, KnobValue]:
    """The closest change to hot knobs that is allowed from ``current``: one rung, no pinned knob,
    no chunk that memory has no room for, the token budget under a floor of recall alone. Empty:
    nothing is left of it."""
    free = {name: value for name, value in values.items() if name not in pins}
    space = live_space(current, slo=slo, max_prefill_chunk=rule.max_prefill_chunk)
    limited = guard(free, current=current, space=space)
    return {} if pins & limited.keys() else limited


def is_quarantined(values: Values, state: Rollout, *, at: float) -> bool:
    """Whether every knob of a candidate that failed under this load, or broke down under any,
    would go as far as it did, or further."""
    return any(goes_as_far(values, record) for record in _concerning(state, state.failed, at=at))


def barred(state: Rollout, *, at: float) -> tuple[RolloutRecord, ...]:
    """Candidates not to be tested now: those in quarantine, and the ways back from what was proved
    better under this load not long ago."""
    return _concerning(state, (*state.failed, *state.beaten), at=at)


def _concerning(
    state: Rollout, records: tuple[tuple[RolloutRecord, float], ...], *, at: float
) -> tuple[RolloutRecord, ...]:
    return tuple(record for record, until in records if until > at and _concerns(record, state))


def goes_as_far(values: Values, record: RolloutRecord) -> bool:
    """Whether ``values`` change every knob of ``record`` as far as it did, or further."""
    return all(_reaches(values.get(name), name, record) for name in record.config_to)


def _concerns(record: RolloutRecord, state: Rollout) -> bool:
    is_known = record.regime_id is not None and state.regimes.current is not None
    return not is_known or record.regime_id == state.regimes.current or record.reason in BREAKDOWNS


def _reaches(value: KnobValue, name: str, record: RolloutRecord) -> bool:
    before, failed = record.config_from.get(name), record.config_to[name]
    numbers = (value, before, failed)
    if value == failed or not all(isinstance(item, int | float) for item in numbers):
        return value == failed
    now, was, bad = (float(item) for item in numbers if isinstance(item, int | float))
    return now >= bad if bad > was else now <= bad


def is_budget_spent(state: Rollout, rule: RolloutRule) -> bool:
    """Whether more windows missed a target lately than may."""
    return state.recent_broken_s > rule.slo_budget_frac * state.recent_s


def missed_for_good(state: Rollout) -> Guards:
    """The targets that what runs misses in most of the windows that tell of them: they have no
    budget to protect, and no better way out than a test."""
    return frozenset(
        guard
        for guard, missed_s in state.recent_missed_s.items()
        if missed_s > MISSING_FRAC * state.recent_told_s[guard]
    )


def exploring_s(rule: RolloutRule, *, num_pairs: int) -> float:
    """Seconds for which a whole test has its candidate in force, at the most."""
    return sum(
        slot_seconds(slot, rule) + rule.lag_s
        for slot in paired_slots(num_pairs)
        if slot.is_candidate
    )


def hold(state: Rollout, candidate: Candidate, rule: RolloutRule, *, at: float) -> str | None:
    """In words, what the candidate waits for; None: it may begin."""
    return next(islice(_holds(state, candidate, rule, at=at), 1), None)


def _holds(state: Rollout, candidate: Candidate, rule: RolloutRule, *, at: float) -> Iterator[str]:
    if (reason := forbidden(candidate, state.controls)) is not None:
        yield f"operators do not allow it: {reason.value}"
    if state.stale:
        yield f"what was measured here holds no more: {state.stale}"
    if state.regimes.elsewhere is not None:
        yield "the load is not settled in a regime"
    if at < state.cool_at:
        yield f"cooling down for {state.cool_at - at:.0f} s more"
    if state.fresh_at is None or at - state.fresh_at > rule.max_gap_s:
        yield "no fresh measurements"
    busy_s, recent_s = state.recent_busy_s, state.recent_s
    if busy_s < max(rule.min_busy_s, rule.min_busy_frac * recent_s):
        yield "too little traffic"
    if is_budget_spent(state, rule) and not missed_for_good(state):
        yield "the error budget of the targets is spent"
    needed_s = state.explored_s + exploring_s(rule, num_pairs=rule_of(candidate, rule).num_pairs)
    if needed_s > rule.max_explored_frac * state.busy_s:
        missing_s = needed_s / rule.max_explored_frac - state.busy_s
        yield f"the time to explore is not earned yet: {missing_s:.0f} s of traffic more"
    snapshot = state.snapshot
    if snapshot is not None and is_over_hbm(snapshot, rule):
        yield "the GPU's memory is over the soft limit"
    if snapshot is not None and snapshot.host.gpu_slowdown is not None:
        yield f"the GPU's clocks are cut: {snapshot.host.gpu_slowdown.value}"
