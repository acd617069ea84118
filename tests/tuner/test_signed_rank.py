"""The exact test against brute force, against another implementation, and against its claims."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wilcoxon

from sparsed.tuner.signed_rank import hodges_lehmann, p_greater, upper_bound, walsh_averages

finite = st.floats(-1.0, 1.0, allow_subnormal=False)
distinct = st.lists(
    st.integers(-1000, 1000).filter(bool), min_size=6, max_size=32, unique_by=abs
).map(lambda values: [value / 1000 for value in values])


def brute_force_p(values: Sequence[float]) -> float:
    """Over all patterns of signs, with ranks counted by hand."""
    sizes = [abs(value) for value in values if value]
    ranks = [sum(other < size for other in sizes) + (sizes.count(size) + 1) / 2 for size in sizes]
    positive = (value > 0 for value in values if value)
    seen = sum(rank for rank, is_up in zip(ranks, positive, strict=True) if is_up)
    patterns = list(product((0, 1), repeat=len(ranks)))
    sums = [sum(r * s for r, s in zip(ranks, signs, strict=True)) for signs in patterns]
    return sum(total >= seen for total in sums) / len(patterns)


@given(st.lists(st.integers(-4, 4).map(float), max_size=9))
def test_p_is_that_of_all_sign_patterns_with_ties_and_zeros(values: list[float]) -> None:
    assert p_greater(values) == pytest.approx(brute_force_p(values), abs=1e-12)


@given(distinct)
def test_p_is_that_of_another_implementation(values: list[float]) -> None:
    other = wilcoxon(values, alternative="greater", method="exact").pvalue
    assert p_greater(values) == pytest.approx(other, abs=1e-12)


@given(st.lists(finite, min_size=1, max_size=20))
def test_the_estimate_is_that_of_brute_force(values: list[float]) -> None:
    averages = [
        (values[i] + values[j]) / 2 for i in range(len(values)) for j in range(i, len(values))
    ]
    assert walsh_averages(values) == sorted(averages)
    assert hodges_lehmann(values) == median(averages)


@given(distinct, st.floats(0.02, 0.2))
def test_the_bound_excludes_zero_just_when_the_test_rejects(
    values: list[float], alpha: float
) -> None:
    lower = -upper_bound([-value for value in values], alpha=alpha)
    assert (lower > 0) == (p_greater(values) <= alpha)


@given(distinct, st.floats(-0.5, 0.5))
def test_estimates_move_with_the_values(values: list[float], shift: float) -> None:
    moved = [value + shift for value in values]
    assert hodges_lehmann(moved) == pytest.approx(hodges_lehmann(values) + shift)
    bound = upper_bound(values, alpha=0.025)
    assert upper_bound(moved, alpha=0.025) == pytest.approx(bound + shift)


def test_the_interval_covers_the_centre_as_often_as_it_says() -> None:
    """95 % of 1500 draws: six standard deviations of that count are 3.4 %."""
    draw = random.Random(0)
    covered = 0
    for _ in range(1500):
        values = [0.3 + draw.gauss(0.0, 1.0) for _ in range(20)]
        low = -upper_bound([-value for value in values], alpha=0.025)
        covered += low <= 0.3 <= upper_bound(values, alpha=0.025)
    assert 0.95 - 0.034 <= covered / 1500 <= 0.95 + 0.034


def test_too_few_values_have_no_bound() -> None:
    with pytest.raises(AssertionError, match="5 values"):
        upper_bound([0.1] * 5, alpha=0.025)
