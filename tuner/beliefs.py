"""What is believed of points never tried: the objective, every constraint, and crashes.

Constraints are modelled as log(figure / limit), since knobs act on times and bytes by factors;
zero is the limit. Crashes are modelled as +1 and -1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from sparsed.core import KnobValue
from sparsed.tuner.policy import TEACHING_CRASHES, Constraint, Observation
from sparsed.tuner.space import Point, SearchSpace
from sparsed.tuner.surrogate import Prediction, Surrogate

SPAN_LOG: Final = 1.5  # an objective that much below the best one is as bad as any
LEAST_LOG: Final = -2.0  # of a figure over its limit; lower is as good as any
MOST_LOG: Final = 1.0  # higher is as bad as any
# Promised to clients, so tried only where a window will surely show them kept. Memory has a known
# model for that, and a busy link breaks no promise.
GUARDED: Final = (Constraint.TTFT, Constraint.TPOT, Constraint.QUALITY)


@dataclass(frozen=True, kw_only=True, slots=True)
class Expectation:
    """What an analytic model says of a configuration that nobody tried, in the units of an
    ``Observation``. The search learns how far it is off; what it leaves out is expected to be as
    in the trials."""

    objective: float = 0.0
    slacks: Mapping[Constraint, float] = field(default_factory=dict)

    def of(self, name: Constraint) -> float:
        """Log(figure / limit)."""
        return log_ratio(self.slacks[name]) if name in self.slacks else 0.0


Prior = Callable[[Mapping[str, KnobValue]], Expectation]


def expect_nothing(values: Mapping[str, KnobValue]) -> Expectation:
    """Where there is no analytic model."""
    return Expectation()


@dataclass(frozen=True, kw_only=True, slots=True)
class Belief:
    """Of one point. ``slacks``: log(figure / limit)."""

    objective: Prediction
    slacks: Mapping[Constraint, Prediction]
    log_feasible: float  # log of the probability that every limit holds and nothing crashes

    def is_safe(self, kappa: float) -> bool:
        """Whether guarded limits hold with ``kappa`` standard deviations to spare."""
        return self.worst_excess(kappa) <= 0

    def worst_excess(self, kappa: float) -> float:
        """The guarded limit nearest to being broken: how far, in the logarithm."""
        guarded = (self.slacks[name] for name in GUARDED if name in self.slacks)
        return max((s.mean + kappa * s.spread for s in guarded), default=-math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class Beliefs:
    """Models of everything observed, over what was expected beforehand."""

    space: SearchSpace
    prior: Prior
    objective: Surrogate
    constraints: Mapping[Constraint, Surrogate]
    crashes: Surrogate | None

    @classmethod
    def fit(
        cls,
        space: SearchSpace,
        *,
        observations: Sequence[Observation],
        prior: Prior = expect_nothing,
        seed: int,
    ) -> Beliefs:
        """At least one observation has an objective."""
        trials = [(space.encode(item.values), item, prior(item.values)) for item in observations]
        best = max(item.objective for item in observations if item.objective is not None)
        objectives = [
            (point, max(item.objective, best - SPAN_LOG) - expected.objective)
            for point, item, expected in trials
            if item.objective is not None
        ]
        constraints = {
            name: [
                (point, log_ratio(item.slacks[name]) - expected.of(name))
                for point, item, expected in trials
                if name in item.slacks
            ]
            for name in Constraint
        }
        return cls(
            space=space,
            prior=prior,
            objective=_fit(space, objectives, seed=seed),
            constraints={
                name: _fit(space, pairs, seed=seed) for name, pairs in constraints.items() if pairs
            },
            crashes=_fit_crashes(space, observations, seed=seed),
        )

    def of(self, points: Sequence[Point]) -> list[Belief]:
        """One belief a point."""
        if not points:
            return []
        objectives = self.objective.predict(points)
        slacks = {name: model.predict(points) for name, model in self.constraints.items()}
        crashes = self.crashes.predict(points) if self.crashes else None
        beliefs = []
        for i, point in enumerate(points):
            expected = self.prior(self.space.decode(point))
            beliefs.append(
                _belief(
                    _raised(objectives[i], expected.objective),
                    {name: _raised(all_[i], expected.of(name)) for name, all_ in slacks.items()},
                    crashes[i] if crashes else None,
                )
            )
        return beliefs


def log_expected_improvement(prediction: Prediction, *, best: float) -> float:
    """Log of the expected improvement over ``best``, finite however far below it lies.

    Source: Jones, Schonlau and Welch 1998, eq. 15; the tail by the first term of Mills' ratio.
    """
    deviation = max(prediction.deviation, 1e-6)
    z = (prediction.mean - best) / deviation
    log_density = -0.5 * z * z - 0.5 * math.log(2 * math.pi)
    if z < -6.0:
        return math.log(deviation) + log_density - 2.0 * math.log(-z)
    return math.log(deviation) + math.log(math.exp(log_density) + z * _normal(z))


def log_normal(z: float) -> float:
    """Log of the standard normal distribution function, finite for every finite ``z``."""
    if z < -6.0:
        return -0.5 * z * z - 0.5 * math.log(2 * math.pi) - math.log(-z)
    return math.log(_normal(z))


def _normal(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2.0))


def _belief(
    objective: Prediction, slacks: Mapping[Constraint, Prediction], crash: Prediction | None
) -> Belief:
    limits = [*slacks.values()] + ([crash] if crash else [])
    log_feasible = sum(log_normal(-p.mean / max(p.deviation, 1e-6)) for p in limits)
    return Belief(objective=objective, slacks=slacks, log_feasible=log_feasible)


def _raised(prediction: Prediction, by: float) -> Prediction:
    return prediction._replace(mean=prediction.mean + by)


def _fit(
    space: SearchSpace,
    pairs: Sequence[tuple[Point, float]],
    *,
    seed: int,
    centre: float | None = None,
) -> Surrogate:
    """``centre`` None: the mean of the values."""
    values = [value for _, value in pairs]
    return Surrogate.fit(
        space,
        points=[point for point, _ in pairs],
        values=values,
        centre=sum(values) / len(values) if centre is None else centre,
        seed=seed,
    )


def _fit_crashes(
    space: SearchSpace, observations: Sequence[Observation], *, seed: int
) -> Surrogate | None:
    """None while nothing that teaches has crashed. Expects success far from every crash."""
    taught = [
        (space.encode(item.values), 1.0 if item.crash else -1.0)
        for item in observations
        if item.crash is None or item.crash in TEACHING_CRASHES
    ]
    if all(value < 0 for _, value in taught):
        return None
    return _fit(space, taught, seed=seed, centre=-1.0)


def log_ratio(slack: float) -> float:
    """Log of figure over limit, clipped: what is far from its limit says nothing near it."""
    return min(max(math.log(max(1.0 + slack, 1e-9)), LEAST_LOG), MOST_LOG)
