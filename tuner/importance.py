"""How much each knob matters, by what a model learned from the trials."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from statistics import fmean, pvariance
from typing import Final

from sparsed.core import TrialResult, TrialStatus
from sparsed.tuner.policy import draw
from sparsed.tuner.space import Point, SearchSpace
from sparsed.tuner.surrogate import Surrogate, penalized

MIN_POINTS: Final = 4  # different configurations; of fewer a model says nothing
NUM_SAMPLES: Final = 256
FLAT: Final = 1e-12  # variance of predicted log scores that is none


def knob_importance(
    space: SearchSpace, trials: Sequence[TrialResult], *, seed: int
) -> Mapping[str, float]:
    """Total effect of each knob, the greatest first: the share of the variance of the log score
    over ``space`` that is due to the knob, alone or together with others. Shares may sum to more
    than 1. Empty where the trials are too few or all alike.

    The score is what a Gaussian process predicts that learned from ``trials``, infeasible ones as
    worse than the worst. Source: Jansen's estimator (Computer Physics Communications 117, 1999).
    """
    known = [item for item in trials if item.status is not TrialStatus.INTERRUPTED]
    points = [space.encode(item.values) for item in known]
    scores = [item.score for item in known]
    if len(set(points)) < MIN_POINTS or not any(scores):
        return {}
    values = penalized(scores)
    centre = fmean(values)
    model = Surrogate.fit(space, points=points, values=values, centre=centre, seed=seed)
    generator = random.Random(f"{seed} importance")
    samples = draw(space, generator=generator, num_points=NUM_SAMPLES, seen=set())
    base = _log_scores(model, samples)
    variance = pvariance(base)
    if variance < FLAT:
        return {}
    effects = {}
    for axis, ladder in enumerate(space.ladders):
        moved = [_with_rung(p, axis, generator.randrange(len(ladder.rungs))) for p in samples]
        pairs = zip(base, _log_scores(model, moved), strict=True)
        effects[ladder.name] = fmean((a - b) ** 2 for a, b in pairs) / (2.0 * variance)
    return dict(sorted(effects.items(), key=lambda item: item[1], reverse=True))


def pareto_front(trials: Sequence[TrialResult], *, cost: str) -> tuple[TrialResult, ...]:
    """Feasible trials that no other one beats in both output tokens/s and the metric ``cost``, of
    which less is better; the fastest last."""
    name = "output_tokens_per_s"
    known = [t for t in trials if t.score is not None and {name, cost} <= t.metrics.keys()]
    front: list[TrialResult] = []
    for trial in sorted(known, key=lambda t: (-t.metrics[name], t.metrics[cost])):
        if not front or trial.metrics[cost] < front[-1].metrics[cost]:
            front.append(trial)
    return tuple(reversed(front))


def _log_scores(model: Surrogate, points: Sequence[Point]) -> list[float]:
    return [item.mean for item in model.predict(points)]


def _with_rung(point: Point, axis: int, rung: int) -> Point:
    return (*point[:axis], rung, *point[axis + 1 :])
