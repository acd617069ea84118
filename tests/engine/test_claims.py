"""What the cache says that requests take: exact for prompts, measured for those that decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsed.core import SparseMethod
from sparsed.engine.hit_curve import START_RATIO
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.row import KNOWN_STEPS, STALE_STEPS, Reads
from sparsed.engine.kvcache.row_meter import BASE_STEPS, EVERY_STEPS
from sparsed.engine.pace import Pace

MakeCache = Callable[..., KVCache]
LANES, PAGES = 4, 4  # of the small cache: lanes of a request, pages of 32 tokens in a block
SELECTED = 256 // 32 - 1


@pytest.fixture
def cache(make_cache: MakeCache) -> KVCache:
    return make_cache(
        lane_blocks=12,
        num_frames=24,
        token_budget=256,
        sparse_method="quest",
        max_model_len=2048,
        residency_watermark=0.5,  # so that nobody comes back whole
    )


def add(cache: KVCache, num_tokens: int = 1000, **values: Any) -> int:
    asked = {"method": SparseMethod.QUEST, "token_budget": None, **values}
    return cache.add(num_tokens, **asked)


def decoded(cache: KVCache, index: int, *, steps: int, window: int, misses: int = 0,
            returns: int = 0) -> None:  # fmt: skip
    """As if the row had selected in so many steps since demand was cleared; counts are of a lane,
    all steps together."""
    row, tables = cache.rows[index], cache.tables
    row.complete = False
    row.reads = Reads(steps, row.steps_measured + steps, 0, 0)
    row.steps_in_row = steps
    tables.window_RLH[index] = window
    tables.demand_RLH2[index] = torch.tensor([misses, returns], dtype=torch.int32)
    for _ in range(2 * EVERY_STEPS):
        cache.observe()


def test_a_prompt_needs_its_mandatory_blocks(cache: KVCache) -> None:
    sparse, dense = add(cache), add(cache, 300, method=SparseMethod.DENSE)
    for index, blocks in ((sparse, 3), (dense, 3)):
        claim = cache.claims.of_row(index)
        assert claim.mandatory_pages == claim.working_set_pages == blocks * PAGES * LANES
    assert [cache.claims.of_row(index).frames for index in (sparse, dense)] == [8, 3]


def test_a_newcomer_is_taken_to_be_like_the_others(cache: KVCache) -> None:
    def working_set() -> float:
        claim = cache.claims.of_request(1000, method=SparseMethod.QUEST, token_budget=None)
        assert claim.mandatory_pages == 3 * PAGES * LANES
        return claim.working_set_pages / (SELECTED * LANES)

    assert working_set() == pytest.approx(START_RATIO)
    index = add(cache)
    for _ in range(40):  # lessons
        decoded(cache, index, steps=64, window=3 * SELECTED, misses=32)
        cache.claims._learn()
    assert working_set() == pytest.approx(3.0, rel=0.02)
    short = cache.claims.of_request(100, method=SparseMethod.QUEST, token_budget=None)
    assert short.working_set_pages == PAGES * LANES, "all of it"


def test_a_window_counts_once_it_is_full(cache: KVCache) -> None:
    index = add(cache)
    learned = START_RATIO * SELECTED * LANES
    decoded(cache, index, steps=KNOWN_STEPS - 1, window=20)
    assert cache.claims.of_row(index).working_set_pages == pytest.approx(learned)
    decoded(cache, index, steps=KNOWN_STEPS, window=20)
    assert cache.claims.of_row(index).working_set_pages == (20 + 1) * LANES, "and the partial page"


def in_place(cache: KVCache, index: int, *, steps: int) -> None:
    """As if the row had attended to everything in so many steps."""
    row = cache.rows[index]
    row.reads = row.reads._replace(decode_steps=row.reads.decode_steps + steps)
    row.steps_in_row = 0
    cache.tables.forget_window(index)
    for _ in range(2 * EVERY_STEPS):
        cache.observe()


def test_a_window_of_long_ago_is_none(cache: KVCache) -> None:
    """Of a row that does not select any more; one of just now is."""
    index = add(cache)
    row, learned = cache.rows[index], START_RATIO * SELECTED * LANES
    decoded(cache, index, steps=KNOWN_STEPS, window=20, misses=KNOWN_STEPS)
    in_place(cache, index, steps=STALE_STEPS)
    assert cache.claims.of_row(index).working_set_pages == (20 + 1) * LANES
    in_place(cache, index, steps=1)
    assert cache.claims.of_row(index).working_set_pages == pytest.approx(learned)
    assert cache.claims.curve(row) == cache.claims.learned.curve(
        slots=row.num_blocks * PAGES * LANES - LANES,
        selected=SELECTED * LANES,
        total=8 * PAGES * LANES,
    )
    before = cache.claims.learned
    cache.claims._learn()
    assert cache.claims.learned == before, "nothing is learned of it either"


def test_a_row_that_selects_again_is_known_once_its_window_is_full(cache: KVCache) -> None:
    index = add(cache)
    row = cache.rows[index]
    decoded(cache, index, steps=KNOWN_STEPS, window=20)
    in_place(cache, index, steps=STALE_STEPS + 1)
    for more, window in ((KNOWN_STEPS - 1, 11), (1, 12)):
        row.reads = row.reads._replace(
            decode_steps=row.reads.decode_steps + more, sparse_steps=row.reads.sparse_steps + more
        )
        row.steps_in_row += more
        cache.tables.window_RLH[index] = window
        for _ in range(2 * EVERY_STEPS):
            cache.observe()
        assert row.is_known == (window == 12)
    assert cache.claims.of_row(index).working_set_pages == (12 + 1) * LANES


def test_a_row_in_place_waits_for_no_page(cache: KVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(cache.claims), "_load_bytes_per_s", 1e6)
    index = add(cache)
    decoded(cache, index, steps=60, window=20, misses=60)
    assert cache.claims.miss_s == pytest.approx(LANES * cache.geometry.page_bytes / 1e6)
    in_place(cache, index, steps=1)
    assert cache.claims.miss_s == 0.0


def test_a_spilled_row_has_no_window(cache: KVCache) -> None:
    index = add(cache)
    decoded(cache, index, steps=KNOWN_STEPS, window=20)
    assert cache.rows[index].has_window
    cache.spill(index, 992)
    assert not cache.rows[index].has_window and cache.rows[index].is_known, "of just now"


def test_misses_are_those_of_a_step_and_survive_a_clearing(cache: KVCache) -> None:
    index = add(cache)
    row = cache.rows[index]
    decoded(cache, index, steps=60, window=20, misses=60, returns=120)
    assert row.use.misses_per_step == pytest.approx(1.0 * LANES)
    assert row.use.returns_per_step == pytest.approx(2.0 * LANES)
    row.steps_measured = row.reads.sparse_steps  # as the rebalancer does
    decoded(cache, index, steps=4, window=20, misses=40)
    expected = (40 + BASE_STEPS * 1.0) / (4 + BASE_STEPS) * LANES
    assert row.use.misses_per_step == pytest.approx(expected)
    slots = row.num_blocks * PAGES * LANES - LANES
    curve = cache.claims.curve(row)
    assert curve.at(slots) == pytest.approx(expected, rel=0.05)
    assert curve.at(2 * slots) < expected < curve.at(slots / 2)


def test_room_is_what_is_left_of_both_tiers_and_of_a_tokens_time(cache: KVCache) -> None:
    assert cache.claims.room(Pace()).slack_pages is None
    add(cache)
    room = cache.claims.room(Pace())
    assert (room.hot_pages, room.free_frames, room.free_rows) == (12 * PAGES * LANES, 16, 3)
    row_bytes = cache.geometry.page_bytes
    rows = torch.arange(64)
    while cache.transfer.h2d[1] < 0.02:
        cache.transfer.load(
            cache.arena.pages_NX, cache.pool.pages_RX, dst_rows=rows + 4, src_rows=rows
        )
    num_bytes, seconds = cache.transfer.h2d
    room = cache.claims.room(Pace(target_s=0.5, step_s=0.1))
    assert room.slack_pages == pytest.approx(0.4 * num_bytes / seconds / row_bytes)


def test_blocks_go_to_those_who_miss_more(cache: KVCache) -> None:
    calm, restless = add(cache, 1500), add(cache, 1500)
    for index, misses in ((calm, 8), (restless, 800)):
        cache.open_chunk(index, 0, 1500, step=0)
        decoded(cache, index, steps=64, window=20, misses=misses, returns=800)
    blocks = [cache.rows[index].num_blocks for index in (calm, restless)]
    assert blocks == [6, 6]
    cache.rebudget()
    assert [cache.rows[index].num_blocks for index in (calm, restless)] == blocks
    cache.observe()
    few, many = (cache.rows[index].num_blocks for index in (calm, restless))
    assert 3 <= few < 6 < many and few + many == 12
    cache.check_integrity()
    cache.apply(cache._knobs.with_values({"hbm_budget": 4 * 128}))
    assert [cache.rows[index].num_blocks for index in (calm, restless)] == [min(few, 4), 4]
    cache.rebudget()
    cache.observe()
    assert cache.rows[restless].num_blocks == 4, "a number in the knob is a bound"
