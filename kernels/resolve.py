"""Which selected pages are in the hot tier, and slots for those that are not: a bucketed LRU.

Slots to be given away are ranked by *class*: 0 free, 1 last used 63 steps ago or more, ..., 63 last
used one step ago. A class may be cut anywhere, so that nothing is sorted. Class 64, used in this
step, and 65, locked or no slot, are never given away.

Shape legend: B requests, H KV heads, K selected pages of a lane (a lane's program has a tile of
them), R request rows, L layers, F frames of a row, X page rows, N slots of the arena, S slots of a
lane (a tile of them), C classes, M pages to load.
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.core import BLOCK_TOKENS
from sparsed.kernels import reference_resolve
from sparsed.kernels.buckets import (
    NUM_CLASSES,
    USED_CLASS,
    count_classes,
    give_away,
    recent_slots,
    slots_between,
    warm_slots,
)
from sparsed.kernels.tables import LOCKED_STEP, PageTables, check_tables, page_rows

MAX_COLUMNS: Final = 1024
MAX_SLOTS: Final = 1 << 15  # of a lane: two counts of them share an int32
_MAX_TILE = 1024


class Resolved(NamedTuple):
    """What ``resolve_pages`` writes.

    ``slots_BHK`` int32: slots of the hits in the order of their pages, of the misses that got one
    in the order of theirs, then -1. ``num_hits_BH`` int32. ``tail_slots_BH`` int32, -1: none.
    ``miss_dst_M``, ``miss_src_M`` int64: slot and page row of every page to load, room for B * H *
    K; ``num_misses_1`` int32: how many there are. ``window_RLH`` int32: slots of a lane used in the
    last 12 steps, this one included, locked ones left out. ``demand_RLH2`` int32: sums since
    somebody cleared them of pages that a lane missed (served or not), and of hits on pages that it
    did not use in the step before. ``counters_4`` int64: the same of pages selected, pages missed,
    slots taken from another page, and pages (tails included) that found no slot: an error in
    admission.
    """

    slots_BHK: Tensor
    num_hits_BH: Tensor
    tail_slots_BH: Tensor
    miss_dst_M: Tensor
    miss_src_M: Tensor
    num_misses_1: Tensor
    window_RLH: Tensor
    demand_RLH2: Tensor
    counters_4: Tensor


def resolve_pages(
    pages_BHK: Tensor,
    *,
    rows_B: Tensor,
    positions_B: Tensor,
    layer: int,
    tables: PageTables,
    step_1: Tensor,
    page_size: int,
    max_slots: int,
    out: Resolved,
) -> None:
    """Slots for the selected pages of a layer and for the partial page of each of its lanes.

    A page that has a slot is marked as used in this step. One that has none takes a slot of its
    lane: a free one if there is, else one of those not used for longest, by age in steps up to 63;
    among equals the first; never one used in this step, nor a locked one. The partial page
    (position // T) is served first, is locked and is not loaded: one that was begun before its
    request came here must have its slot already. A row of the spare kind gets no slot, and
    changes no table.

    Shapes: pages (B, H, K) int32, contiguous, full pages in any order, none twice, -1 after the
    last; K at most 1,024; rows, positions (B,) int32, no row twice but the spare one; step (1,)
    int32, not negative, above every other step in the tables or equal to it.
    Units: ``page_size`` tokens, 8 to 128; ``max_slots`` slots of a lane that suffice on this host,
    at most 32,768: it shapes the program, all slots are looked at.
    Changes: the tables and ``out``, on the current stream; ``num_misses_1``, ``demand_RLH2`` and
    ``counters_4`` are added to, and cleared by the caller. The order of lanes in the list of misses is free.
    Errors: AssertionError on other shapes or dtypes. What found no slot is counted.
    Source: ours; the buckets are those of SPIN, arXiv 2604.26837, a step wide.
    """
    num_requests, num_heads, num_columns = pages_BHK.shape
    assert pages_BHK.dtype == torch.int32 and pages_BHK.is_contiguous()
    assert 0 < num_columns <= MAX_COLUMNS and 0 < max_slots <= MAX_SLOTS
    assert rows_B.shape == positions_B.shape == (num_requests,) and step_1.numel() == 1
    assert rows_B.dtype == positions_B.dtype == step_1.dtype == torch.int32
    assert rows_B.is_contiguous() and positions_B.is_contiguous()
    assert BLOCK_TOKENS % page_size == 0 and tables.num_blocks_RLH.shape[2] == num_heads
    assert 0 <= layer < tables.num_blocks_RLH.shape[1]
    check_tables(tables)
    _check_out(out, pages_BHK, tables)
    run = _launch if pages_BHK.is_cuda else reference_resolve.resolve_pages
    run(pages_BHK, rows_B, positions_B, layer, tables, step_1, page_size, max_slots, out)


def _check_out(out: Resolved, pages_BHK: Tensor, tables: PageTables) -> None:
    assert out.slots_BHK.shape == pages_BHK.shape
    assert out.num_hits_BH.shape == out.tail_slots_BH.shape == pages_BHK.shape[:2]
    assert out.window_RLH.shape == tables.num_blocks_RLH.shape
    assert out.demand_RLH2.shape == (*tables.num_blocks_RLH.shape, 2)
    assert out.miss_dst_M.shape == out.miss_src_M.shape and out.miss_dst_M.ndim == 1
    assert out.miss_dst_M.numel() >= pages_BHK.numel()
    assert out.num_misses_1.numel() == 1 and out.counters_4.shape == (4,)
    assert all(part.is_contiguous() and part.device == pages_BHK.device for part in out)
    wide = (out.miss_dst_M, out.miss_src_M, out.counters_4)
    for part in out:
        expected = torch.int64 if any(part is one for one in wide) else torch.int32
        assert part.dtype == expected


def _launch(
    pages_BHK: Tensor,
    rows_B: Tensor,
    positions_B: Tensor,
    layer: int,
    tables: PageTables,
    step_1: Tensor,
    page_size: int,
    max_slots: int,
    out: Resolved,
) -> None:
    num_requests, num_heads, num_columns = pages_BHK.shape
    columns = max(32, triton.next_power_of_2(num_columns))
    tile = min(max(NUM_CLASSES, triton.next_power_of_2(max_slots)), _MAX_TILE)
    if num_requests:
        _resolve_kernel[(num_requests * num_heads,)](
            pages_BHK,
            rows_B,
            positions_B,
            step_1,
            *tables,
            *out,
            pages_BHK.new_empty(num_requests * num_heads * (num_columns + 1)),
            layer,
            tables.num_blocks_RLH.shape[1],
            len(tables.frames_RF) - 1,
            tables.frames_RF.shape[1],
            tables.lane_blocks_RLHN.shape[3],
            num_columns,
            NUM_HEADS=num_heads,
            PAGE_SIZE=page_size,
            BLOCK_PAGES=BLOCK_TOKENS // page_size,
            COLUMNS=columns,
            TILE=tile,
            num_warps=4 if max(columns, tile) <= 512 else 8,
            enable_fp_fusion=True,
        )


_LOCKED_STEP = tl.constexpr(LOCKED_STEP)
_USED_CLASS = tl.constexpr(USED_CLASS)
_COUNTS = [
    "layer", "num_layers", "spare_row", "row_frames", "max_blocks", "num_columns",
]  # fmt: skip
# Some are a part of a larger tensor, wherever it begins: a CUDA graph cannot compile a variant.
_VIEWS = [
    "pages_BHK", "rows_B", "positions_B", "step_1", "slots_BHK", "num_hits_BH", "tail_slots_BH",
    "miss_dst_M", "miss_src_M", "num_misses_1", "window_RLH", "demand_RLH2", "counters_4",
]  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_VIEWS)
def _resolve_kernel(
    pages_BHK: tl.tensor,
    rows_B: tl.tensor,
    positions_B: tl.tensor,
    step_1: tl.tensor,
    frames_RF: tl.tensor,
    page_slot_X: tl.tensor,
    lane_blocks_RLHN: tl.tensor,
    num_blocks_RLH: tl.tensor,
    slot_page_N: tl.tensor,
    slot_step_N: tl.tensor,
    slots_BHK: tl.tensor,
    num_hits_BH: tl.tensor,
    tail_slots_BH: tl.tensor,
    miss_dst_M: tl.tensor,
    miss_src_M: tl.tensor,
    num_misses_1: tl.tensor,
    window_RLH: tl.tensor,
    demand_RLH2: tl.tensor,
    counters_4: tl.tensor,
    victims_BHP: tl.tensor,
    layer: tl.int32,
    num_layers: tl.int32,
    spare_row: tl.int32,
    row_frames: tl.int32,
    max_blocks: tl.int32,
    num_columns: tl.int32,
    NUM_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    b, head = tl.program_id(0) // NUM_HEADS, tl.program_id(0) % NUM_HEADS
    row, step = tl.load(rows_B + b).to(tl.int64), tl.load(step_1)
    is_used, tail_page = row < spare_row, tl.load(positions_B + b) // PAGE_SIZE
    k, first = tl.arange(0, COLUMNS), tl.program_id(0).to(tl.int64) * num_columns
    page_K = tl.load(pages_BHK + first + k, mask=k < tl.where(is_used, num_columns, 0), other=-1)
    slots_K, victims_P = slots_BHK + first, victims_BHP + first + tl.program_id(0)
    lane = (row * num_layers + layer) * NUM_HEADS + head
    num_slots = tl.load(num_blocks_RLH + lane, mask=is_used, other=0) * BLOCK_PAGES
    slots = lane_blocks_RLHN + lane * max_blocks, num_slots, slot_step_N, step, BLOCK_PAGES
    place = frames_RF + row * row_frames, layer, num_layers, head, NUM_HEADS, BLOCK_PAGES
    tables = page_slot_X, slot_page_N, slot_step_N
    warm_slots(slot_page_N, slots, TILE)

    row_K, slot_K = _look_up(page_K, page_K >= 0, page_slot_X, place)
    tail_row, tail_slot = _look_up(tail_page, is_used, page_slot_X, place)
    num_returns = _use(slot_K, tail_slot, slot_step_N, step)
    is_miss_K, num_tails = (page_K >= 0) & (slot_K < 0), (is_used & (tail_slot < 0)).to(tl.int32)
    hit_rank_K, miss_rank_K, num_hits, num_misses = _rank(slot_K >= 0, is_miss_K)
    tl.store(slots_K + hit_rank_K, slot_K, mask=slot_K >= 0)
    tl.store(num_hits_BH + tl.program_id(0), num_hits)
    count_C = count_classes(slots, TILE)
    num_wanted = num_misses + num_tails
    num_given = tl.minimum(num_wanted, slots_between(count_C, 0, _USED_CLASS))
    num_placed = tl.maximum(num_given - num_tails, 0)
    if num_given > 0:
        give_away(count_C, num_given, victims_P, slots, TILE)
        tl.debug_barrier()  # the victims, before they are read
        is_placed_K = is_miss_K & (miss_rank_K < num_placed)
        new_slot_K, new_tail_slot, first_miss = _serve(
            (page_K, row_K, is_placed_K, victims_P + num_tails + miss_rank_K, step),
            (tail_page, tail_row, num_given > num_placed, victims_P, _LOCKED_STEP),
            (num_misses_1, num_placed),
            tables,
            place,
        )
        miss_K = first_miss + miss_rank_K
        tl.store(miss_dst_M + miss_K, new_slot_K.to(tl.int64), mask=is_placed_K)
        tl.store(miss_src_M + miss_K, row_K.to(tl.int64), mask=is_placed_K)
        tl.store(slots_K + num_hits + miss_rank_K, new_slot_K, mask=is_placed_K)
        tail_slot = tl.maximum(tail_slot, new_tail_slot)
    tl.store(slots_K + k, -1, mask=(k >= num_hits + num_placed) & (k < num_columns))
    tl.store(tail_slots_BH + tl.program_id(0), tail_slot)
    tl.store(window_RLH + lane, recent_slots(count_C, num_given) + num_placed, mask=is_used)
    _add_demand(demand_RLH2 + lane * 2, num_misses, num_returns)
    _report(counters_4, count_C, num_hits + num_misses, num_misses, num_wanted, num_given)


@triton.jit
def _look_up(
    pages: tl.tensor, wanted: tl.tensor, page_slot_X: tl.tensor, place: tl.tuple
) -> tuple[tl.tensor, tl.tensor]:
    """Page rows, and slots (-1: absent), of many pages or one."""
    rows = page_rows(pages, wanted, *place)
    return rows, tl.load(page_slot_X + rows, mask=wanted, other=-1)


@triton.jit
def _use(
    slot_K: tl.tensor, tail_slot: tl.tensor, slot_step_N: tl.tensor, step: tl.tensor
) -> tl.tensor:
    """Mark the hits as used in this step, the partial page as locked; how many of the hits were
    last used before the step before."""
    last_K = tl.load(slot_step_N + slot_K, mask=slot_K >= 0, other=step)
    num_returns = tl.sum((last_K < step - 1).to(tl.int32), 0)
    tl.debug_barrier()  # the last uses: threads may hold the same column, and one of them stores
    tl.store(slot_step_N + slot_K, step, mask=slot_K >= 0)
    tl.store(slot_step_N + tail_slot, _LOCKED_STEP, mask=tail_slot >= 0)
    tl.debug_barrier()  # what is used now, before any thread looks for victims
    return num_returns


@triton.jit
def _rank(
    is_hit_K: tl.tensor, is_miss_K: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Place of each hit among the hits, of each miss among the misses, and how many there are."""
    both_K = (is_hit_K.to(tl.int32) << 16) + is_miss_K.to(tl.int32)
    before_K, both = tl.cumsum(both_K, 0) - both_K, tl.sum(both_K, 0)
    return before_K >> 16, before_K & 0xFFFF, both >> 16, both & 0xFFFF


@triton.jit
def _serve(
    misses: tl.tuple, tail: tl.tuple, listed: tl.tuple, tables: tl.tuple, place: tl.tuple
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The slots of (pages, page rows, whether they get one, where it is written, step), -1: none;
    and where the list of misses goes on."""
    slot_K, old_page_K = _victims(misses, tables)
    tail_slot, old_tail_page = _victims(tail, tables)
    num_misses_1, num_placed = listed
    first_miss = tl.atomic_add(num_misses_1, num_placed, sem="relaxed")
    tl.debug_barrier()  # the pages that go, before others take their place
    _replace(old_page_K, slot_K, misses, tables, place)
    _replace(old_tail_page, tail_slot, tail, tables, place)
    return slot_K, tail_slot, first_miss


@triton.jit
def _victims(new: tl.tuple, tables: tl.tuple) -> tuple[tl.tensor, tl.tensor]:
    _, _, wanted, slots, _ = new
    _, slot_page_N, _ = tables
    slot = tl.load(slots, mask=wanted, other=-1)
    return slot, tl.load(slot_page_N + slot, mask=wanted, other=-1)


@triton.jit
def _replace(
    old_page: tl.tensor, slot: tl.tensor, new: tl.tuple, tables: tl.tuple, place: tl.tuple
) -> None:
    page, row, wanted, _, step = new
    page_slot_X, slot_page_N, slot_step_N = tables
    old_row = page_rows(old_page, old_page >= 0, *place)
    tl.store(page_slot_X + old_row, -1, mask=old_page >= 0)
    tl.store(page_slot_X + row, slot, mask=wanted)
    tl.store(slot_page_N + slot, page, mask=wanted)
    tl.store(slot_step_N + slot, step, mask=wanted)


@triton.jit
def _add_demand(demand_2: tl.tensor, num_misses: tl.tensor, num_returns: tl.tensor) -> None:
    i = tl.arange(0, 2)
    more_2 = tl.where(i == 0, num_misses, num_returns)
    tl.atomic_add(demand_2 + i, more_2, mask=more_2 > 0, sem="relaxed")


@triton.jit
def _report(
    counters_4: tl.tensor,
    count_C: tl.tensor,
    num_selected: tl.tensor,
    num_misses: tl.tensor,
    num_wanted: tl.tensor,
    num_given: tl.tensor,
) -> None:
    num_evicted = num_given - tl.minimum(num_given, slots_between(count_C, 0, 1))
    i = tl.arange(0, 4)
    sums_4 = tl.where(i == 0, num_selected, tl.where(i == 1, num_misses, num_evicted))
    sums_4 = tl.where(i == 3, num_wanted - num_given, sums_4)
    tl.atomic_add(counters_4 + i, sums_4.to(tl.int64), mask=sums_4 > 0, sem="relaxed")
