"""What a search takes over from a profile of another platform, and when it gives that up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

from scipy.stats import kendalltau

from sparsed.core import KnobValue
from sparsed.tuner.beliefs import Expectation, Prior
from sparsed.tuner.policy import Observation
from sparsed.tuner.space import Point, SearchSpace
from sparsed.tuner.surrogate import Surrogate

MIN_TRIALS: Final = 5  # with figures, before their order says anything of the prior

Values = Mapping[str, KnobValue]


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStart:
    """``values``: those of the profile, carried over, where the trust region begins.
    ``anchors``: configurations and the logarithm of what they scored there, over the default
    there; empty: nothing is known of them but the values."""

    values: Values
    anchors: tuple[tuple[Values, float], ...] = ()


def warm_prior(space: SearchSpace, warm: WarmStart, *, base: Prior, seed: int) -> Prior:
    """``base`` corrected by the anchors, as if they had been measured here: near them the
    objective is theirs, far from them that of ``base``. Slacks are those of ``base``."""
    if not warm.anchors or not space.is_open:
        return base
    home = base(space.default_values).objective
    points = [space.encode(values) for values, _ in warm.anchors]
    errors = [score - (base(values).objective - home) for values, score in warm.anchors]
    model = Surrogate.fit(space, points=points, values=errors, centre=0.0, seed=seed)

    @cache
    def correction(point: Point) -> float:
        return model.predict([point])[0].mean

    def expect(values: Values) -> Expectation:
        expected = base(values)
        return replace(expected, objective=expected.objective + correction(space.encode(values)))

    return expect


def misleads(prior: Prior, observations: Sequence[Observation]) -> bool:
    """Whether ``prior`` orders the trials so far worse than chance: Kendall's tau of what it
    expected and what was observed is below 0, after five trials with figures."""
    pairs = [
        (prior(item.values).objective, item.objective)
        for item in observations
        if item.objective is not None
    ]
    if len(pairs) < MIN_TRIALS:
        return False
    expected, observed = zip(*pairs, strict=True)
    tau = float(kendalltau(expected, observed).statistic)
    return not math.isnan(tau) and tau < 0.0  # nan: one of them is constant, which says nothing
