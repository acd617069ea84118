"""The residency of selected pages against an exact LRU in plain Python."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsed.core import SparseMethod
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.residency import Residency
from sparsed.kernels.resolve import Resolved

MakeCache = Callable[..., KVCache]
NUM_PAGES = 1024 // 32 - 1  # the last page is partial, and has a slot in every lane
NUM_HEADS = 2


class LaneLru:
    """The pages one lane holds, with the step of their last use."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.used_at: dict[int, int] = {}

    def touch(self, pages: Sequence[int], step: int) -> tuple[set[int], list[int]]:
        """(hits, ages of the pages that must go), the selection being ``pages``."""
        hits = set(pages) & self.used_at.keys()
        others = sorted(at for page, at in self.used_at.items() if page not in hits)
        need = min(len(pages), self.num_slots) - (self.num_slots - len(others))
        return hits, others[: max(0, need)]


class Lanes(NamedTuple):
    """Rows of a cache whose lanes hold nothing yet, and an oracle for each lane of layer 1."""

    cache: KVCache
    residency: Residency
    rows: list[int]
    oracles: list[list[LaneLru]]


def new_lanes(make_cache: MakeCache, blocks_of_row: Sequence[int]) -> Lanes:
    cache = make_cache(lane_blocks=sum(blocks_of_row), num_frames=8 * len(blocks_of_row))
    rows = []
    for blocks in blocks_of_row:
        rows.append(cache.add(blocks * 128, method=SparseMethod.CUBOID_MEAN, token_budget=None))
        row = cache.rows[rows[-1]]  # that has the frames of NUM_PAGES pages, but no more blocks
        row.frames = np.concatenate((row.frames, cache.pool.frames.take(8 - blocks)))
        cache.tables.open(row.index, torch.from_numpy(row.frames))
    oracles = [[LaneLru(4 * blocks - 1) for _ in range(NUM_HEADS)] for blocks in blocks_of_row]
    return Lanes(cache, Residency(cache), rows, oracles)


def resolve(lanes: Lanes, order: Sequence[int], pages_BHK: torch.Tensor, step: int) -> Resolved:
    """Resolve the selections of rows ``order`` in layer 1."""
    lanes.residency.begin(step)
    return lanes.residency.bring_in(
        pages_BHK[list(order)].int(),
        layer=1,
        rows_B=torch.tensor([lanes.rows[i] for i in order], dtype=torch.int32),
        positions_B=torch.full((len(order),), NUM_PAGES * 32 + 5, dtype=torch.int32),
        max_blocks=max(lanes.cache.rows[lanes.rows[i]].num_blocks for i in order),
    )


def resident(lanes: Lanes, row: int, head: int) -> set[int]:
    cache, index = lanes.cache, lanes.rows[row]
    table_P = cache.tables.slots_of(index, 0, NUM_PAGES)[1, head]
    return set((table_P >= 0).nonzero()[:, 0].tolist())


def random_selections(
    num_rows: int, count: int, rng: np.random.Generator
) -> torch.Tensor:  # (B, H, K)
    weights = 1 / (1 + np.arange(NUM_PAGES))
    lanes = range(num_rows * NUM_HEADS)
    rows = [
        rng.choice(NUM_PAGES, size=count, replace=False, p=weights / weights.sum()) for _ in lanes
    ]
    return torch.tensor(np.array(rows)).view(num_rows, NUM_HEADS, count)


@settings(max_examples=60)
@given(
    blocks=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    count=st.integers(1, 14),
    seed=st.integers(0, 999),
)
def test_hits_and_victims_are_those_of_an_exact_lru(
    make_cache: MakeCache, blocks: list[int], count: int, seed: int
) -> None:
    lanes, rng = new_lanes(make_cache, blocks), np.random.default_rng(seed)
    for step in range(1, 25):
        pages_BHK = random_selections(len(blocks), count, rng)
        before_4 = lanes.residency.counters.values_C.clone()
        resolved = resolve(lanes, range(len(blocks)), pages_BHK, step)
        missed = evicted = overflow = 0
        for row, heads in enumerate(lanes.oracles):
            for head, oracle in enumerate(heads):
                pages = pages_BHK[row, head].tolist()
                hits, ages = oracle.touch(pages, step)
                now = resident(lanes, row, head)
                gone = oracle.used_at.keys() - now
                assert hits <= now
                assert not gone & set(pages), "a page of this step was taken"
                assert sorted(oracle.used_at[page] for page in gone) == ages
                assert now - oracle.used_at.keys() <= set(pages)
                assert len(now) <= oracle.num_slots
                placed = resolved.slots_BHK[row, head] >= 0
                assert int(placed.sum()) == min(count, oracle.num_slots)
                missed += count - len(hits)
                evicted += len(gone)
                overflow += max(0, count - oracle.num_slots)
                used = dict.fromkeys(set(pages) & now, step)
                oracle.used_at = {p: at for p, at in oracle.used_at.items() if p in now} | used
        counted = (lanes.residency.counters.values_C - before_4).tolist()
        assert counted == [pages_BHK.numel(), missed, evicted, overflow]


