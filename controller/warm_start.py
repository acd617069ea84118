"""What ``sparsed tune`` begins from, where there is a profile that is near enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsed.controller.plan.gpus import rates_of
from sparsed.controller.seeds import load_seeds
from sparsed.controller.start_values import site_here
from sparsed.controller.startup import StartPlan
from sparsed.controller.study_resume import latest_trials
from sparsed.core import KnobValue, MatchLevel, Objective, Profile, TrialResult
from sparsed.db.store import Store
from sparsed.tuner.offline import DEFAULT
from sparsed.tuner.space import SearchSpace
from sparsed.tuner.transfer import Site, carry_over, nearest, site_of
from sparsed.tuner.warm import WarmStart


@dataclass(frozen=True, kw_only=True, slots=True)
class Beginning:
    """``first`` and ``warm`` as in ``StudyPlan``, at most one of them; ``description``: for the
    user."""

    description: str
    first: dict[str, KnobValue] | None = None
    warm: WarmStart | None = None


def find_beginning(
    plan: StartPlan,
    store: Store,
    *,
    space: SearchSpace,
    objective: Objective,
    is_wanted: bool,
) -> Beginning:
    """By the nearest profile, stored or shipped. One of this hardware, model and dtype is the
    first trial; one of elsewhere says where to look, and what to expect if it was tuned for the
    same objective. ``is_wanted`` False: a cold start. StoreError if the store fails."""
    if not is_wanted:
        return Beginning(description="cold start: --no-profile")
    here = site_here(plan.key, plan.model.shape, plan.machine)
    found = nearest((*store.list_profiles(), *load_seeds()), here, rates_of=rates_of)
    if found is None:
        return Beginning(description="cold start: no profile is near this machine and model")
    profile, match = found
    there = site_of(profile, rates_of=rates_of)
    point = space.encode(carry_over(profile.values, there=there, here=here))
    values = space.decode(point)
    words = f"profile {profile.name} ({match.level}: {match.why})"
    if not space.is_valid(point):
        return Beginning(description=f"cold start: {words} does not fit this search")
    if point == space.encode(space.default_values):
        return Beginning(description=f"cold start: {words} comes to the default")
    if match.level is not MatchLevel.TRANSFER:
        return Beginning(description=f"the first trial is {words}", first=values)
    trials = latest_trials(store, profile.key) if profile.seed is None else ()
    anchors = _anchors(profile, trials, there=there, here=here, space=space)
    known = tuple(anchors) if profile.objective is objective else ()
    return Beginning(
        description=f"the search begins around {words}, by {len(known)} scores from there",
        warm=WarmStart(values=values, anchors=known),
    )


def _anchors(
    profile: Profile,
    trials: Sequence[TrialResult],
    *,
    there: Site,
    here: Site,
    space: SearchSpace,
) -> list[tuple[dict[str, KnobValue], float]]:
    """Every trial of the study that has a score and, by its test, the profile itself."""

    def at(values: Mapping[str, KnobValue]) -> dict[str, KnobValue]:
        return space.decode(space.encode(carry_over(values, there=there, here=here)))

    found = [(space.default_values, 0.0)]
    if (gain := profile.gain_frac) is not None and gain > -1.0:
        found.append((at(profile.values), math.log1p(gain)))
    default = next((trial.score for trial in trials if trial.arm == DEFAULT), None)
    if default:
        scored = ((trial.values, trial.score) for trial in trials if trial.arm != DEFAULT)
        found += [(at(v), math.log(score / default)) for v, score in scored if score]
    return found
