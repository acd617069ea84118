"""Which configurations of a search are worth a verification: its recommendation, then the next best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from sparsed.core import KnobValue, TrialResult
from sparsed.tuner.space import SearchSpace

Values = Mapping[str, KnobValue]


def pick_candidates(
    trials: Sequence[TrialResult],
    *,
    space: SearchSpace,
    default: Values,
    recommended: Values,
    keeps_limits: Callable[[TrialResult], bool],
    most: int,
) -> list[TrialResult]:
    """A trial of each, the latest: ``recommended`` first, though it may have scored below the
    default by chance, then those that scored best above it. A configuration, which is a point of
    ``space``, scores the median of its trials, and one that broke a limit once is none; neither is
    the default, so nothing is left where that is recommended and nothing scored above it."""
    home, wanted = space.encode(default), space.encode(recommended)
    by_point = {
        point: [trial for trial in trials if space.encode(trial.values) == point]
        for point in dict.fromkeys(space.encode(trial.values) for trial in trials)
    }
    bar = _score(by_point.get(home, []))
    found = {
        point: group
        for point, group in by_point.items()
        if point != home
        and all(trial.score is not None and keeps_limits(trial) for trial in group)
        and (point == wanted or _score(group) > bar)
    }
    order = sorted(found, key=lambda point: (point != wanted, -_score(found[point])))
    return [found[point][-1] for point in order[:most]]


def _score(trials: Sequence[TrialResult]) -> float:
    """Of those that kept their targets; 0 if none did."""
    scores = [trial.score for trial in trials if trial.score is not None]
    return median(scores) if scores else 0.0
