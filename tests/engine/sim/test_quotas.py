"""Hit curves against replays, and slots divided by them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsed.core import CachePolicy
from sparsed.engine.sim.quotas import divide_slots, hit_curves, pool_curves
from sparsed.engine.sim.replay import replay
from sparsed.engine.sim.trace import Ints, Trace, count_steps

Draw = Callable[..., Trace]
seeds = st.integers(0, 2**32 - 1)
TRAINED = range(5, 20)


def hits(trace: Trace, capacity_L: Ints) -> int:
    """Of an exact LRU, in the steps that quotas are learned from."""
    missed_S = replay(trace, CachePolicy.LRU, capacity_L=capacity_L).missed_S
    return int((count_steps(trace).selected_S - missed_S)[TRAINED.start : TRAINED.stop].sum())


@settings(max_examples=40)
@given(seed=seeds, stay=st.sampled_from([0.3, 0.9]), ragged=st.booleans())
def test_curves_are_what_replays_find(draw: Draw, seed: int, stay: float, ragged: bool) -> None:
    trace = draw(seed, lanes=2, stay=stay, ragged=ragged)
    hits_LC = hit_curves(trace, TRAINED)
    for capacity in range(4, trace.num_pages + 1):
        assert hits_LC[:, capacity].sum() == hits(trace, np.full(2, capacity))


@settings(max_examples=60)
@given(seed=seeds, more=st.integers(0, 70), stay=st.sampled_from([0.3, 0.9]))
def test_uneven_slots_find_no_less_than_equal_ones(
    draw: Draw, seed: int, more: int, stay: float
) -> None:
    trace = draw(seed, stay=stay)
    total = 3 * 4 + more
    slots_L = divide_slots(hit_curves(trace, TRAINED), total=total, least=4)
    assert slots_L.sum() == total
    assert slots_L.min() >= 4
    equal_L = total // 3 + (np.arange(3) < total % 3)
    assert hits(trace, slots_L) >= hits(trace, equal_L)


@settings(max_examples=60)
@given(
    gains=st.lists(st.lists(st.integers(0, 50), min_size=6, max_size=6), min_size=3, max_size=3),
    more=st.integers(0, 18),
)
def test_of_concave_curves_no_division_finds_more(gains: list[list[int]], more: int) -> None:
    falling_LX = -np.sort(-np.array(gains), axis=1)
    hits_LC = np.pad(falling_LX.cumsum(axis=1), ((0, 0), (1, 0)))
    slots_L = divide_slots(hits_LC, total=more, least=0)
    best = np.sort(falling_LX.ravel())[::-1][:more].sum()
    assert hits_LC[np.arange(3), np.minimum(slots_L, 6)].sum() == best


def test_a_lane_that_gains_late_is_seen_to_gain() -> None:
    """Greedy by single slots would never give the second lane its first one."""
    hits_LC = np.array([[0, 2, 4, 5, 6], [0, 0, 0, 30, 30]])
    assert divide_slots(hits_LC, total=4, least=0).tolist() == [1, 3]


def test_slots_that_gain_nothing_are_spread() -> None:
    hits_LC = np.array([[0, 9, 9], [0, 4, 4], [0, 0, 0]])
    assert divide_slots(hits_LC, total=8, least=0).tolist() == [3, 3, 2]


def test_less_than_the_lanes_need_is_no_quota() -> None:
    with pytest.raises(AssertionError, match="fewer slots"):
        divide_slots(np.zeros((2, 5), dtype=np.int64), total=7, least=4)


def test_pooled_curves_stay_level_after_their_end() -> None:
    pooled_LC = pool_curves([np.array([[0, 1, 5]]), np.array([[0, 2, 2, 2, 7]])])
    assert pooled_LC.tolist() == [[0, 3, 7, 7, 12]]
