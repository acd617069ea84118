"""Stock scikit-optimize, as it comes: the second baseline of every results table."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from skopt import Optimizer
from skopt.space import Integer

from sparsed.core import KnobValue
from sparsed.tuner.policy import Observation, RandomSearch, Suggestion, best_observed
from sparsed.tuner.space import SearchSpace
from sparsed.tuner.surrogate import PENALTY_LOG
from sparsed.tuner.threads import one_thread

NUM_INITIAL: Final = 10  # random points first: the library's default


@dataclass(frozen=True, kw_only=True, slots=True)
class StockSearch:
    """The library's ``Optimizer`` with its defaults on the log objective; what is infeasible
    costs a bounded penalty. A point that it asks for twice is replaced by a random one.

    Of what is pending it is told the constant lie of its own batches, ``cl_min``: as good as the
    best so far, so that expected improvement is gone there. Source: Ginsbourger, Le Riche and
    Carraro 2010, constant liar.
    """

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
        num_begun = len(observations) + len(pending)
        at_random = partial(
            self._random, observations, incumbent=incumbent, num_left=num_left, pending=pending
        )
        if num_begun < NUM_INITIAL or not observations or not self.space.is_open:
            return at_random()
        sizes = [len(ladder.rungs) for ladder in self.space.ladders]
        optimizer = Optimizer(
            [Integer(0, max(1, size - 1)) for size in sizes],
            n_initial_points=0,
            random_state=random.Random(f"{self.seed}:{num_begun}").randrange(1 << 31),
        )
        points = [self.space.encode(item.values) for item in observations]
        points += [self.space.encode(values) for values in pending]
        known = losses(observations)
        lies = [min(known)] * len(pending)
        with one_thread(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lengths at their bounds, and points asked for twice
            optimizer.tell([list(point) for point in points], known + lies)
            asked = tuple(int(rung) for rung in optimizer.ask())
        if asked in points or not self.space.contains(asked):
            return at_random()
        reason = f"expected improvement, learned from {len(known)} trials"
        return Suggestion(self.space.decode(asked), reason)

    def recommend(
        self, observations: Sequence[Observation], *, incumbent: Mapping[str, KnobValue]
    ) -> Suggestion:
        return best_observed(observations, incumbent=incumbent, space=self.space)

    def _random(
        self,
        observations: Sequence[Observation],
        *,
        incumbent: Mapping[str, KnobValue],
        num_left: int,
        pending: Sequence[Mapping[str, KnobValue]],
    ) -> Suggestion | None:
        backend = RandomSearch(space=self.space, seed=~self.seed)
        return backend.suggest(
            observations, incumbent=incumbent, num_left=num_left, pending=pending
        )


def losses(observations: Sequence[Observation]) -> list[float]:
    """Negative objectives, all finite; infeasible ones a bounded step above the worst."""
    known = [
        -item.objective if item.objective is not None and item.is_feasible else None
        for item in observations
    ]
    penalty = max((loss for loss in known if loss is not None), default=0.0) + PENALTY_LOG
    return [penalty if loss is None else loss for loss in known]
