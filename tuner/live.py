"""Advice while serving: one step on one or two hot knobs, or hold, always with the reason."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Final

from sparsed.core import (
    KNOBS_BY_NAME,
    RECALL_KNOBS,
    Bound,
    Decision,
    InputError,
    Knobs,
    KnobValue,
    Remedy,
    TrialResult,
    TrialStatus,
)
from sparsed.tuner.gate import goes_as_far
from sparsed.tuner.guard import guard
from sparsed.tuner.messages import LiveContext
from sparsed.tuner.policy import neighbours
from sparsed.tuner.remedies import remedies
from sparsed.tuner.space import Point, SearchSpace, build_space, largest_chunk, live_space
from sparsed.tuner.surrogate import Surrogate, penalized
from sparsed.tuner.targets import is_low
from sparsed.tuner.tripwire import reads_less

MIN_BUSY_FRAC: Final = 0.5  # of the windows
MIN_TRIALS: Final = 4
MIN_GAIN_FRAC: Final = 0.03  # below this the incumbent stays
RECALL_MARGIN: Final = 0.02  # over the floor, before fewer tokens are read
NO_FLOOR: Final = (
    "token budget and stride stay, as no floor of recall is set; start with --min-recall"
)
# Where a step on a knob gives more tokens a second. Shorter chunks, which help where products of
# matrices bind, only shift time from TPOT to TTFT.
RELIEVED: Final = frozenset({Bound.CAPACITY, Bound.LINK, Bound.HBM, Bound.HOST})
MAX_HBM_BUDGET: Final = int(KNOBS_BY_NAME["hbm_budget"].maximum or 0)

Change = tuple[Mapping[str, KnobValue], str]  # values and reason; no values: hold


def propose(context: LiveContext) -> Decision:
    """What to change now. Pure; the time is that of the last window."""
    current = context.windows[-1].knobs
    assert current is not None, "windows without knobs cannot be judged"
    busy = [window for window in context.windows if window.steps]
    live_score = fmean(window.generated_tokens_per_s for window in context.windows)
    values: Mapping[str, KnobValue] = {}
    ratio = 1.0
    if first := try_profile(context, current=current):
        values, reason = first
    elif len(busy) < MIN_BUSY_FRAC * len(context.windows):
        reason = "too little traffic to learn from"
    elif (repair := repair_targets(context, current=current)) and not _failed(repair[0], context):
        values, reason = repair
    elif sum(trial.score is not None for trial in _done(context, current)) < MIN_TRIALS:
        values, reason = relieve(context, current=current)
    else:
        values, reason, ratio = improve(context, current=current)
    return Decision(
        made_at=context.windows[-1].ended_at,
        values=values,
        reason=reason,
        predicted_score=live_score * ratio if ratio != 1.0 else None,
        current_score=live_score,
    )


def try_profile(context: LiveContext, *, current: Knobs) -> Change | None:
    """What a profile measured on other versions sets otherwise, all of it: to be shown no worse.
    None if nothing is left of it, it does not fit what is in force, or it failed a while ago."""
    if (profile := context.unproved) is None:
        return None
    values = {n: value for n, value in profile.values.items() if value != getattr(current, n)}
    try:
        chunk = current.with_values(values).prefill_chunk
    except InputError:
        return None
    has_room = chunk <= largest_chunk(current, context.max_prefill_chunk)
    if not values or not has_room or _failed(values, context):
        return None
    return values, f"{profile.name}, to be proved first: {profile.why}"


def repair_targets(context: LiveContext, *, current: Knobs) -> Change | None:
    """A step towards a target that is missed now, the first that can be taken and has not failed.
    Where none can, the first of them, with what is in its way; None if all are met or unknown."""
    steps = list(_repairs(context, current=current))
    taken = (step for step in steps if step[0] and not _failed(step[0], context))
    return next(taken, next(iter(steps), None))


def _repairs(context: LiveContext, *, current: Knobs) -> Iterator[Change]:
    """For each target that is missed: no values where its knob cannot go further."""
    slo, windows, recall = context.slo, context.windows, context.recall
    tpot_s = _median([window.tpot_p95_s for window in windows])
    ttft_s = _median([window.ttft_p95_s for window in windows])
    if is_low(recall, slo):
        reason = f"attention recall {recall:.3f} is below {slo.min_recall:.3f}"
        if current.retrieval_stride > 1:
            anew = f"{reason}: select more often"
            yield _step(context, current, "retrieval_stride", up=False, reason=anew)
        more = f"{reason}: read more tokens"
        yield _step(context, current, "token_budget", up=True, reason=more)
    if slo.tpot_s is not None and tpot_s is not None and tpot_s > slo.tpot_s:
        reason = f"time per token {tpot_s:.3f} s is above {slo.tpot_s:.3f} s: run fewer at once"
        yield _step(context, current, "max_num_active_seqs", up=False, reason=reason)
    if slo.ttft_s is not None and ttft_s is not None and ttft_s > slo.ttft_s:
        waiting = any(window.num_waiting for window in windows)
        knob = "max_num_active_seqs" if waiting else "prefill_chunk"
        why = "requests wait for a place" if waiting else "prompts take too many steps"
        reason = f"time to first token {ttft_s:.3f} s is above {slo.ttft_s:.3f} s: {why}"
        yield _step(context, current, knob, up=True, reason=reason)


def relieve(context: LiveContext, *, current: Knobs) -> Change:
    """Without trials: a step on the first hot knob that is known to help what binds, and that has
    not failed. Whether it pays is for its test to say."""
    verdict = context.verdict
    told = f"{verdict.bound}: {verdict.reason}"
    for remedy in remedies(verdict, current) if verdict.bound in RELIEVED else ():
        if not _may_try(remedy, context, current=current):
            continue
        assert remedy.knob is not None and remedy.up is not None
        values, reason = _step(
            context, current, remedy.knob, up=remedy.up, reason=f"{told}; {remedy.why}"
        )
        if values and not _failed(values, context):
            return values, reason
    no_step = f"{told}; no step is known to help, and there are no trials; run: sparsed tune"
    return {}, no_step if context.slo.min_recall is not None else f"{no_step}; {NO_FLOOR}"


def _failed(values: Mapping[str, KnobValue], context: LiveContext) -> bool:
    """Whether a change like this one, if it is one, failed a while ago."""
    return bool(values) and any(goes_as_far(values, record) for record in context.failed)


def _may_try(remedy: Remedy, context: LiveContext, *, current: Knobs) -> bool:
    """Hot knobs only; fewer tokens are read only well over a floor of recall."""
    if remedy.up is None or remedy.knob not in _space(context, current).names:
        return False
    is_more = remedy.up == (remedy.knob == "token_budget")
    return remedy.knob not in RECALL_KNOBS or is_more or _may_read_less(context)


def _may_read_less(context: LiveContext) -> bool:
    """Whether recall is measured, and well over its floor."""
    floor, recall = context.slo.min_recall, context.recall
    return floor is not None and recall is not None and recall > floor + RECALL_MARGIN


def _done(context: LiveContext, current: Knobs) -> list[TrialResult]:
    """Trials that tell of values beside those in force: loaded by as many programs, of which there
    is no ladder here."""
    programs = current.copy_programs
    return [
        trial
        for trial in context.trials
        if trial.status is not TrialStatus.INTERRUPTED
        and trial.values.get("copy_programs", programs) == programs
    ]


def improve(context: LiveContext, *, current: Knobs) -> tuple[Mapping[str, KnobValue], str, float]:
    """The neighbour that past trials promise most from, of those that have not failed: values,
    reason, predicted ratio."""
    done = _done(context, current)
    space = _space(context, current)
    here = space.encode({})

    def change(point: Point) -> Mapping[str, KnobValue]:
        return guard(space.decode(point), current=current, space=space)

    def is_open(values: Mapping[str, KnobValue]) -> bool:
        is_less = reads_less(values, before=current.as_dict())
        is_free = not context.pins & values.keys() and not _failed(values, context)
        return is_free and (not is_less or _may_read_less(context))

    near = [point for point in neighbours(space, here) if is_open(change(point))]
    if not near:
        return {}, "every step is pinned, failed a while ago, or reads less than recall allows", 1.0
    # On auto a request keeps what it can: as much as its length where there is room.
    whole = build_space(current, auto_hbm_budget=min(current.max_model_len, MAX_HBM_BUDGET))
    further = tuple(ladder for ladder in space.ladders if ladder.name not in whole.names)
    whole = replace(whole, ladders=(*whole.ladders, *further))
    untold = {ladder.name: KNOBS_BY_NAME[ladder.name].default for ladder in further}
    values = penalized([trial.score for trial in done])
    model = Surrogate.fit(
        whole,
        points=[whole.encode(untold | dict(trial.values)) for trial in done],
        values=values,
        centre=fmean(values),
        seed=0,
    )
    ours, *theirs = model.predict([_lift(point, space, whole) for point in (here, *near)])
    best = max(range(len(near)), key=lambda i: theirs[i].mean)
    gain = theirs[best].mean - ours.mean
    if gain - theirs[best].deviation < math.log(1.0 + MIN_GAIN_FRAC):
        return {}, "no step is surely better by the trials of this machine", 1.0
    ratio = math.exp(gain)
    return change(near[best]), f"trials of this machine predict {ratio - 1.0:+.0%} tokens/s", ratio


def _lift(point: Point, space: SearchSpace, whole: SearchSpace) -> Point:
    return whole.encode(space.decode(point))


def _space(context: LiveContext, current: Knobs) -> SearchSpace:
    return live_space(
        current,
        slo=context.slo,
        max_prefill_chunk=context.max_prefill_chunk,
        pins=context.pins,
    )


def _step(context: LiveContext, current: Knobs, knob: str, *, up: bool, reason: str) -> Change:
    space = _space(context, current)
    ladder = next((ladder for ladder in space.ladders if ladder.name == knob), None)
    rung = ladder.nearest(getattr(current, knob)) + (1 if up else -1) if ladder else -1
    if knob not in context.pins and (ladder is None or not 0 <= rung < len(ladder.rungs)):
        return {}, f"{reason}, but {knob} is at its bound"
    values = guard({knob: ladder.value(rung)}, current=current, space=space) if ladder else {}
    if pinned := context.pins & {knob, *values}:
        names = ", ".join(sorted(pinned))
        return {}, f"{reason}, but {names} is pinned, or was given to this start"
    return values, reason


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
