"""Wilcoxon's signed-rank test and what is read from it, exact, for small paired samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, combinations_with_replacement
from statistics import median


def p_greater(values: Sequence[float]) -> float:
    """Chance of ranks that speak as much for values above zero, if signs were drawn by a coin.

    Zeros are left out; equal magnitudes share their mean rank, and the distribution is that of the
    ranks as they are. 1.0 of nothing but zeros.
    Source: F. Wilcoxon, Individual Comparisons by Ranking Methods, 1945.
    """
    signed = sorted((value for value in values if value), key=abs)
    ranks = _doubled_ranks([abs(value) for value in signed])
    reached = sum(rank for rank, value in zip(ranks, signed, strict=True) if value > 0)
    return sum(_num_sign_patterns(ranks)[reached:]) * 0.5 ** len(ranks)


def hodges_lehmann(values: Sequence[float]) -> float:
    """The median of the Walsh averages. Source: Hodges and Lehmann, 1963."""
    return median(walsh_averages(values))


def walsh_averages(values: Sequence[float]) -> list[float]:
    """The mean of every pair of values, each with itself as well, ascending."""
    return sorted((a + b) / 2 for a, b in combinations_with_replacement(values, 2))


def upper_bound(values: Sequence[float], *, alpha: float) -> float:
    """What the centre of ``values`` exceeds with a chance of at most ``alpha``.

    The Walsh average at which the signed-rank test ceases to reject; the lower bound is minus the
    upper bound of the negated values. AssertionError if so few values have none.
    """
    at = _num_rejected(len(values), alpha=alpha)
    assert at, f"{len(values)} values have no bound at level {alpha}"
    return walsh_averages(values)[-at]


def _num_rejected(num_values: int, *, alpha: float) -> int:
    """How many of the lowest rank sums have together a chance of at most ``alpha``."""
    patterns = _num_sign_patterns(range(1, num_values + 1))
    limit = alpha * 2**num_values
    return sum(total <= limit for total in accumulate(patterns))


def _doubled_ranks(ascending: Sequence[float]) -> list[int]:
    """Twice the rank of each value, which for equal ones is twice their mean rank."""
    first = {value: at for at, value in reversed(list(enumerate(ascending)))}
    last = {value: at for at, value in enumerate(ascending)}
    return [first[value] + last[value] + 2 for value in ascending]


def _num_sign_patterns(ranks: Sequence[int]) -> list[int]:
    """By sum: how many subsets of ``ranks`` have it."""
    counts = [1] + [0] * sum(ranks)
    for rank in ranks:
        for total in range(len(counts) - 1, rank - 1, -1):
            counts[total] += counts[total - rank]
    return counts
