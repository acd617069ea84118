"""Which configurations of a search are worth a verification: its recommendation, then the next best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

from sparsed.core import KnobValue, TrialResult

Values = Mapping[str, KnobValue]


def pick_candidates(
    trials: Sequence[TrialResult],
    *,
    default: Values,
    recommended: Values,
    keeps_limits: Callable[[TrialResult], bool],
    most: int,
) -> list[TrialResult]:
    """A trial of each, the latest: ``recommended`` first, though it may have scored below the
    default by chance, then those that scored best above it. A configuration scores the median of
    its trials, and one that broke a limit once is none; neither is the default, so nothing is left
    where that is recommended and nothing scored above it."""
    bar = _score([trial for trial in trials if trial.values == default])
    found = [
        group
        for group in _by_values(trial for trial in trials if trial.values != default)
        if all(trial.score is not None and keeps_limits(trial) for trial in group)
        and (group[0].values == recommended or _score(group) > bar)
    ]
    found.sort(key=lambda group: (group[0].values != recommended, -_score(group)))
    return [group[-1] for group in found[:most]]


def _by_values(trials: Iterable[TrialResult]) -> list[list[TrialResult]]:
    """Those of the same configuration together, in the order of their first ones."""
    groups: list[list[TrialResult]] = []
    for trial in trials:
        known = next((group for group in groups if group[0].values == trial.values), None)
        if known is None:
            groups.append([trial])
        else:
            known.append(trial)
    return groups


def _score(trials: Sequence[TrialResult]) -> float:
    """Of those that kept their targets; 0 if none did."""
    scores = [trial.score for trial in trials if trial.score is not None]
    return median(scores) if scores else 0.0
