"""A model of the score over the search space: scikit-optimize's Gaussian process."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from skopt.acquisition import gaussian_ei
from skopt.learning import GaussianProcessRegressor
from skopt.space import Integer, Space
from skopt.utils import cook_estimator, normalize_dimensions

from sparsed.tuner.space import Point, SearchSpace

PENALTY_LOG: Final = 0.5  # an infeasible point is taught as this much below the worst score


class Prediction(NamedTuple):
    score: float
    low: float  # one standard deviation below, in the logarithm


@dataclass(frozen=True, slots=True)
class Surrogate:
    """Fitted on log scores. Rungs are evenly spaced, so the scale of every knob is logarithmic."""

    axes: tuple[int, ...]  # ladders with more than one rung
    space: Space
    model: GaussianProcessRegressor
    best_loss: float

    @classmethod
    def fit(
        cls,
        space: SearchSpace,
        *,
        points: Sequence[Point],
        scores: Sequence[float | None],
        seed: int,
    ) -> Surrogate:
        """Learn from ``points``; a score of None is infeasible. At least one must be feasible."""
        sizes = [len(ladder.rungs) for ladder in space.ladders]
        axes = tuple(axis for axis, size in enumerate(sizes) if size > 1)
        unit = normalize_dimensions([Integer(0, sizes[axis] - 1) for axis in axes])
        model = cook_estimator("GP", space=unit, random_state=seed)
        values = losses(scores)
        fitted = cls(axes=axes, space=unit, model=model, best_loss=min(values))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # length scales at their bounds: few points
            model.fit(fitted._rows(points), values)
        return fitted

    def expected_improvement(self, points: Sequence[Point]) -> list[float]:
        """Of the log score over the best one known."""
        gains = gaussian_ei(self._rows(points), self.model, y_opt=self.best_loss)
        return [float(gain) for gain in gains]

    def predict(self, points: Sequence[Point]) -> list[Prediction]:
        mean, deviation = self.model.predict(self._rows(points), return_std=True)
        pairs = zip(mean, deviation, strict=True)
        return [Prediction(math.exp(-m), math.exp(-m - d)) for m, d in pairs]

    def _rows(self, points: Sequence[Point]) -> Any:
        return self.space.transform([[point[axis] for axis in self.axes] for point in points])


def losses(scores: Sequence[float | None]) -> list[float]:
    """Negative log scores, all finite; infeasible ones a bounded step above the worst."""
    known = [-math.log(score) for score in scores if score is not None]
    penalty = max(known) + PENALTY_LOG
    return [penalty if score is None else -math.log(score) for score in scores]
