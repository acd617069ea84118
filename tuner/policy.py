"""Which configuration to try next: the protocol of all backends, and the two that learn nothing.

A backend keeps no state: it is asked with everything observed so far. The same seed and the same
observations give the same suggestion, so that a resumed study goes on as if never stopped.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import product
from typing import Final, NamedTuple, Protocol

from sparsed.core import KnobValue
from sparsed.tuner.space import Ladder, Point, SearchSpace


class Constraint(StrEnum):
    """What a configuration must keep, beside being good."""

    TTFT = "ttft"
    TPOT = "tpot"
    HBM = "hbm"  # peak under load
    LINK = "link"  # share of time the link is busy
    QUALITY = "quality"


class Crash(StrEnum):
    """Why a trial gave no figures."""

    OOM_DEVICE = "oom_device"
    OOM_HOST_PINNED = "oom_host_pinned"
    CUDA_ERROR = "cuda_error"
    TIMEOUT = "timeout"
    INVALID_CONFIG = "invalid_config"
    ENGINE_BUG = "engine_bug"
    INTERRUPTED = "interrupted"


# The others say something of the load, the code or the user, and nothing of the configuration.
TEACHING_CRASHES: Final = frozenset(
    {
        Crash.OOM_DEVICE,
        Crash.OOM_HOST_PINNED,
        Crash.CUDA_ERROR,
        Crash.TIMEOUT,
        Crash.INVALID_CONFIG,
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What one trial gave. ``objective`` is a logarithm, higher is better, and there also where a
    target is missed; None after a crash. ``slacks``: figure over limit minus one, 0 or less is
    good; a constraint without a figure is left out."""

    values: Mapping[str, KnobValue]
    objective: float | None
    slacks: Mapping[Constraint, float] = field(default_factory=dict)
    crash: Crash | None = None

    @property
    def is_feasible(self) -> bool:
        return self.objective is not None and all(slack <= 0 for slack in self.slacks.values())


class Suggestion(NamedTuple):
    values: dict[str, KnobValue]
    reason: str


class SearchBackend(Protocol):
    """``incumbent`` is what runs now, and what stays unless something is better. Whatever is
    suggested is valid, and no configuration that crashed comes again."""

    def suggest(
        self,
        observations: Sequence[Observation],
        *,
        incumbent: Mapping[str, KnobValue],
        num_left: int,
        pending: Sequence[Mapping[str, KnobValue]] = (),
    ) -> Suggestion | None:
        """What to try with ``num_left`` trials left, this one included; None: nothing is left
        to learn, or nothing is safe to try. ``pending``: what is being tried now, on other
        devices; it counts as tried, and none of it is suggested again for want of its result."""
        ...

    def recommend(
        self, observations: Sequence[Observation], *, incumbent: Mapping[str, KnobValue]
    ) -> Suggestion:
        """The configuration to take by what was observed."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomSearch:
    """Uniform over the rungs: the baseline every other backend is shown beside. What it draws
    depends on what was begun before, and not on what has ended."""

    space: SearchSpace
    seed: int

    def suggest(
        self,
        observations: Sequence[Observation],
        *,
        incumbent: Mapping[str, KnobValue],
        num_left: int,
        pending: Sequence[Mapping[str, KnobValue]] = (),
    ) -> Suggestion | None:
        seen = points_seen(self.space, observations, pending)
        generator = random.Random(f"{self.seed}:{len(observations) + len(pending)}")
        points = draw(self.space, generator=generator, num_points=1, seen=seen)
        return Suggestion(self.space.decode(points[0]), "random") if points else None

    def recommend(
        self, observations: Sequence[Observation], *, incumbent: Mapping[str, KnobValue]
    ) -> Suggestion:
        return best_observed(observations, incumbent=incumbent, space=self.space)


@dataclass(frozen=True, kw_only=True, slots=True)
class GridSearch:
    """All combinations of a few evenly spaced rungs of every ladder, in random order; with
    twice as fine a spacing once they are through."""

    space: SearchSpace
    seed: int

    def suggest(
        self,
        observations: Sequence[Observation],
        *,
        incumbent: Mapping[str, KnobValue],
        num_left: int,
        pending: Sequence[Mapping[str, KnobValue]] = (),
    ) -> Suggestion | None:
        seen = points_seen(self.space, observations, pending)
        num_begun = len(observations) + len(pending)
        for level in self._levels(num_begun + num_left):
            grid = [_spaced(len(ladder.rungs), level) for ladder in self.space.ladders]
            points = [p for p in product(*grid) if p not in seen and self.space.is_valid(p)]
            if points:
                chosen = random.Random(f"{self.seed}:{num_begun}").choice(points)
                return Suggestion(self.space.decode(chosen), f"grid of {level} rungs a knob")
        return None

    def recommend(
        self, observations: Sequence[Observation], *, incumbent: Mapping[str, KnobValue]
    ) -> Suggestion:
        return best_observed(observations, incumbent=incumbent, space=self.space)

    def _levels(self, num_trials: int) -> Iterator[int]:
        """Rungs a ladder: as many as the trials reach for, then twice as many, up to all."""
        longest = max((len(ladder.rungs) for ladder in self.space.ladders), default=1)
        level = max(2, int(num_trials ** (1 / max(1, len(self.space.ladders)))))
        while level < longest:
            yield level
            level *= 2
        yield longest


def points_seen(
    space: SearchSpace,
    observations: Sequence[Observation],
    pending: Sequence[Mapping[str, KnobValue]],
) -> set[Point]:
    """What was tried, or is being tried."""
    return {space.encode(values) for values in (*(o.values for o in observations), *pending)}


def best_observed(
    observations: Sequence[Observation],
    *,
    incumbent: Mapping[str, KnobValue],
    space: SearchSpace,
) -> Suggestion:
    """The best single observation within all limits, as simple searches recommend."""
    feasible = [item for item in observations if item.is_feasible]
    if not feasible:
        return Suggestion(plain(space, incumbent), "nothing met its targets")
    best = max(feasible, key=lambda item: item.objective or -math.inf)
    return Suggestion(plain(space, best.values), "the best one observed")


def plain(space: SearchSpace, values: Mapping[str, KnobValue]) -> dict[str, KnobValue]:
    """The values of all ladders."""
    return space.decode(space.encode(values))


def draw(
    space: SearchSpace,
    *,
    generator: random.Random,
    num_points: int,
    seen: AbstractSet[Point],
    centre: Point | None = None,
    radius: float = 1.0,
) -> list[Point]:
    """Up to ``num_points`` distinct valid points outside ``seen``, within ``radius`` (a share of
    every ladder, one rung at least) of ``centre`` if one is given; from everywhere if none is
    left there; none if none is left."""
    ranges = [_rungs_around(ladder, rung, radius) for ladder, rung in _with_rung(space, centre)]
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


def _rungs_around(ladder: Ladder, rung: int | None, radius: float) -> range:
    size = len(ladder.rungs)
    if rung is None:
        return range(size)
    reach = max(1, math.floor(radius * (size - 1)))
    return range(max(0, rung - reach), min(size, rung + reach + 1))


def _moved(point: Point, steps: Mapping[int, int]) -> Point:
    return tuple(rung + steps.get(axis, 0) for axis, rung in enumerate(point))


def _spaced(size: int, level: int) -> list[int]:
    """Up to ``level`` numbers of rungs from the first to the last."""
    if level >= size:
        return list(range(size))
    return sorted({round(i * (size - 1) / (level - 1)) for i in range(level)})
