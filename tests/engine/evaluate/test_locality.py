"""Locality of selections against an LRU and sets in plain Python."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsed.engine.evaluate.locality import (
    RESIDENCIES,
    WARMUP_STEPS,
    WINDOW_STEPS,
    Column,
    LocalityMeter,
    count_steps,
)

PAD = -1
Stream = list[list[int]]  # the selection of each step of one lane


def lru_misses(stream: Stream, capacity: int) -> list[int]:
    """Misses of each step; the newest page comes last in the cache."""
    cache: OrderedDict[int, None] = OrderedDict()
    misses = []
    for selection in stream:
        misses.append(sum(page not in cache for page in set(selection)))
        for page in sorted(set(selection)):
            cache[page] = None
            cache.move_to_end(page)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return misses


def oracle(stream: Stream) -> np.ndarray:
    """The counts of ``count_steps`` for one lane, slowly."""
    sets = [set(selection) for selection in stream]
    before = [set().union(*sets[:step]) for step in range(len(sets))]
    windows = [sets[max(0, step + 1 - WINDOW_STEPS) : step + 1] for step in range(len(sets))]
    largest = max(map(len, sets))
    columns = [
        [len(new) for new in sets],
        [len(new & old) for old, new in zip([set(), *sets], sets, strict=False)],
        [len(set().union(*window)) for window in windows],
        [len(new - seen) for new, seen in zip(sets, before, strict=True)],
        *(lru_misses(stream, math.floor(residency * largest)) for residency in RESIDENCIES),
    ]
    return np.array(columns).T


def pages_of(streams: Sequence[Stream], *, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Padded pages (S, H, K) of lanes of equal length."""
    width = max(len(selection) for stream in streams for selection in stream)
    padded = [
        [selection + [PAD] * (width - len(selection)) for selection in stream] for stream in streams
    ]
    return torch.tensor(padded, dtype=dtype).transpose(0, 1)


def drifting(seed: int, *, steps: int, count: int, num_pages: int, stay: float) -> Stream:
    """A selection of which each page stays with probability ``stay``, else another one comes."""
    rng = np.random.default_rng(seed)
    selection = rng.permutation(num_pages)[:count]
    stream = []
    for _ in range(steps):
        kept = selection[rng.random(count) < stay]
        others = np.setdiff1d(np.arange(num_pages), kept)
        selection = np.concatenate([kept, rng.permutation(others)[: count - len(kept)]])
        stream.append(rng.permutation(selection).tolist())
    return stream


def lanes(min_pages: int) -> st.SearchStrategy[list[Stream]]:
    """One to three lanes of equally many steps, of any selections."""
    selection = st.lists(st.integers(0, 19), min_size=min_pages, max_size=6, unique=True)
    return st.integers(1, 40).flatmap(
        lambda steps: st.lists(
            st.lists(selection, min_size=steps, max_size=steps), min_size=1, max_size=3
        )
    )


@given(streams=lanes(min_pages=1))
@settings(max_examples=60)
def test_any_selections_are_counted_as_by_the_oracle(streams: list[Stream]) -> None:
    counts = count_steps(pages_of(streams)).numpy()
    np.testing.assert_array_equal(counts, sum(oracle(stream) for stream in streams))


@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 9),
    stay=st.sampled_from([0.0, 0.5, 0.8, 0.95, 1.0]),
)
@settings(max_examples=40)
def test_drifting_selections_are_counted_as_by_the_oracle(
    seed: int, count: int, stay: float
) -> None:
    stream = drifting(seed, steps=60, count=count, num_pages=80, stay=stay)
    counts = count_steps(pages_of([stream], dtype=torch.int16)).numpy()
    np.testing.assert_array_equal(counts, oracle(stream))


@given(streams=lanes(min_pages=0).filter(lambda streams: any(map(any, streams))))
@settings(max_examples=40)
def test_lanes_and_steps_may_be_empty(streams: list[Stream]) -> None:
    counts = count_steps(pages_of(streams)).numpy()
    np.testing.assert_array_equal(counts, sum(oracle(stream) for stream in streams))


