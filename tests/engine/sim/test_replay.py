"""Replays of traces against caches in plain Python, and against all that could be done."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsed.core import RESIDENCIES, CachePolicy
from sparsed.engine.evaluate.locality import Column
from sparsed.engine.evaluate.locality import count_steps as count_steps_by_torch
from sparsed.engine.sim.replay import replay
from sparsed.engine.sim.slots import LAST_BIN
from sparsed.engine.sim.trace import PAD, Trace, count_steps, make_trace

Draw = Callable[..., Trace]
seeds = st.integers(0, 2**32 - 1)
LONG = 2 * LAST_BIN  # steps after which ages have been cut off


class Slow(NamedTuple):
    """Counts of one lane by step."""

    missed: list[int]
    prefetched: list[int]
    used: list[int]


class DictLru:
    """The last use of every page that a lane holds."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.last: dict[int, int] = {}

    def bring(self, pages: list[int], step: int) -> list[int]:
        missing = [page for page in pages if page not in self.last]
        self.last |= dict.fromkeys(pages, step)
        while len(self.last) > self.capacity:
            del self.last[min(self.last, key=lambda page: (self.last[page], page))]
        return missing


class Buckets:
    """The cache of the device for a lane, slot by slot."""

    def __init__(self, capacity: int) -> None:
        self.page: list[int | None] = [None] * capacity
        self.last = [0] * capacity

    def bring(self, pages: list[int], step: int) -> list[int]:
        for slot, page in enumerate(self.page):
            if page in pages:
                self.last[slot] = step
        missing = [page for page in pages if page not in self.page]
        for page, slot in zip(missing, self.victims(len(missing), step), strict=True):
            self.page[slot] = page
            self.last[slot] = step
        return missing

    def victims(self, count: int, step: int) -> list[int]:
        slots = range(len(self.page))
        free = [slot for slot in slots if self.page[slot] is None]
        need = max(0, count - len(free))
        bins = {
            slot: min(LAST_BIN, step - self.last[slot])
            for slot in slots
            if self.page[slot] is not None and self.last[slot] != step
        }
        cut = LAST_BIN
        while sum(age >= cut for age in bins.values()) < need:
            cut -= 1
        above = [slot for slot, age in bins.items() if age > cut]
        at_cut = [slot for slot, age in bins.items() if age == cut]
        return [*free, *above, *at_cut][:count]


SLOW = {CachePolicy.LRU: DictLru, CachePolicy.BUCKETED: Buckets}


def pages_of(trace: Trace, lane: int, step: int) -> list[int]:
    return [page for page in trace.pages_SLK[step, lane].tolist() if page != PAD]


def replay_slowly(trace: Trace, lane: int, policy: CachePolicy, capacity: int) -> Slow:
    slots = SLOW[policy](capacity)
    slow = Slow(*([0] * trace.num_steps for _ in Slow._fields))
    since: dict[int, int] = {}  # when a page was loaded ahead that has not been selected since
    for step in range(trace.num_steps):
        pages = pages_of(trace, lane, step)
        missing = slots.bring(pages, step)
        slow.missed[step] = len(missing)
        for page in pages:
            loaded_at = since.pop(page, None)
            if loaded_at is not None and page not in missing:
                slow.used[loaded_at] += 1
        ahead = trace.ahead_SLM[step, lane][: capacity - len(pages)]
        loaded = slots.bring(sorted(ahead[ahead != PAD].tolist()), step)
        slow.prefetched[step] = len(loaded)
        since |= dict.fromkeys(loaded, step)
    return slow


@pytest.mark.parametrize("policy", SLOW)
@settings(max_examples=60)
@given(
    seed=seeds,
    pages=st.sampled_from([20, 200]),  # of 200 many are long unused when they give way
    capacities=st.lists(st.integers(5, 90), min_size=3, max_size=3),
    ahead=st.integers(0, 6),
    steps=st.sampled_from([1, 30, LONG]),
    stay=st.sampled_from([0.3, 0.9, 0.99]),
    ragged=st.booleans(),
)
def test_as_in_plain_python(
    draw: Draw,
    policy: CachePolicy,
    seed: int,
    pages: int,
    capacities: list[int],
    ahead: int,
    steps: int,
    stay: float,
    ragged: bool,
) -> None:
    trace = draw(seed, steps=steps, selected=5, ahead=ahead, pages=pages, stay=stay, ragged=ragged)
    loads = replay(trace, policy, capacity_L=np.array(capacities))
    lanes = [replay_slowly(trace, lane, policy, size) for lane, size in enumerate(capacities)]
    for found_S, slow in zip(loads, zip(*lanes, strict=True), strict=True):
        np.testing.assert_array_equal(found_S, np.sum(slow, axis=0))


def fewest_misses(trace: Trace, lane: int, capacity: int) -> int:
    """Of all that could be kept after every step."""

    @cache
    def misses(step: int, held: frozenset[int]) -> int:
        if step == trace.num_steps:
            return 0
        pages = frozenset(pages_of(trace, lane, step))
        others = sorted(held - pages)
        kept = min(len(others), capacity - len(pages))
        choices = combinations(others, kept)
        return len(pages - held) + min(misses(step + 1, pages | {*some}) for some in choices)

    return misses(0, frozenset())


