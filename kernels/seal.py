"""The end of a step: partial pages that it filled become pages as all others.

Shape legend: B requests, M pages to save, I lanes of a tile; the rest as in ``kernels.tables``.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.core import BLOCK_TOKENS
from sparsed.kernels import reference_resolve
from sparsed.kernels.tables import PageTables, check_tables, page_rows

_TILE = 256


class Sealed(NamedTuple):
    """What ``seal_pages`` writes: ``src_M`` slots and ``dst_M`` page rows of the pages to save,
    int64, room for those of all lanes of all requests; ``num_seals_1`` int32, how many."""

    src_M: Tensor
    dst_M: Tensor
    num_seals_1: Tensor


def seal_pages(
    rows_B: Tensor,
    *,
    positions_B: Tensor,
    tables: PageTables,
    step_1: Tensor,
    page_size: int,
    out: Sealed,
) -> None:
    """Unlock the partial pages that this step filled, in every lane, and list them to be saved.

    A page is full if position % T is T - 1. Its slot counts as used in this step, and may be given
    away from the next on: whoever saves the page must have read it before. Pages without a slot
    are left out, as are rows of the spare kind.

    Shapes: rows, positions (B,) int32, no row twice but the spare one; step (1,) int32.
    Units: ``page_size`` tokens, 8 to 128.
    Changes: ``slot_step`` and ``out``, on the current stream; ``num_seals_1`` is added to, and
    cleared by the caller. The list has no order; ``copy_pages`` takes it with its count.
    Errors: AssertionError on other shapes or dtypes.
    Source: ours.
    """
    num_lanes = tables.num_blocks_RLH[0].numel()
    assert positions_B.shape == rows_B.shape and step_1.numel() == 1
    assert rows_B.dtype == positions_B.dtype == step_1.dtype == torch.int32
    assert rows_B.is_contiguous() and positions_B.is_contiguous()
    assert BLOCK_TOKENS % page_size == 0
    assert out.src_M.dtype == out.dst_M.dtype == torch.int64
    assert out.src_M.shape == out.dst_M.shape and out.src_M.numel() >= len(rows_B) * num_lanes
    assert out.num_seals_1.dtype == torch.int32 and out.num_seals_1.numel() == 1
    assert all(part.is_contiguous() and part.device == rows_B.device for part in out)
    check_tables(tables)
    run = _launch if rows_B.is_cuda else reference_resolve.seal_pages
    run(rows_B, positions_B, tables, step_1, page_size, out)


def _launch(
    rows_B: Tensor,
    positions_B: Tensor,
    tables: PageTables,
    step_1: Tensor,
    page_size: int,
    out: Sealed,
) -> None:
    num_rows, num_layers, num_heads = tables.num_blocks_RLH.shape
    if len(rows_B):
        _seal_kernel[(len(rows_B), triton.cdiv(num_layers * num_heads, _TILE))](
            rows_B,
            positions_B,
            step_1,
            tables.frames_RF,
            tables.page_slot_X,
            tables.slot_step_N,
            *out,
            num_layers * num_heads,
            num_rows - 1,
            tables.frames_RF.shape[1],
            PAGE_SIZE=page_size,
            BLOCK_PAGES=BLOCK_TOKENS // page_size,
            TILE=_TILE,
            enable_fp_fusion=True,
        )


@triton.jit(
    do_not_specialize=["num_lanes", "spare_row", "row_frames"],
    do_not_specialize_on_alignment=[
        "rows_B", "positions_B", "step_1", "src_M", "dst_M", "num_seals_1",
    ],
)  # fmt: skip
def _seal_kernel(
    rows_B: tl.tensor,
    positions_B: tl.tensor,
    step_1: tl.tensor,
    frames_RF: tl.tensor,
    page_slot_X: tl.tensor,
    slot_step_N: tl.tensor,
    src_M: tl.tensor,
    dst_M: tl.tensor,
    num_seals_1: tl.tensor,
    num_lanes: tl.int32,
    spare_row: tl.int32,
    row_frames: tl.int32,
    PAGE_SIZE: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row, position = tl.load(rows_B + tl.program_id(0)), tl.load(positions_B + tl.program_id(0))
    if (row >= spare_row) | (position % PAGE_SIZE != PAGE_SIZE - 1):
        return
    page, frames_F = position // PAGE_SIZE, frames_RF + row.to(tl.int64) * row_frames
    lane_I = tl.program_id(1) * TILE + tl.arange(0, TILE)
    # A lane is a layer of one head here, and a frame's pages lie lane by lane.
    row_I = page_rows(page, True, frames_F, 0, num_lanes, lane_I, 1, BLOCK_PAGES)
    slot_I = tl.load(page_slot_X + row_I, mask=lane_I < num_lanes, other=-1)
    is_sealed_I = slot_I >= 0
    tl.store(slot_step_N + slot_I, tl.load(step_1), mask=is_sealed_I)
    place_I, num_seals = tl.cumsum(is_sealed_I.to(tl.int32), 0) - 1, tl.sum(is_sealed_I, 0)
    place_I += tl.atomic_add(num_seals_1, num_seals, sem="relaxed")
    tl.store(src_M + place_I, slot_I.to(tl.int64), mask=is_sealed_I)
    tl.store(dst_M + place_I, row_I.to(tl.int64), mask=is_sealed_I)