def test_a_cycle_misses_until_it_fits() -> None:
    """Three disjoint selections in turn: an LRU of less than three never hits."""
    stream = [[10 * (step % 3) + page for page in range(4)] for step in range(50)]
    meter = LocalityMeter()
    meter.add(pages_of([stream]))
    result = meter.result()
    assert result is not None
    assert result.num_steps == 50 - WARMUP_STEPS
    assert result.overlap_frac == 0
    assert result.window_ratio == 3
    assert result.first_touch_frac == 0
    assert result.miss_fracs == (1, 1, 1, 0, 0, 0, 0)
    assert result.worst_miss_frac == 0


def test_of_one_step_the_higher_pages_stay_longer() -> None:
    """At 1.5x, three pages stay of four: page 0 is the oldest of the first step."""
    for page, misses in [(0, 1), (1, 0)]:
        counts = count_steps(pages_of([[[1, 0], [2, 3], [page, 3]]]))
        assert counts[2, Column.MISSES + RESIDENCIES.index(1.5)] == misses


def test_pages_never_seen_miss_at_any_residency() -> None:
    stream = [[0, step + 1] for step in range(40)]
    meter = LocalityMeter()
    meter.add(pages_of([stream]))
    result = meter.result()
    assert result is not None
    assert result.first_touch_frac == 0.5
    assert result.miss_fracs == (0.5,) * len(RESIDENCIES)


def test_the_worst_steps_are_those_of_all_lanes_of_a_text() -> None:
    """One lane always misses, one never; one step in a hundred both miss."""
    steps = WARMUP_STEPS + 200
    jumping = [[step] for step in range(steps)]
    resting = [[0] for _ in range(steps)]
    for step in range(WARMUP_STEPS, steps, 50):
        resting[step] = [step]
    meter = LocalityMeter()
    meter.add(pages_of([jumping]))
    meter.add(pages_of([resting]))
    result = meter.result()
    assert result is not None
    assert result.worst_miss_frac == 1
    assert result.miss_fracs[-1] == pytest.approx((200 + 4) / 400)


def test_layers_and_texts_are_pooled() -> None:
    streams = [drifting(seed, steps=50, count=5, num_pages=40, stay=0.7) for seed in range(4)]
    at_once, one_by_one = LocalityMeter(), LocalityMeter()
    for text, pair in enumerate([streams[:2], streams[2:]]):
        at_once.add(pages_of(pair), text=text)
        for stream in pair:
            one_by_one.add(pages_of([stream], dtype=torch.int32).numpy(), text=text)
    result = at_once.result()
    assert result is not None
    assert result == one_by_one.result()
    assert result.num_steps == 2 * (50 - WARMUP_STEPS)
    assert result.miss_fracs[0] == pytest.approx(1 - result.overlap_frac)  # holds one selection


def test_layers_of_a_text_have_the_same_steps() -> None:
    meter = LocalityMeter()
    meter.add(torch.zeros((40, 2, 1), dtype=torch.int64), text=3)
    with pytest.raises(ValueError, match="39 steps, but 40 in text 3"):
        meter.add(torch.zeros((39, 2, 1), dtype=torch.int64), text=3)


@pytest.mark.parametrize("shape", [(1, 2, 3), (WARMUP_STEPS, 2, 3), (0, 2, 3), (40, 2, 0)])
def test_nothing_after_the_warm_up_has_no_locality(shape: tuple[int, int, int]) -> None:
    meter = LocalityMeter()
    assert meter.result() is None
    meter.add(torch.zeros(shape, dtype=torch.int16))
    assert meter.result() is None


def test_padding_alone_selects_nothing() -> None:
    assert not count_steps(torch.full((40, 2, 3), PAD)).any()


@pytest.mark.gpu
def test_a_device_counts_the_same() -> None:
    streams = [drifting(seed, steps=64, count=9, num_pages=200, stay=0.8) for seed in range(8)]
    pages = pages_of(streams)
    assert torch.equal(count_steps(pages.cuda()).cpu(), count_steps(pages))
