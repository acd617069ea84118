"""A model of one figure over the search space: scikit-optimize's Gaussian process."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from skopt.learning import GaussianProcessRegressor
from skopt.learning.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from skopt.space import Integer, Space
from skopt.utils import normalize_dimensions

from sparsed.tuner.space import Point, SearchSpace
from sparsed.tuner.threads import one_thread

# Figures are logarithms, so these bounds say how much a knob may matter at least and at most: a
# model of three points must not be sure of itself, and a window is never free of noise.
VARIANCE: Final = (0.09, 9.0)
LENGTH: Final = (0.15, 4.0)  # of the whole ladder of a knob
NOISE: Final = (1e-4, 0.02)
START_VARIANCE: Final = 0.5
START_LENGTH: Final = 1.0
START_NOISE: Final = 0.0025
PENALTY_LOG: Final = 0.5  # an infeasible point is taught as this much below the worst score


class Prediction(NamedTuple):
    """``deviation`` is that of the figure itself, ``noise`` that of a measurement of it."""

    mean: float
    deviation: float
    noise: float = 0.0

    @property
    def spread(self) -> float:
        """Standard deviation of what a measurement will show."""
        return math.hypot(self.deviation, self.noise)


@dataclass(frozen=True, slots=True)
class Surrogate:
    """Matern-5/2 with a length for every knob, and white noise. Rungs are evenly spaced, so the
    scale of every knob is logarithmic."""

    axes: tuple[int, ...]  # ladders with more than one rung
    space: Space
    model: GaussianProcessRegressor
    centre: float  # what is expected far from every point

    @classmethod
    def fit(
        cls,
        space: SearchSpace,
        *,
        points: Sequence[Point],
        values: Sequence[float],
        centre: float,
        seed: int,
    ) -> Surrogate:
        """Learn ``values`` (logarithms) of ``points``, one or more, maybe with repeats."""
        sizes = [len(ladder.rungs) for ladder in space.ladders]
        axes = tuple(axis for axis, size in enumerate(sizes) if size > 1)
        unit = normalize_dimensions([Integer(0, sizes[axis] - 1) for axis in axes])
        kernel = ConstantKernel(START_VARIANCE, VARIANCE) * Matern(
            length_scale=[START_LENGTH] * len(axes),
            length_scale_bounds=[LENGTH] * len(axes),
            nu=2.5,
        )
        model = GaussianProcessRegressor(
            kernel=kernel + WhiteKernel(START_NOISE, NOISE), noise="gaussian", random_state=seed
        )
        fitted = cls(axes=axes, space=unit, model=model, centre=centre)
        with one_thread(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lengths at their bounds: few points
            model.fit(fitted._rows(points), [value - centre for value in values])
        return fitted

    def predict(self, points: Sequence[Point]) -> list[Prediction]:
        """What to expect at ``points``, one or more."""
        with one_thread(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # variances rounded to below zero, at known points
            mean, deviation = self.model.predict(self._rows(points), return_std=True)
        pairs = zip(mean, deviation, strict=True)
        noise = math.sqrt(float(self.model.noise_))
        return [Prediction(self.centre + float(m), float(d), noise) for m, d in pairs]

    def _rows(self, points: Sequence[Point]) -> Any:
        return self.space.transform([[point[axis] for axis in self.axes] for point in points])


def penalized(scores: Sequence[float | None]) -> list[float]:
    """Log scores, one at least known; infeasible ones are a bounded step below the worst."""
    known = [math.log(score) for score in scores if score is not None]
    penalty = min(known) - PENALTY_LOG
    return [penalty if score is None else math.log(score) for score in scores]
