"""Which configuration to try next.

A backend keeps no state: it is asked with everything observed so far. The same seed and the same
observations give the same suggestion, so that a resumed study goes on as if never stopped.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from sparsed.core import KnobValue
from sparsed.tuner.space import Point, SearchSpace
from sparsed.tuner.surrogate import Surrogate

NUM_CANDIDATES: Final = 400  # random points the acquisition function is looked up at


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

    The first ``num_initial`` suggestions are random. The acquisition function is looked up at
    random points and round the best one, among points not seen yet: the library's own ``ask``
    may repeat a point and does not know the constraints between knobs.
    """

    space: SearchSpace
    seed: int
    num_initial: int = 3

    def suggest(self, observations: Sequence[Observation]) -> Suggestion | None:
        best = max(observations, key=lambda item: item.score or 0.0, default=None)
        if len(observations) <= self.num_initial or best is None or best.score is None:
            return RandomSearch(space=self.space, seed=~self.seed).suggest(observations)
        points = [self.space.encode(item.values) for item in observations]
        generator = random.Random(f"{self.seed}:{len(observations)}")
        candidates = [
            *draw(self.space, generator=generator, num_points=NUM_CANDIDATES, seen=set(points)),
            *(
                point
                for point in neighbours(self.space, self.space.encode(best.values))
                if point not in points
            ),
        ]
        if not candidates:
            return None
        model = Surrogate.fit(
            self.space,
            points=points,
            scores=[x.score for x in observations],
            seed=generator.randrange(1 << 31),
        )
        gains = model.expected_improvement(candidates)
        chosen = max(range(len(candidates)), key=gains.__getitem__)
        reason = f"expected improvement, learned from {len(points)} trials"
        return Suggestion(self.space.decode(candidates[chosen]), reason)


def draw(
    space: SearchSpace, *, generator: random.Random, num_points: int, seen: AbstractSet[Point]
) -> list[Point]:
    """Up to ``num_points`` distinct valid points outside ``seen``, at least one if any is left."""
    found: dict[Point, None] = {}
    for _ in range(4 * num_points + 100):
        point = tuple(generator.randrange(len(ladder.rungs)) for ladder in space.ladders)
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
    moves = [(i, step) for i in range(len(point)) for step in (-1, 1)]
    pairs = [((i, a), (j, b)) for i, a in moves for j, b in moves if i <= j]
    reached = {_moved(point, dict(pair)) for pair in pairs}
    return sorted(item for item in reached if space.contains(item) and item != point)


def _moved(point: Point, steps: Mapping[int, int]) -> Point:
    return tuple(rung + steps.get(i, 0) for i, rung in enumerate(point))