@settings(max_examples=80)
@given(seed=seeds, capacity=st.integers(2, 6), ragged=st.booleans())
def test_belady_is_the_least_of_all_choices(
    draw: Draw, seed: int, capacity: int, ragged: bool
) -> None:
    trace = draw(seed, steps=9, lanes=2, selected=2, pages=7, stay=0.4, ragged=ragged)
    loads = replay(trace, CachePolicy.BELADY, capacity_L=np.full(2, capacity))
    fewest = sum(fewest_misses(trace, lane, capacity) for lane in range(2))
    assert loads.missed_S.sum() == fewest


@settings(max_examples=60)
@given(seed=seeds, capacity=st.integers(4, 20), stay=st.sampled_from([0.3, 0.9]))
def test_no_policy_beats_belady(draw: Draw, seed: int, capacity: int, stay: float) -> None:
    trace = draw(seed, steps=LONG, stay=stay)
    missed = {
        policy: replay(trace, policy, capacity_L=np.full(3, capacity)).missed_S.sum()
        for policy in CachePolicy
    }
    assert missed[CachePolicy.BELADY] == min(missed.values())


@settings(max_examples=60)
@given(seed=seeds, capacity=st.integers(1, 12))
def test_buckets_are_an_exact_lru_where_no_two_pages_are_of_one_age(
    draw: Draw, seed: int, capacity: int
) -> None:
    """One page a step, and fewer steps than there are bins."""
    trace = draw(seed, steps=LAST_BIN + 1, selected=1, stay=0.6)
    exact, bucketed = (
        replay(trace, policy, capacity_L=np.full(3, capacity)).missed_S
        for policy in (CachePolicy.LRU, CachePolicy.BUCKETED)
    )
    np.testing.assert_array_equal(exact, bucketed)


def lane_of(*steps: list[int]) -> Trace:
    pages_SLK = np.full((len(steps), 1, max(map(len, steps))), PAD)
    for step, pages in enumerate(steps):
        pages_SLK[step, 0, : len(pages)] = pages
    return make_trace(pages_SLK)


def test_buckets_forget_the_order_of_the_oldest_pages() -> None:
    """Page 1 is older than page 0, which has the lower slot; both are in the last bin."""
    trace = lane_of([0, 1], [0], *([[2]] * LAST_BIN), [2, 3], [0])
    missed = {
        policy: replay(trace, policy, capacity_L=np.array([3])).missed_S[-1] for policy in SLOW
    }
    assert missed == {CachePolicy.LRU: 0, CachePolicy.BUCKETED: 1}


@pytest.mark.parametrize("asked_again", [0, 1, 2])
@pytest.mark.parametrize("idle", range(LAST_BIN - 3, LAST_BIN + 3))
def test_the_last_bin_begins_where_the_device_has_it(idle: int, asked_again: int) -> None:
    """Two of three pages give way, of which the one in the last slot is a step older."""
    trace = lane_of([0, 1, 2], [0, 1], *([[3]] * idle), [3, 4, 5], [asked_again])
    loads = replay(trace, CachePolicy.BUCKETED, capacity_L=np.array([4]))
    slow = replay_slowly(trace, 0, CachePolicy.BUCKETED, 4)
    assert loads.missed_S.tolist() == slow.missed
    assert slow.missed[-1] == ({0, 1} if idle + 1 >= LAST_BIN else {0, 2}).issuperset([asked_again])


@settings(max_examples=30)
@given(seed=seeds, stay=st.sampled_from([0.3, 0.9]))
def test_counts_are_those_of_the_evaluation(draw: Draw, seed: int, stay: float) -> None:
    trace = draw(seed, selected=4, pages=40, stay=stay)
    other_SC = count_steps_by_torch(torch.from_numpy(trace.pages_SLK)).numpy()
    counts = count_steps(trace)
    np.testing.assert_array_equal(counts.selected_S, other_SC[:, Column.SELECTED])
    np.testing.assert_array_equal(counts.repeated_S, other_SC[:, Column.REPEATED])
    np.testing.assert_array_equal(counts.window_S, other_SC[:, Column.WINDOW])
    np.testing.assert_array_equal(counts.first_touch_S, other_SC[:, Column.FIRST_TOUCH])
    for index, residency in enumerate(RESIDENCIES):
        loads = replay(trace, CachePolicy.LRU, capacity_L=np.full(3, int(residency * 4)))
        np.testing.assert_array_equal(loads.missed_S, other_SC[:, Column.MISSES + index])


@pytest.mark.parametrize("policy", CachePolicy)
def test_a_lane_without_room_for_its_selection_is_no_cache(draw: Draw, policy: CachePolicy) -> None:
    with pytest.raises(AssertionError, match="more than it holds"):
        replay(draw(0), policy, capacity_L=np.array([4, 3, 4]))
