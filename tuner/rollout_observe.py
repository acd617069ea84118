"""What a tick adds to what is known of the traffic and its targets, with or without a candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import exp

from sparsed.core import Guard, Slo
from sparsed.tuner.rollout_end import slot_of
from sparsed.tuner.rollout_state import Rollout, RolloutRule, Ticked
from sparsed.tuner.targets import Guards, Recall, missed, told


def observe_window(state: Rollout, event: Ticked, *, rule: RolloutRule, slo: Slo) -> Rollout:
    """``state`` with the time that has passed, and what one more window says, if there is one."""
    elapsed_s = max(0.0, event.at - state.at) if state.at is not None else 0.0
    candidate = state.candidate
    explores = state.is_testing and candidate is not None and slot_of(candidate, rule).is_candidate
    state = replace(
        state,
        at=event.at,
        num_failed=event.num_failed,
        explored_s=state.explored_s + (elapsed_s if explores else 0.0),
    )
    if (snapshot := event.snapshot) is None:
        return state
    kept, seconds = exp(-snapshot.window_s / rule.slo_horizon_s), snapshot.window_s
    busy_s = seconds if snapshot.steps else 0.0
    is_other = state.snapshot is None or state.snapshot.knobs != snapshot.knobs
    recall = (Recall() if is_other else state.recall).grown(snapshot)
    tells = told(snapshot, slo, recall=recall.mean)
    misses = missed(snapshot, slo, recall=recall.mean)
    return replace(
        state,
        snapshot=snapshot,
        recall=recall,
        fresh_at=event.at,
        busy_s=state.busy_s + busy_s,
        recent_s=kept * state.recent_s + seconds,
        recent_busy_s=kept * state.recent_busy_s + busy_s,
        recent_broken_s=kept * state.recent_broken_s + (seconds if misses else 0.0),
        recent_told_s=_grown(state.recent_told_s, tells, seconds, kept=kept),
        recent_missed_s=_grown(state.recent_missed_s, misses, seconds, kept=kept),
    )


def _grown(
    before: Mapping[Guard, float], guards: Guards, seconds: float, *, kept: float
) -> dict[Guard, float]:
    """``before`` faded, and ``seconds`` more of ``guards``."""
    return {
        guard: kept * before.get(guard, 0.0) + (seconds if guard in guards else 0.0)
        for guard in before.keys() | guards
    }
