"""Page arithmetic at every page size: aligned, disjoint, inside the pool."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsed.core import BLOCK_TOKENS, DTYPE_BYTES, PAGE_SIZES, SparseMethod
from sparsed.engine.kvcache.geometry import Geometry, num_frames
from sparsed.engine.kvcache.hbm import slots_of_blocks
from sparsed.engine.kvcache.tables import PageTables

geometries = st.builds(
    Geometry,
    num_layers=st.integers(1, 5),
    num_kv_heads=st.integers(1, 4),
    head_dim=st.sampled_from((8, 16, 80, 128)),
    page_size=st.sampled_from(PAGE_SIZES),
    element_bytes=st.sampled_from(sorted(set(DTYPE_BYTES.values()))),
)


@given(geometry=geometries)
def test_pages_tile_blocks_and_blocks_tile_frames(geometry: Geometry) -> None:
    assert geometry.page_bytes == geometry.page_size * 2 * geometry.head_dim * (
        geometry.element_bytes
    )
    assert geometry.page_bytes % 16 == 0, "vector loads need aligned pages"
    assert geometry.page_size * geometry.pages_per_block == BLOCK_TOKENS
    assert geometry.frame_bytes == geometry.page_rows_per_frame * geometry.page_bytes
    assert geometry.frame_bytes == geometry.num_lanes * geometry.block_bytes
    assert geometry.summary_bytes_per_frame(SparseMethod.DENSE) == 0
    summaries = geometry.summary_bytes_per_frame(SparseMethod.QUEST)
    assert summaries * geometry.page_size == geometry.frame_bytes
    summaries = geometry.summary_bytes_per_frame(SparseMethod.MEAN_KEY)
    lane_bytes = geometry.pages_per_block * (-(-min(40, geometry.head_dim) // 8) * 4 + 2)
    assert 0 <= summaries - geometry.num_lanes * lane_bytes < 4 * geometry.num_lanes
    assert summaries % (4 * geometry.num_lanes) == 0, "whole words"


@given(geometry=geometries, num_tokens=st.integers(0, 10**7))
def test_frames_and_pages_cover_the_tokens(geometry: Geometry, num_tokens: int) -> None:
    frames = num_frames(num_tokens)
    assert frames == ceil(num_tokens / BLOCK_TOKENS)
    pages = geometry.max_pages(num_tokens)
    assert 0 <= pages * geometry.page_size - num_tokens < BLOCK_TOKENS
    assert pages * geometry.page_size == frames * BLOCK_TOKENS


@given(
    num_blocks=st.integers(1, 20), pages_per_block=st.sampled_from((1, 2, 4, 8, 16)), data=st.data()
)
def test_slots_of_blocks_are_disjoint_and_whole(
    num_blocks: int, pages_per_block: int, data: st.DataObject
) -> None:
    blocks = torch.tensor(data.draw(st.permutations(range(num_blocks))))
    slots = slots_of_blocks(blocks, pages_per_block=pages_per_block)
    assert sorted(slots.tolist()) == list(range(num_blocks * pages_per_block))
    assert torch.equal(slots // pages_per_block, blocks.repeat_interleave(pages_per_block))
    grid = slots_of_blocks(blocks.view(1, -1), pages_per_block=pages_per_block)
    assert torch.equal(grid, slots.view(1, -1)), "leading dimensions stay"


def _tables(geometry: Geometry, frames_of_row: list[list[int]], *, pool_frames: int) -> PageTables:
    num_tokens = max(map(len, frames_of_row)) * BLOCK_TOKENS
    tables = PageTables(
        geometry,
        num_rows=len(frames_of_row),
        max_model_len=num_tokens,
        pool_frames=pool_frames,
        device=torch.device("cpu"),
    )
    for row, frames in enumerate(frames_of_row):
        tables.open(row, torch.tensor(frames))
    return tables


@settings(max_examples=40)
@given(geometry=geometries, lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
       spare=st.integers(0, 3), data=st.data())  # fmt: skip
def test_page_rows_never_overlap_and_stay_in_the_pool(
    geometry: Geometry, lengths: list[int], spare: int, data: st.DataObject
) -> None:
    total = sum(lengths) + spare
    ids = data.draw(st.permutations(range(total)))
    frames = [[ids.pop() for _ in range(length)] for length in lengths]
    tables = _tables(geometry, frames, pool_frames=total)
    pages = [length * geometry.pages_per_block for length in lengths]
    rows = torch.cat([tables.page_rows(i, 0, count).flatten() for i, count in enumerate(pages)])
    assert len(rows.unique()) == len(rows) == sum(lengths) * geometry.page_rows_per_frame
    assert rows.min() >= 0
    assert rows.max() < total * geometry.page_rows_per_frame


@settings(max_examples=40)
@given(geometry=geometries, frames=st.permutations(range(6)), data=st.data())
def test_every_way_to_a_page_row_is_the_layout(
    geometry: Geometry, frames: list[int], data: st.DataObject
) -> None:
    tables = _tables(geometry, [frames[:3], frames[3:]], pool_frames=6)
    layer = data.draw(st.integers(0, geometry.num_layers - 1))
    head = data.draw(st.integers(0, geometry.num_kv_heads - 1))
    page = data.draw(st.integers(0, 3 * geometry.pages_per_block - 1))
    row = data.draw(st.integers(0, 1))
    frame = frames[3 * row + page * geometry.page_size // BLOCK_TOKENS]
    lane = layer * geometry.num_kv_heads + head
    block = frame * geometry.num_lanes + lane  # [frame][layer][KV head][128 tokens]
    expected = block * geometry.pages_per_block + page % geometry.pages_per_block
    assert tables.page_rows(row, page, page + 1)[layer, head, 0] == expected
    rows_B = torch.tensor([row])
    pages_BHK = torch.full((1, geometry.num_kv_heads, 1), page)
    assert tables.selected_page_rows(rows_B, layer, pages_BHK)[0, head, 0] == expected
    assert tables.page_rows_at(rows_B, torch.tensor([page]))[0, layer, head] == expected
    tables.page_slot_X[expected] = 77
    assert tables.selected_slots(rows_B, layer, pages_BHK)[0, head, 0] == 77


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_offsets_beyond_32_bits(page_size: int) -> None:
    """A pool of 512 GiB: page rows and their byte offsets need 64 bits."""
    geometry = Geometry(
        num_layers=32, num_kv_heads=8, head_dim=128, page_size=page_size, element_bytes=2
    )
    last = 2**39 // geometry.frame_bytes - 1
    tables = _tables(geometry, [[0, last]], pool_frames=1)  # addresses alone, no room for slots
    first_page, last_page = geometry.pages_per_block, 2 * geometry.pages_per_block
    rows = tables.page_rows(0, first_page, last_page)
    assert rows.dtype == torch.int64
    assert int(rows.max() + 1) * geometry.page_bytes == 2**39


@settings(max_examples=20)
@given(
    geometry=geometries,
    num_rows=st.integers(1, 3),
    num_tokens=st.integers(1, 1000),
    pool_frames=st.integers(1, 20),
)
def test_tables_take_the_bytes_that_are_planned(
    geometry: Geometry, num_rows: int, num_tokens: int, pool_frames: int
) -> None:
    tables = PageTables(
        geometry,
        num_rows=num_rows,
        max_model_len=num_tokens,
        pool_frames=pool_frames,
        device=torch.device("cpu"),
    )
    parts = (
        tables.frames_RF, tables.page_slot_X, tables.lane_blocks_RLHN, tables.num_blocks_RLH,
        tables.demand_RLH2,
    )  # fmt: skip
    assert all(part.dtype == torch.int32 for part in parts)
    made = sum(part.nbytes for part in parts)
    assert made == geometry.table_bytes(num_rows, num_tokens, pool_frames=pool_frames)


@pytest.mark.parametrize(("page_size", "least"), [(8, 15), (16, 10), (32, 6)])
def test_tables_grow_with_the_tokens_there_are(page_size: int, least: int) -> None:
    """Room for 32 requests of 128k, a pool for a mean of 8k: against tables of every request's
    pages and slots as they might at most be, four bytes each."""
    geometry = Geometry(
        num_layers=32, num_kv_heads=8, head_dim=128, page_size=page_size, element_bytes=2
    )
    rows, longest = 32, 128 << 10
    pool_frames = num_frames(rows * (8 << 10))
    flat_pages = rows * geometry.num_lanes * geometry.max_pages(longest) * 4
    flat_bytes = 2 * flat_pages + rows * num_frames(longest) * 8
    assert geometry.table_bytes(rows, longest, pool_frames=pool_frames) < flat_bytes / least
    segments = pool_frames * geometry.table_bytes_per_frame + rows * num_frames(longest) * 4
    assert segments < flat_pages / 15, "the page table alone, with its directory"
