"""Pages that were fetched for a step and not used in it.

Shape legend: L layers, M pages listed of a layer (a tile of them); the rest as in
``kernels.tables``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference_resolve
from sparsed.kernels.tables import PageTables, check_tables

_TILE = 256
_MAX_PROGRAMS = 16  # of a layer: its list is nearly empty, and room for all that it could hold


def count_wasted(
    rows_LM: Tensor, *, counts_L: Tensor, tables: PageTables, step_1: Tensor, out_1: Tensor
) -> None:
    """Count the listed pages that nobody used in this step: those that have another last use, and
    those that lost their slot to a page that was used.

    Shapes: rows (L, M) int64, page rows of full pages, the first ``counts`` (L,) int32 of each
    layer; step (1,) int32, of the selections that are over; out (1,) int64.
    Changes: ``out``, which is added to, on the current stream.
    Errors: AssertionError on other shapes or dtypes.
    Source: ours.
    """
    assert rows_LM.ndim == 2 and counts_L.shape == rows_LM.shape[:1]
    assert rows_LM.dtype == out_1.dtype == torch.int64 and out_1.numel() == step_1.numel() == 1
    assert counts_L.dtype == step_1.dtype == torch.int32
    check_tables(tables)
    for part in (rows_LM, counts_L, step_1, out_1):
        assert part.is_contiguous() and part.device == tables.page_slot_X.device
    run = _launch if rows_LM.is_cuda else reference_resolve.count_wasted
    run(rows_LM, counts_L, tables, step_1, out_1)


def _launch(
    rows_LM: Tensor, counts_L: Tensor, tables: PageTables, step_1: Tensor, out_1: Tensor
) -> None:
    num_layers, num_rows = rows_LM.shape
    programs = min(triton.cdiv(num_rows, _TILE), _MAX_PROGRAMS)
    if rows_LM.numel():
        _wasted_kernel[(num_layers, programs)](
            rows_LM,
            counts_L,
            tables.page_slot_X,
            tables.slot_step_N,
            step_1,
            out_1,
            num_rows,
            TILE=_TILE,
            enable_fp_fusion=True,
        )


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["rows_LM", "counts_L", "step_1", "out_1"],
)
def _wasted_kernel(
    rows_LM: tl.tensor,
    counts_L: tl.tensor,
    page_slot_X: tl.tensor,
    slot_step_N: tl.tensor,
    step_1: tl.tensor,
    out_1: tl.tensor,
    num_rows: tl.int32,
    TILE: tl.constexpr,
) -> None:
    layer, step = tl.program_id(0), tl.load(step_1)
    count, rows_M = tl.load(counts_L + layer), rows_LM + layer.to(tl.int64) * num_rows
    wasted_M = tl.zeros((TILE,), tl.int32)
    for first in range(tl.program_id(1) * TILE, count, tl.num_programs(1) * TILE):
        i = first + tl.arange(0, TILE)
        row_M = tl.load(rows_M + i, mask=i < count, other=0)
        slot_M = tl.load(page_slot_X + row_M, mask=i < count, other=-1)
        last_M = tl.load(slot_step_N + slot_M, mask=slot_M >= 0, other=step - 1)
        wasted_M += ((i < count) & (last_M != step)).to(tl.int32)
    num_wasted = tl.sum(wasted_M, 0)
    if num_wasted > 0:
        tl.atomic_add(out_1, num_wasted.to(tl.int64), sem="relaxed")
