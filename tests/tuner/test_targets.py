"""Which targets a window meets, and what few samples of recall say of it: nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import SNAPSHOT

from sparsed.core import Guard, Slo
from sparsed.tuner.targets import (
    MAX_SAMPLES,
    MIN_SAMPLES,
    Recall,
    is_mostly_late,
    mean_recall,
    missed,
    told,
)

SLO = Slo(ttft_s=1.0, tpot_s=0.1, min_recall=0.8)
SAMPLED = st.tuples(st.floats(0.0, 1.0), st.integers(1, 40))


@given(st.lists(SAMPLED, max_size=30))
def test_the_mean_lies_among_the_samples_and_needs_enough_of_them(
    windows: list[tuple[float, int]],
) -> None:
    recall = Recall()
    for mean, number in windows:
        recall = recall.grown(replace(SNAPSHOT, attention_recall=mean, recall_samples=number))
    num = sum(number for _, number in windows)
    assert recall.num <= MAX_SAMPLES + 1e-6
    assert (recall.mean is None) == (num < MIN_SAMPLES)
    if recall.mean is not None:
        means = [mean for mean, _ in windows]
        assert min(means) - 1e-9 <= recall.mean <= max(means) + 1e-9
        if num <= MAX_SAMPLES:
            assert recall.mean == pytest.approx(sum(m * n for m, n in windows) / num)


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_what_was_long_ago_is_forgotten(before: float, now: float) -> None:
    recall = Recall()
    for mean in (before, now):
        for _ in range(20):
            recall = recall.grown(replace(SNAPSHOT, attention_recall=mean, recall_samples=32))
    assert recall.mean == pytest.approx(now, abs=0.01)


def test_windows_without_samples_change_nothing() -> None:
    known = Recall(total=9.0, num=10.0)
    assert known.grown(replace(SNAPSHOT, attention_recall=None, recall_samples=0)) == known


@pytest.mark.parametrize(
    ("changes", "recall", "tells", "misses"),
    [
        ({}, 0.9, {Guard.TTFT, Guard.TPOT, Guard.QUALITY}, set()),
        ({}, None, {Guard.TTFT, Guard.TPOT}, set()),
        ({}, 0.79, {Guard.TTFT, Guard.TPOT, Guard.QUALITY}, {Guard.QUALITY}),
        ({"hot_hit_frac": None}, 0.79, {Guard.TTFT, Guard.TPOT}, set()),
        ({"ttft_p95_s": 1.1, "tpot_p95_s": None}, None, {Guard.TTFT}, {Guard.TTFT}),
    ],
)
def test_a_window_misses_what_it_tells_of(
    changes: dict[str, Any], recall: float | None, tells: set[Guard], misses: set[Guard]
) -> None:
    window = replace(SNAPSHOT, **changes)
    assert told(window, SLO, recall=recall) == tells
    assert missed(window, SLO, recall=recall) == misses
    assert told(window, Slo(), recall=recall) == missed(window, Slo(), recall=recall) == set()


def test_a_stretch_is_late_by_most_of_what_tells() -> None:
    late, quiet = replace(SNAPSHOT, tpot_p95_s=0.2), replace(SNAPSHOT, tpot_p95_s=None)
    slo = Slo(tpot_s=0.1, min_recall=0.99)
    assert is_mostly_late([late, late, SNAPSHOT, quiet, quiet], slo)
    assert not is_mostly_late([late, SNAPSHOT, quiet], slo)
    assert not is_mostly_late([quiet], slo)


def test_the_mean_of_a_stretch_weighs_samples_not_windows() -> None:
    windows = [
        replace(SNAPSHOT, attention_recall=mean, recall_samples=number)
        for mean, number in ((0.5, 1), (0.9, 3), (None, 0))
    ]
    assert mean_recall(windows) == pytest.approx(0.8)
    assert mean_recall(windows, least=5) is None
    assert mean_recall(windows[2:]) is None
