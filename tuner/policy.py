"""Which configuration to try next.

A backend keeps no state: it is asked with everything observed so far. The same seed and the same
observations give the same suggestion, so that a resumed study goes on as if never stopped.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import product
from typing import Final, NamedTuple, Protocol

from sparsed.core import KnobValue
from sparsed.tuner.space import Ladder, Point, SearchSpace
from sparsed.tuner.surrogate import Surrogate

NUM_CANDIDATES: Final = 400  # points the acquisition function is looked up at
TRUST_RADIUS_FRAC: Final = 0.15  # of the rungs of a ladder


class Observation(NamedTuple):
    values: Mapping[str, KnobValue]
    score: float | None  # None: infeasible


class Suggestion(NamedTuple):
    values: dict[str, KnobValue]
    reason: str


class SearchBackend(Protocol):
    """Proposes valid configurations that were not observed yet; None when there are none left."""

    def suggest(self, observations: Sequence[Observation]) -> Suggestion | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomSearch:
    """Uniform over the rungs: the baseline every other backend is shown beside."""

    space: SearchSpace
    seed: int

    def suggest(self, observations: Sequence[Observation]) -> Suggestion | None:
        seen = {self.space.encode(item.values) for item in observations}
        generator = random.Random(f"{self.seed}:{len(observations)}")
        points = draw(self.space, generator=generator, num_points=1, seen=seen)
        return Suggestion(self.space.decode(points[0]), "random") if points else None


@dataclass(frozen=True, kw_only=True, slots=True)
class BayesSearch:
    """Gaussian process with expected improvement on the log score (scikit-optimize).

    The acquisition function is looked up in a trust region round the best point, among points
    not seen yet: a few trials in five dimensions say little about the far corners, and the
    library's own ``ask`` may repeat a point. Random until one point is feasible.
    """

    space: SearchSpace
    seed: int

    def suggest(self, observations: Sequence[Observation]) -> Suggestion | None:
        best = max(observations, key=lambda item: item.score or 0.0, default=None)
        if best is None or best.score is None:
            return RandomSearch(space=self.space, seed=~self.seed).suggest(observations)
        points = [self.space.encode(item.values) for item in observations]
        generator = random.Random(f"{self.seed}:{len(observations)}")
        candidates = draw(
            self.space,
            generator=generator,
            num_points=NUM_CANDIDATES,
            seen=set(points),
            centre=self.space.encode(best.values),
        )
        if not candidates:
            return None
        scores = [item.score for item in observations]
        seed = generator.randrange(1 << 31)
        model = Surrogate.fit(self.space, points=points, scores=scores, seed=seed)
        gains = model.expected_improvement(candidates)
        chosen = max(range(len(candidates)), key=gains.__getitem__)
        reason = f"expected improvement, learned from {len(points)} trials"
        return Suggestion(self.space.decode(candidates[chosen]), reason)


def draw(
    space: SearchSpace,
    *,
    generator: random.Random,
    num_points: int,
    seen: AbstractSet[Point],
    centre: Point | None = None,
) -> list[Point]:
    """Up to ``num_points`` distinct valid points outside ``seen``, within the trust region of
    ``centre`` if one is given; from everywhere if none is left there; none if none is left."""
    ranges = [_rungs_around(ladder, rung) for ladder, rung in _with_rung(space, centre)]
    found: dict[Point, None] = {}
    for _ in range(4 * num_points + 100):
        point = tuple(generator.choice(rungs) for rungs in ranges)
        if point not in seen and space.is_valid(point):
            found[point] = None
        if len(found) == num_points:
            break
    if not found:
        rest = [point for point in space.points() if point not in seen]
        generator.shuffle(rest)
        return rest[:num_points]
    return list(found)


def neighbours(space: SearchSpace, point: Point) -> list[Point]:
    """Valid points one rung away in one knob or in two."""
    moves = [(axis, step) for axis in range(len(point)) for step in (-1, 1)]
    reached = {_moved(point, dict(pair)) for pair in product(moves, repeat=2)}
    return sorted(item for item in reached if space.contains(item) and item != point)


def _with_rung(space: SearchSpace, centre: Point | None) -> Iterator[tuple[Ladder, int | None]]:
    return zip(space.ladders, centre or (None,) * len(space.ladders), strict=True)


def _rungs_around(ladder: Ladder, rung: int | None) -> range:
    size = len(ladder.rungs)
    if rung is None:
        return range(size)
    radius = max(1, round(TRUST_RADIUS_FRAC * size))
    return range(max(0, rung - radius), min(size, rung + radius + 1))


def _moved(point: Point, steps: Mapping[int, int]) -> Point:
    return tuple(rung + steps.get(axis, 0) for axis, rung in enumerate(point))
