"""Whole in the hot tier until memory is short, and whole again once it is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsed.core import SparseMethod
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.hbm import LOCKED_STEP, slots_of_blocks
from sparsed.engine.kvcache.residency import Residency
from sparsed.engine.kvcache.row import Row

MakeCache = Callable[..., KVCache]
METHOD = SparseMethod.CUBOID_MEAN
PAGE = 32  # tokens, four a block


def add(cache: KVCache, num_tokens: int, *, total: int = 1020) -> Row:
    """A request whose prompt of ``num_tokens`` is computed, and one token after it."""
    index = cache.add(total, method=METHOD, token_budget=None)
    cache.open_chunk(index, 0, num_tokens, step=1)
    row = cache.rows[index]
    row.reads = row.reads._replace(decode_steps=1)
    return row


def fill(cache: KVCache, row: Row) -> torch.Tensor:
    """Write random K and V to all pages of a complete row, those that are full to both tiers; the
    pages (L, H, P, T x 2 x d)."""
    num_pages = -(-row.num_tokens // PAGE)
    slots = cache.tables.slots_of(row.index, 0, num_pages).long()
    pages = torch.randn(*slots.shape, cache.arena.pages_NX.shape[1])
    cache.arena.pages_NX[slots] = pages
    full = row.num_tokens // PAGE
    rows = cache.tables.page_rows(row.index, 0, full)
    cache.pool.pages_RX[rows] = pages[:, :, :full]
    return pages


def bring_back(cache: KVCache, row: Row) -> int:
    """Steps until a row is whole."""
    for step in range(1, 100):
        cache.observe()
        if row.complete:
            return step
    raise AssertionError("it never was")


def assert_in_place(cache: KVCache, row: Row, pages_LHPX: torch.Tensor) -> None:
    """Page i is in slot i of every lane, with its bytes; the partial one is locked."""
    num_blocks = -(-row.num_tokens // 128)
    blocks_LHn = cache.tables.lane_blocks_RLHN[row.index, :, :, :num_blocks].long()
    slots_LHS = slots_of_blocks(blocks_LHn, pages_per_block=4)
    table_LHS = cache.tables.slots_of(row.index, 0, 4 * num_blocks).long()
    assert torch.equal(slots_LHS, table_LHS)
    num_pages = pages_LHPX.shape[2]
    assert torch.equal(cache.arena.pages_NX[slots_LHS[..., :num_pages]], pages_LHPX)
    locked_LHS = cache.arena.slot_step_N[slots_LHS] == LOCKED_STEP
    is_partial = row.num_tokens % PAGE > 0
    assert bool((locked_LHS.sum(-1) == is_partial).all())
    assert bool((locked_LHS[..., num_pages - 1] == is_partial).all())


def select(cache: KVCache, row: Row, pages: Sequence[int], *, step: int) -> None:
    """A decode step in which every lane selects these pages; those that are missing are loaded.
    Only with a partial page, or the step would begin another one."""
    residency = Residency(cache)
    residency.begin(step)
    for layer in range(2):
        residency.bring_in(
            torch.tensor([[pages, pages]], dtype=torch.int32),
            layer=layer,
            rows_B=torch.tensor([row.index], dtype=torch.int32),
            positions_B=torch.tensor([row.num_tokens - 1], dtype=torch.int32),
            max_blocks=row.blocks.most,
        )


def squeeze(cache: KVCache, row: Row) -> None:
    """A newcomer comes, takes what it needs and goes."""
    other = cache.add(1020, method=METHOD, token_budget=None)
    assert not row.complete
    cache.free(other)


@pytest.mark.parametrize("num_tokens", [1000, 992, 897])
def test_what_comes_back_is_what_was_there(make_cache: MakeCache, num_tokens: int) -> None:
    """With a partial page, without one, and with one token in the last block; in slices of a block,
    while steps go on selecting pages."""
    cache = make_cache(lane_blocks=12, num_frames=24, page_size=PAGE, token_budget=256)
    cache._regrowth._slice_blocks = 1
    row = add(cache, num_tokens)
    pages_LHPX = fill(cache, row)
    cache.apply(replace(cache._knobs, hbm_budget=256))
    assert row.num_blocks == 3 and not row.complete
    cache.apply(replace(cache._knobs, hbm_budget=None))
    for step in range(3, 11):
        assert not row.complete
        if num_tokens % PAGE:
            select(cache, row, [step, 27, 3 * step - 9], step=step)
        cache.observe()
    assert row.complete
    assert_in_place(cache, row, pages_LHPX)
    cache.check_integrity()


def test_the_oldest_pages_leave_first(make_cache: MakeCache) -> None:
    """Of a request that is whole no longer. The block that is being filled gives its slots up, but
    for the partial page."""
    cache = make_cache(lane_blocks=10, num_frames=24, page_size=PAGE, token_budget=256)
    row = add(cache, 1000)
    pages_LHPX = fill(cache, row)
    other = cache.add(1020, method=METHOD, token_budget=None)
    assert row.num_blocks == 7, "three for the newcomer, of which two were free"
    hot_LHP = cache.tables.slots_of(row.index, 0, 32) >= 0
    assert hot_LHP.view(4, -1).nonzero()[:, 1].view(4, -1).tolist() == [[*range(1, 28), 31]] * 4
    slots_LH1 = cache.tables.slots_of(row.index, 31, 32).long()
    assert torch.equal(cache.arena.pages_NX[slots_LH1], pages_LHPX[..., 31:, :])
    cache.free(other)


def test_twice_the_watermark_must_be_spare(make_cache: MakeCache) -> None:
    for lane_blocks, comes_back in ((9, False), (10, True)):
        cache = make_cache(
            lane_blocks=lane_blocks, num_frames=24, page_size=PAGE, token_budget=256,
            residency_watermark=0.1,
        )  # fmt: skip
        row = add(cache, 1000)  # eight blocks, and the watermark is one
        squeeze(cache, row)
        for _ in range(3):
            cache.observe()
        assert row.complete == comes_back


def test_pressure_on_the_way_stops_it(make_cache: MakeCache) -> None:
    """And nothing is lost: the tables know where every page is."""
    cache = make_cache(lane_blocks=12, num_frames=24, page_size=PAGE, token_budget=256)
    cache._regrowth._slice_blocks = 1
    row = add(cache, 1000)
    pages_LHPX = fill(cache, row)
    squeeze_to(cache, row, 256)
    for _ in range(3):
        cache.observe()
    assert cache._regrowth.is_at(row)
    other = cache.add(1020, method=METHOD, token_budget=None)
    cache.observe()
    assert not cache._regrowth.is_at(row) and not row.complete
    cache.free(other)
    assert bring_back(cache, row) == 8, "from the beginning"
    assert_in_place(cache, row, pages_LHPX)


def squeeze_to(cache: KVCache, row: Row, hbm_budget: int) -> None:
    cache.apply(replace(cache._knobs, hbm_budget=hbm_budget))
    assert not row.complete
    cache.apply(replace(cache._knobs, hbm_budget=None))


@pytest.mark.parametrize("num_lost", [1, 2, 5])
@pytest.mark.parametrize("num_tokens", [1000, 992, 897])
def test_only_what_was_lost_is_loaded(
    make_cache: MakeCache, num_tokens: int, num_lost: int
) -> None:
    """Of a row that attended in place meanwhile: the blocks it kept are where they were."""
    cache = make_cache(lane_blocks=12, num_frames=24, page_size=PAGE, token_budget=256)
    cache._regrowth._slice_blocks = 3
    row = add(cache, num_tokens)
    pages_LHPX = fill(cache, row)
    squeeze_to(cache, row, 128 * (8 - num_lost))
    hot_LHP = cache.tables.slots_of(row.index, 0, pages_LHPX.shape[2]) >= 0
    before = cache.transfer.h2d.num_bytes
    bring_back(cache, row)
    assert_in_place(cache, row, pages_LHPX)
    num_loaded = (cache.transfer.h2d.num_bytes - before) // cache.geometry.page_bytes
    num_partial = 3 if num_tokens % PAGE else 0  # comes again with each of three slices
    assert 0 < num_loaded <= int((~hot_LHP).sum()) + num_partial * cache.geometry.num_lanes


def test_what_a_step_replaced_is_loaded_again(make_cache: MakeCache) -> None:
    """And a row that was stopped on its way loads nothing twice."""
    cache = make_cache(lane_blocks=12, num_frames=24, page_size=PAGE, token_budget=256)
    cache._regrowth._slice_blocks = 2
    row = add(cache, 1000)
    pages_LHPX = fill(cache, row)
    squeeze_to(cache, row, 640)
    select(cache, row, [0, 5, 30], step=3)
    absent_LHP = cache.tables.slots_of(row.index, 0, 32) < 0
    before = cache.transfer.h2d.num_bytes
    cache.observe()
    cache._regrowth.forget(row)
    bring_back(cache, row)
    assert_in_place(cache, row, pages_LHPX)
    num_loaded = (cache.transfer.h2d.num_bytes - before) // cache.geometry.page_bytes
    num_moved = 3 + 5  # of a lane: the selected ones, and the partial page in each slice
    assert num_loaded <= int(absent_LHP.sum()) + num_moved * cache.geometry.num_lanes


def test_a_budget_in_the_knob_is_not_exceeded(make_cache: MakeCache) -> None:
    cache = make_cache(
        lane_blocks=20, num_frames=24, page_size=PAGE, token_budget=256, hbm_budget=512
    )
    row = add(cache, 1000)
    for _ in range(20):
        cache.observe()
    assert row.num_blocks == 4 and not row.complete


def test_lanes_that_lost_their_balance_come_back_equal(make_cache: MakeCache) -> None:
    cache = make_cache(lane_blocks=12, num_frames=24, page_size=PAGE, token_budget=256)
    row = add(cache, 1000)
    pages_LHPX = fill(cache, row)
    squeeze_to(cache, row, 640)
    counts = torch.tensor([7, 5, 5, 3]).numpy()
    cache._blocks._divide(row, counts)
    bring_back(cache, row)
    assert row.blocks.counts_L.tolist() == [8] * 4
    assert_in_place(cache, row, pages_LHPX)


def test_blocks_lost_and_found_on_the_way_begin_it_anew(make_cache: MakeCache) -> None:
    """Between two looks, in which steps may have taken any slot."""
    cache = make_cache(lane_blocks=12, num_frames=40, page_size=PAGE, token_budget=256)
    cache._regrowth._slice_blocks = 1
    row = add(cache, 1000)
    pages_LHPX = fill(cache, row)
    squeeze_to(cache, row, 256)
    for _ in range(7):
        cache.observe()
    assert cache._regrowth.is_at(row)
    other = cache.add(1020, method=METHOD, token_budget=640)
    assert row.num_blocks < 7
    cache.free(other)
    cache.set_attention(row.index, token_budget=512, is_dense=False)
    assert row.num_blocks == 8
    bring_back(cache, row)
    assert_in_place(cache, row, pages_LHPX)


def test_what_others_cannot_go_without_is_theirs(make_cache: MakeCache) -> None:
    """A dense request early in its life keeps the blocks of its pages to come."""
    cache = make_cache(
        lane_blocks=13, num_frames=40, page_size=PAGE, token_budget=256, residency_watermark=0.0
    )
    row = add(cache, 1000)
    squeeze_to(cache, row, 640)
    cache._blocks._divide(row, np.array([8, 6, 3, 3]))
    index = cache.add(600, method=SparseMethod.DENSE, token_budget=None)
    cache.open_chunk(index, 0, 100, step=2)
    cache.observe()
    assert row.complete and cache.rows[index].num_blocks == 5


@pytest.mark.parametrize(("watermark", "num_blocks"), [(0.0, 8), (0.2, 7), (0.5, 4)])
def test_prompts_stay_whole_above_the_watermark(
    make_cache: MakeCache, watermark: float, num_blocks: int
) -> None:
    """Below it each keeps its even share, which is 4 of 12 blocks for three."""
    cache = make_cache(
        lane_blocks=12, num_frames=40, page_size=PAGE, token_budget=256,
        residency_watermark=watermark,
    )  # fmt: skip
    rows = [cache.add(n, method=METHOD, token_budget=None) for n in (100, 100, 1020)]
    for index in rows[:2]:
        cache.open_chunk(index, 0, 99, step=1)
    cache.open_chunk(rows[2], 0, 1000, step=1)
    row = cache.rows[rows[2]]
    assert row.num_blocks == num_blocks
    assert row.complete == (num_blocks == 8)
    assert all(cache.rows[index].complete for index in rows[:2])


def test_a_prompt_takes_what_is_not_pinned(make_cache: MakeCache) -> None:
    """As far as its even share: pages above a share are good until then."""
    cache = make_cache(lane_blocks=10, num_frames=24, page_size=PAGE, token_budget=256)
    first = add(cache, 1000)
    second = cache.add(1020, method=METHOD, token_budget=None)
    assert (first.num_blocks, cache.rows[second].num_blocks) == (7, 3)
    cache.open_chunk(second, 0, 384, step=2)
    assert (first.num_blocks, cache.rows[second].num_blocks) == (7, 3), "it fits"
    cache.reserve(second, 1000)
    cache.open_chunk(second, 384, 1000, step=3)
    assert (first.num_blocks, cache.rows[second].num_blocks) == (5, 5)
    cache.check_integrity()
