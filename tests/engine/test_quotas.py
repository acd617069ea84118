"""Blocks divided among lanes, the host's lists of them, and rounds of moving them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsed.core import SparseMethod
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.lane_blocks import LaneBlocks
from sparsed.engine.kvcache.quotas import Demand, divide_blocks, level
from sparsed.engine.kvcache.rebalance import MIN_STEPS, ROUND_STEPS, Rebalancer
from sparsed.engine.kvcache.residency import Residency

MakeCache = Callable[..., KVCache]

counts = st.lists(st.integers(0, 60), min_size=1, max_size=9).map(np.array)


@given(
    data=st.data(),
    blocks_L=counts,
    pages_per_block=st.sampled_from([1, 4, 16]),
    selected=st.integers(1, 400),
    num_steps=st.integers(1, 70),
    least=st.integers(0, 40),
    most=st.integers(1, 90),
)
def test_a_round_keeps_to_its_bounds(
    data: st.DataObject,
    blocks_L: np.ndarray,
    pages_per_block: int,
    selected: int,
    num_steps: int,
    least: int,
    most: int,
) -> None:
    """Whatever was measured, and however the lanes came to be as they are."""
    pages = st.lists(
        st.integers(0, selected * num_steps), min_size=len(blocks_L), max_size=len(blocks_L)
    )
    demand = Demand(np.array(data.draw(pages)), np.array(data.draw(pages)), num_steps)
    after_L = divide_blocks(
        demand,
        blocks_L,
        pages_per_block=pages_per_block,
        selected_pages=selected,
        least=least,
        most=most,
    )
    assert after_L.sum() == blocks_L.sum()
    assert (after_L >= np.minimum(blocks_L, least)).all()
    assert (after_L <= np.maximum(blocks_L, most)).all()
    assert (after_L >= 0.7 * blocks_L).all() and (after_L <= 1.5 * blocks_L).all()


def power_law(blocks_L: np.ndarray, scale_L: np.ndarray, exponent_L: np.ndarray) -> Demand:
    """What lanes would show whose misses fall with a power of their slots, 16 to a block."""
    slots_L = blocks_L * 16 - 1
    misses_L = scale_L * (256 / slots_L) ** exponent_L
    shared_L = np.full(len(blocks_L), 300.0)
    for _ in range(50):  # what two steps use holds what is new in the second
        wanted_L = scale_L * (256 / shared_L) ** exponent_L
        shared_L = 250 + wanted_L / 64
    returns_L = np.maximum(wanted_L - misses_L, 0)
    return Demand(np.round(misses_L).astype(int), np.round(returns_L).astype(int), 64)


def misses_of(blocks_L: np.ndarray, scale_L: np.ndarray, exponent_L: np.ndarray) -> float:
    return float((scale_L * (256 / (blocks_L * 16 - 1)) ** exponent_L).sum())


@settings(max_examples=40)
@given(
    scales=st.lists(st.integers(2000, 5000), min_size=3, max_size=3),
    exponents=st.lists(st.floats(0.8, 4), min_size=3, max_size=3),
)
def test_rounds_find_the_best_division(scales: list[int], exponents: list[float]) -> None:
    """Of every division of 96 blocks among three lanes none misses much less."""
    lanes = np.array(scales, dtype=float), np.array(exponents)
    blocks_L = np.array([32, 32, 32])
    equal = misses_of(blocks_L, *lanes)
    for _ in range(6):
        blocks_L = divide_blocks(
            power_law(blocks_L, *lanes),
            blocks_L,
            pages_per_block=16,
            selected_pages=250,
            least=20,
            most=200,
        )
    divisions = ((a, b, 96 - a - b) for a, b in product(range(20, 57), repeat=2) if a + b <= 76)
    best = min(misses_of(np.array(division), *lanes) for division in divisions)
    assert best <= misses_of(blocks_L, *lanes) <= best + 0.02 * equal


def test_what_changes_nothing_moves_nothing() -> None:
    """Equal lanes stay equal, and one that has what it asks for gives to one that has not."""
    pages = np.full(4, 900)
    sizes = {"pages_per_block": 16, "selected_pages": 255, "least": 17, "most": 90}
    blocks_L = np.full(4, 40)
    assert divide_blocks(Demand(pages, pages, 64), blocks_L, **sizes).tolist() == [40] * 4
    idle_L = np.array([900, 0, 900, 900])
    after_L = divide_blocks(Demand(idle_L, np.array([900, 0, 900, 900]), 64), blocks_L, **sizes)
    assert after_L.tolist() == [44, 28, 44, 44]


@given(blocks_L=counts, least=st.integers(0, 30), most=st.integers(0, 70), data=st.data())
def test_levels_keep_to_their_bounds(
    blocks_L: np.ndarray, least: int, most: int, data: st.DataObject
) -> None:
    low_L, high_L = np.minimum(blocks_L, least), np.maximum(blocks_L, most)
    total = data.draw(st.integers(int(low_L.sum()), int(high_L.sum())))
    level_L = level(blocks_L, total, least=least, most=most)
    assert level_L.sum() == total
    assert (level_L >= low_L).all() and (level_L <= high_L).all()
    change_L = level_L - blocks_L
    assert (change_L >= 0).all() or (change_L <= 0).all()
    free_L = change_L[(level_L > low_L) & (level_L < high_L)]
    assert not len(free_L) or free_L.max() - free_L.min() <= 1
    if total % len(blocks_L) == 0 and blocks_L.min() == blocks_L.max():
        assert level_L.min() == level_L.max()


def test_a_level_that_does_not_fit_is_refused() -> None:
    with pytest.raises(AssertionError, match="no such division"):
        level(np.array([3, 3]), 9, least=0, most=4)


@given(data=st.data(), num_lanes=st.integers(1, 5))
def test_lists_of_blocks_are_lists(data: st.DataObject, num_lanes: int) -> None:
    blocks, lists, next_id = LaneBlocks(num_lanes), [[] for _ in range(num_lanes)], 0
    numbers = st.lists(st.integers(0, 6), min_size=num_lanes, max_size=num_lanes)
    for _ in range(data.draw(st.integers(1, 6))):
        more_L, cut_L = np.array(data.draw(numbers)), np.array(data.draw(numbers))
        blocks.add(np.arange(next_id, next_id + more_L.sum()), more_L)
        for lane, more in zip(lists, more_L, strict=True):
            lane += range(next_id, next_id + more)
            next_id += more
        keep_L = np.maximum(blocks.counts_L - cut_L, 0)
        dropped_Ln = blocks.drop(keep_L)
        for dropped_n, lane, keep in zip(dropped_Ln.tolist(), lists, keep_L, strict=True):
            gone = lane[keep:]
            del lane[keep:]
            assert dropped_n == gone + [-1] * (len(dropped_n) - len(gone))
        width = blocks.ids_LN.shape[1]
        assert blocks.ids_LN.tolist() == [lane + [-1] * (width - len(lane)) for lane in lists]
        sizes = [len(lane) for lane in lists]
        assert blocks.counts_L.tolist() == sizes
        assert (blocks.least, blocks.most) == (min(sizes), max(sizes))
        assert sorted(blocks.ids_X) == sorted(id for lane in lists for id in lane)


class Decode:
    """A request of 30 pages of 32 tokens in a hot tier of 5 blocks a lane. Lane 0 selects other
    pages in every step, the others the same ones."""

    def __init__(self, make_cache: MakeCache, **knobs: int) -> None:
        self.cache = make_cache(
            lane_blocks=5, num_frames=8, token_budget=256, hbm_budget=5 * 128, **knobs
        )
        self.index = self.cache.add(1020, method=SparseMethod.QUEST, token_budget=None)
        self.cache.open_chunk(self.index, 0, 960, step=0)
        self.row = self.cache.rows[self.index]
        self.residency, self.rebalancer = Residency(self.cache), Rebalancer(self.cache)

    def run(self, steps: range) -> None:
        for step in steps:
            self.rebalancer.step(step)
            self.residency.begin(step)
            pages_LHK = torch.arange(7, dtype=torch.int32).repeat(2, 2, 1)
            pages_LHK[0, 0] = (pages_LHK[0, 0] + 7 * step) % 28
            for layer in range(2):
                self.residency.bring_in(
                    pages_LHK[layer, None].contiguous(),
                    layer=layer,
                    rows_B=torch.tensor([self.index], dtype=torch.int32),
                    positions_B=torch.tensor([960], dtype=torch.int32),
                    max_blocks=self.row.blocks.most,
                )
            self.row.reads = self.row.reads._replace(sparse_steps=self.row.reads.sparse_steps + 1)


def test_a_round_gives_to_the_lane_that_misses(make_cache: MakeCache) -> None:
    decode = Decode(make_cache)
    assert not decode.row.complete
    decode.run(range(1, ROUND_STEPS + 1))
    assert decode.row.blocks.counts_L.tolist() == [5] * 4, "measured, but not yet moved"
    demand_LH2 = decode.cache.tables.demand_RLH2[decode.index]
    assert 0 < int(demand_LH2.sum()) <= 7, "counted anew: what one lane did in one step"
    decode.run(range(ROUND_STEPS + 1, 2 * ROUND_STEPS))
    counts_L = decode.row.blocks.counts_L
    assert counts_L.sum() == 20
    assert counts_L[0] == 7, "one and a half times what it had"
    assert counts_L.min() == 4, "seven tenths, rounded up"
    decode.run(range(2 * ROUND_STEPS, 3 * ROUND_STEPS))
    assert decode.row.blocks.counts_L.tolist() == [8, 4, 4, 4], "all there is to hold"
    misses = decode.residency.counters.values_C[1].item()
    decode.run(range(3 * ROUND_STEPS, 3 * ROUND_STEPS + 20))
    assert decode.residency.counters.values_C[1].item() == misses, "it holds all that it selects"
    decode.cache.check_integrity()


def test_a_row_is_measured_over_steps_of_its_own(make_cache: MakeCache) -> None:
    """One that is new, over, or that selected in few steps has to wait."""
    late = Decode(make_cache)
    late.run(range(ROUND_STEPS - MIN_STEPS + 2, ROUND_STEPS + 10))
    assert late.row.blocks.counts_L.tolist() == [5] * 4
    gone = Decode(make_cache)
    gone.run(range(1, ROUND_STEPS + 1))
    gone.cache.free(gone.index)
    gone.index = gone.cache.add(1020, method=SparseMethod.QUEST, token_budget=None)
    assert gone.index == gone.row.index, "another one in the same place"
    gone.rebalancer.step(ROUND_STEPS + 1)
    blocks = gone.cache.rows[gone.index].blocks
    assert blocks.least == blocks.most
    assert not gone.cache.tables.demand_RLH2[gone.index].any()


def test_lanes_of_dense_layers_keep_their_blocks(make_cache: MakeCache) -> None:
    """They miss nothing that is counted, and stream what they do not hold."""
    cache = make_cache(
        lane_blocks=5, num_frames=8, token_budget=256, hbm_budget=5 * 128, dense_layers=1
    )
    index = cache.add(1020, method=SparseMethod.QUEST, token_budget=None)
    cache.open_chunk(index, 0, 960, step=0)
    pages_L = np.array([0, 0, 400, 0])
    cache.rebalance(index, Demand(pages_L, pages_L, ROUND_STEPS))
    assert cache.rows[index].blocks.counts_L.tolist() == [5, 5, 6, 4]


def test_rows_that_lost_their_balance_shrink_and_grow(make_cache: MakeCache) -> None:
    """A newcomer gets its share from all lanes, none of which falls below what it must have."""
    cache = make_cache(lane_blocks=8, num_frames=24, token_budget=256)
    first = cache.add(1020, method=SparseMethod.QUEST, token_budget=None)
    cache.open_chunk(first, 0, 1020, step=0)
    second = cache.add(1020, method=SparseMethod.QUEST, token_budget=None)
    row = cache.rows[first]
    assert row.blocks.counts_L.tolist() == [5] * 4 and not row.complete
    for pages_L in ([400, 0, 0, 0], [400, 0, 0, 0]):
        cache.rebalance(first, Demand(np.array(pages_L), np.array(pages_L), ROUND_STEPS))
    assert row.blocks.counts_L.tolist() == [8, 4, 4, 4]
    cache.make_room(first, 896)
    assert row.blocks.counts_L.tolist() == [8, 4, 4, 4], "nothing is free"
    cache.free(second)
    cache.make_room(first, 900)
    assert row.blocks.counts_L.tolist() == [8, 4, 4, 4], "at the start of a block alone"
    cache.make_room(first, 896)
    assert row.blocks.counts_L.tolist() == [8] * 4, "all that it has a use for"
    third = cache.add(1020, method=SparseMethod.QUEST, token_budget=None)
    assert row.blocks.counts_L.tolist() == [5] * 4
    cache.free(third)
    cache.check_integrity()
