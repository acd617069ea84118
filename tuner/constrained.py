"""Constrained Bayesian search: expected improvement where every limit probably holds.

Built on scikit-optimize's space and Gaussian processes. It starts at the incumbent and moves its
trust region with what was found. A point is tried only if it fits memory by a known model, and if
its targets have some standard deviations of slack.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from skopt.sampler import Lhs
from skopt.space import Space

from sparsed.core import KnobValue
from sparsed.tuner.beliefs import (
    Belief,
    Beliefs,
    Prior,
    expect_nothing,
    log_expected_improvement,
)
from sparsed.tuner.policy import (
    Observation,
    RandomSearch,
    Suggestion,
    draw,
    neighbours,
    points_seen,
)
from sparsed.tuner.space import Point, SearchSpace
from sparsed.tuner.warm import WarmStart, misleads, warm_prior

NUM_CANDIDATES: Final = 400  # points the acquisition function is looked up at
START_RADIUS: Final = 0.12  # of every ladder
MIN_RADIUS: Final = 0.05
MAX_RADIUS: Final = 0.35
GROWTH: Final = 1.3  # of the radius after a success
DECAY: Final = 0.93
MIN_GAIN_LOG: Final = math.log(1.01)  # a smaller one is a tie, which the incumbent wins
MIN_REPEATS: Final = 2  # observations of what is recommended
NUM_CONFIRMING: Final = 4  # last trials, kept for repeats


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryLimit:
    """``predict``: bytes of HBM that values take at peak load, known to within ``margin_bytes``."""

    predict: Callable[[Mapping[str, KnobValue]], float]
    limit_bytes: float
    margin_bytes: float

    def allows(self, values: Mapping[str, KnobValue]) -> bool:
        return self.predict(values) + self.margin_bytes <= self.limit_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ConstrainedSearch:
    """``kappa``: standard deviations of slack that a target needs before a point is tried.
    ``num_initial``: trials that fill the space first, for a machine that serves nobody; 0 goes
    from the incumbent in steps. ``memory`` None: how much a point takes is not known beforehand.
    ``warm``: what a profile of elsewhere suggests, until the trials speak against it.

    What is pending is left out of the candidates and counts as one of the repeats of its point;
    no result is made up for it, so the next best point of the same models is suggested.
    """

    space: SearchSpace
    seed: int
    memory: MemoryLimit | None = None
    prior: Prior = expect_nothing
    kappa: float = 2.0
    num_initial: int = 0
    warm: WarmStart | None = None

    def suggest(
        self,
        observations: Sequence[Observation],
        *,
        incumbent: Mapping[str, KnobValue],
        num_left: int,
        pending: Sequence[Mapping[str, KnobValue]] = (),
    ) -> Suggestion | None:
        home = self.space.encode(incumbent)
        values = (*(item.values for item in observations), *pending)
        tried = Counter(map(self.space.encode, values))
        if home not in tried:
            return self._suggestion(home, "the incumbent first")
        if not self.space.is_open:
            return None
        if tried.total() <= self.num_initial:
            return self._fill(observations, incumbent=incumbent, num_left=num_left, pending=pending)
        if all(item.objective is None for item in observations):
            return self._blind(
                observations, incumbent=incumbent, num_left=num_left, pending=pending
            )
        beliefs = self._learn(observations)
        sound = self._sound(observations)
        centre = self._best(beliefs, sound + self._warm_point(observations, tried=tried), home=home)
        if centre not in tried:
            return self._suggestion(centre, "the best of a profile of elsewhere, carried over")
        if num_left <= NUM_CONFIRMING and centre != home and tried[centre] < MIN_REPEATS:
            return self._suggestion(centre, "once more, before it is recommended")
        generator = random.Random(f"{self.seed}:{tried.total()}")
        return self._improve(
            beliefs,
            centre=centre,
            radius=radius_after(observations),
            seen=set(tried),
            generator=generator,
        )

    def recommend(
        self, observations: Sequence[Observation], *, incumbent: Mapping[str, KnobValue]
    ) -> Suggestion:
        """By posterior, among what was observed often enough; a tie keeps the incumbent."""
        home = self.space.encode(incumbent)
        tried = Counter(self.space.encode(item.values) for item in observations)
        often = [p for p in self._sound(observations) if tried[p] >= MIN_REPEATS or p == home]
        if not often or not self.space.is_open:
            return self._suggestion(home, "nothing met its targets twice")
        beliefs = self._learn(observations)
        best = self._best(beliefs, often, home=home)
        if best == home:
            return self._suggestion(home, "nothing is surely better than the incumbent")
        here, there = beliefs.of([home, best])
        gain = there.objective.mean - here.objective.mean
        reason = f"expected to be {math.expm1(gain):+.0%}, over {tried[best]} observations"
        return self._suggestion(best, reason)

    def has_dropped_warm(self, observations: Sequence[Observation]) -> bool:
        """Whether the trials speak against what the profile of elsewhere suggests."""
        return self.warm is not None and misleads(self._warm_prior(self.warm), observations)

    def _warm_prior(self, warm: WarmStart) -> Prior:
        return warm_prior(self.space, warm, base=self.prior, seed=self.seed)

    def _warm_point(
        self, observations: Sequence[Observation], *, tried: Counter[Point]
    ) -> list[Point]:
        """Where the trust region may be centred though nobody has tried it: not once it is known."""
        if self.warm is None or self.has_dropped_warm(observations):
            return []
        point = self.space.encode(self.warm.values)
        is_open = point not in tried and self.space.is_valid(point) and self._fits(point)
        return [point] if is_open else []

    def _learn(self, observations: Sequence[Observation]) -> Beliefs:
        prior = self.prior
        if self.warm is not None and not self.has_dropped_warm(observations):
            prior = self._warm_prior(self.warm)
        return Beliefs.fit(self.space, observations=observations, prior=prior, seed=self.seed)

    def _sound(self, observations: Sequence[Observation]) -> list[Point]:
        """Points that were within every limit each time."""
        points = [self.space.encode(item.values) for item in observations]
        broken = {p for p, item in zip(points, observations, strict=True) if not item.is_feasible}
        return sorted(set(points) - broken)

    def _best(self, beliefs: Beliefs, points: Sequence[Point], *, home: Point) -> Point:
        """The most promising of ``points`` that are safe; the incumbent if it is as good."""
        believed = dict(zip(points, beliefs.of(points), strict=True))
        safe = {point: belief for point, belief in believed.items() if belief.is_safe(1.0)}
        if not safe:
            return home
        best = max(safe, key=lambda point: safe[point].objective.mean)
        if home in safe:
            gain = safe[best].objective.mean - safe[home].objective.mean
            return best if gain > MIN_GAIN_LOG else home
        return best

    def _improve(
        self,
        beliefs: Beliefs,
        *,
        centre: Point,
        radius: float,
        seen: set[Point],
        generator: random.Random,
    ) -> Suggestion | None:
        candidates = self._candidates(centre, radius=radius, seen=seen, generator=generator)
        if not candidates:
            return None
        (here,) = beliefs.of([centre])
        believed = list(zip(candidates, beliefs.of(candidates), strict=True))
        safe = [(point, belief) for point, belief in believed if belief.is_safe(self.kappa)]
        if not safe:
            point, _ = min(believed, key=lambda pair: pair[1].worst_excess(self.kappa))
            return self._suggestion(point, "the step that is most surely within its targets")

        def worth(pair: tuple[Point, Belief]) -> float:
            _, belief = pair
            gain = log_expected_improvement(belief.objective, best=here.objective.mean)
            return gain + belief.log_feasible

        point, _ = max(safe, key=worth)
        reason = f"expected improvement within its limits, {len(safe)} of {len(believed)} points"
        return self._suggestion(point, f"{reason} safe, radius {radius:.2f}")

    def _candidates(
        self, centre: Point, *, radius: float, seen: set[Point], generator: random.Random
    ) -> list[Point]:
        """Points of the trust region that fit memory, steps of one or two knobs among them."""
        near = [point for point in neighbours(self.space, centre) if point not in seen]
        drawn = draw(
            self.space,
            generator=generator,
            num_points=NUM_CANDIDATES,
            seen=seen,
            centre=centre,
            radius=radius,
        )
        return [point for point in dict.fromkeys([*near, *drawn]) if self._fits(point)]

    def _fill(
        self,
        observations: Sequence[Observation],
        *,
        incumbent: Mapping[str, KnobValue],
        num_left: int,
        pending: Sequence[Mapping[str, KnobValue]],
    ) -> Suggestion | None:
        """The next point of a Latin hypercube, the nearest to it that fits."""
        sizes = [len(ladder.rungs) for ladder in self.space.ladders]
        unit = Space([(0.0, 1.0)] * len(sizes))
        rows = Lhs(criterion=None).generate(
            unit.dimensions, self.num_initial, random_state=self.seed
        )
        num_begun = len(observations) + len(pending)
        row = rows[num_begun - 1]
        wanted = [float(value) * (size - 1) for value, size in zip(row, sizes, strict=True)]
        seen = points_seen(self.space, observations, pending)
        fitting = [
            point
            for point in draw(
                self.space,
                generator=random.Random(f"{self.seed}:{num_begun}"),
                num_points=NUM_CANDIDATES,
                seen=seen,
            )
            if self._fits(point)
        ]
        if not fitting:
            return self._blind(
                observations, incumbent=incumbent, num_left=num_left, pending=pending
            )

        def distance(point: Point) -> float:
            triples = zip(point, wanted, sizes, strict=True)
            return sum(((rung - x) / max(1, size - 1)) ** 2 for rung, x, size in triples)

        return self._suggestion(min(fitting, key=distance), "fills the space")

    def _blind(
        self,
        observations: Sequence[Observation],
        *,
        incumbent: Mapping[str, KnobValue],
        num_left: int,
        pending: Sequence[Mapping[str, KnobValue]],
    ) -> Suggestion | None:
        """At random, as long as nothing ran."""
        backend = RandomSearch(space=self.space, seed=~self.seed)
        return backend.suggest(
            observations, incumbent=incumbent, num_left=num_left, pending=pending
        )

    def _fits(self, point: Point) -> bool:
        return self.memory is None or self.memory.allows(self.space.decode(point))

    def _suggestion(self, point: Point, reason: str) -> Suggestion:
        return Suggestion(self.space.decode(point), reason)


def radius_after(observations: Sequence[Observation]) -> float:
    """Of the trust region: grown by every trial that beat all before it, shrunk by others, and
    wide open again once there is nothing left to shrink."""
    radius, best = START_RADIUS, -math.inf
    for number, item in enumerate(observations):
        is_success = item.is_feasible and (item.objective or -math.inf) > best + MIN_GAIN_LOG
        if number and is_success:
            radius = min(radius * GROWTH, MAX_RADIUS)
        elif number:
            radius = radius * DECAY if radius * DECAY >= MIN_RADIUS else MAX_RADIUS
        if item.is_feasible and item.objective is not None:
            best = max(best, item.objective)
    return radius