@settings(max_examples=30)
@given(
    blocks=st.lists(st.integers(1, 3), min_size=2, max_size=3),
    count=st.integers(1, 14),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_the_order_of_the_batch_does_not_matter(
    make_cache: MakeCache, blocks: list[int], count: int, seed: int, data: st.DataObject
) -> None:
    first, second = new_lanes(make_cache, blocks), new_lanes(make_cache, blocks)
    rng = np.random.default_rng(seed)
    for step in range(1, 8):
        pages_BHK = random_selections(len(blocks), count, rng)
        order = data.draw(st.permutations(range(len(blocks))))
        expected = resolve(first, range(len(blocks)), pages_BHK, step)
        found = resolve(second, order, pages_BHK, step)
        assert torch.equal(found.slots_BHK, expected.slots_BHK[order])
        assert torch.equal(found.tail_slots_BH, expected.tail_slots_BH[order])
        tables = [lanes.cache.tables.page_slot_MLHP[:-1] for lanes in (first, second)]
        assert torch.equal(*tables)


@pytest.mark.parametrize("num_blocks", [2, 4])
def test_the_hit_ratio_is_that_of_an_ordered_dict(make_cache: MakeCache, num_blocks: int) -> None:
    """An LRU that orders the pages of one step, too, may differ by a few pages, not by more."""
    lanes, rng = new_lanes(make_cache, [num_blocks]), np.random.default_rng(7)
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(NUM_HEADS)]
    hits = expected_hits = 0
    num_steps, count = 400, 6
    for step in range(1, num_steps):
        pages_BHK = random_selections(1, count, rng)
        resolved = resolve(lanes, [0], pages_BHK, step)
        hits += int(resolved.num_hits_BH.sum())
        for head, lru in enumerate(caches):
            expected_hits += use(lru, pages_BHK[0, head].tolist(), num_slots=4 * num_blocks - 1)
    total = num_steps * count * NUM_HEADS
    assert 0.3 < expected_hits / total < 0.95, "a trace that tells policies apart"
    assert abs(hits - expected_hits) < 0.02 * total


def use(lru: OrderedDict[int, None], pages: Sequence[int], *, num_slots: int) -> int:
    """Touch the pages that are there, bring in the others; how many were there."""
    present = [page for page in pages if page in lru]
    for page in present:
        lru.move_to_end(page)
    for page in pages:
        lru[page] = None
    while len(lru) > num_slots:
        lru.popitem(last=False)
    return len(present)


def test_what_is_missing_is_loaded_where_it_is_read(make_cache: MakeCache) -> None:
    lanes = new_lanes(make_cache, [2])
    cache, rows_B = lanes.cache, torch.tensor(lanes.rows)
    cache.pool.pages_RX.copy_(torch.arange(len(cache.pool.pages_RX))[:, None])
    for step, pages in enumerate(([3, 9], [3, 9], [7, 3]), start=1):
        pages_BHK = torch.tensor([[pages, [4, 0]]])
        resolved = resolve(lanes, [0], pages_BHK, step)
        page_rows = cache.tables.selected_page_rows(rows_B, 1, pages_BHK)
        slots = cache.tables.selected_slots(rows_B, 1, pages_BHK)
        assert torch.equal(slots.sort(-1).values, resolved.slots_BHK.sort(-1).values)
        expected = page_rows.float()[..., None].expand(1, 2, 2, cache.arena.pages_NX.shape[1])
        assert torch.equal(cache.arena.pages_NX[slots.long()], expected)
        assert int(resolved.num_misses_1) == (4, 0, 1)[step - 1]
    assert lanes.residency.counters.values_C.tolist() == [12, 5, 0, 0], "two blocks have free slots"


def test_a_lane_without_room_keeps_its_locked_page(make_cache: MakeCache) -> None:
    """Four slots, one locked: of four selected pages one is left to a pass through staging."""
    lanes = new_lanes(make_cache, [1])
    resolved = resolve(lanes, [0], torch.tensor([[[1, 2, 3, 4]] * NUM_HEADS]), 2)
    assert (resolved.slots_BHK >= 0).sum(-1).tolist() == [[3, 3]]
    assert [resident(lanes, 0, head) for head in range(NUM_HEADS)] == [{1, 2, 3}] * 2
    assert lanes.residency.counters.values_C.tolist() == [8, 8, 0, 2]
