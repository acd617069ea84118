"""Page lists that outlive a step: kept where a lane has ranked its pages, given back where not.

Shape legend: B requests, R rows of the page tables, H KV heads, K selected pages of the lane with
most, C columns of what is kept of a lane.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference_select

_TILE = 512


def keep_pages(
    pages_BHK: Tensor, kept_RHC: Tensor, *, rows_B: Tensor, count_B: Tensor, keeps_B: Tensor
) -> None:
    """Of a request that does not keep, its ``count`` pages go to its row of ``kept``; one that keeps
    gets them from there, and -1 behind them. A count of 0: neither.

    Shapes: pages (B, H, K) int32; kept (R, H, C) int32, C at least every count; rows, count, keeps
    (B,) int32, keeps 0 or 1, rows of counts above 0 different. All contiguous.
    Changes: pages, kept, on the current stream.
    Errors: AssertionError on other shapes or dtypes.
    Source: ours.
    """
    assert pages_BHK.ndim == kept_RHC.ndim == 3 and pages_BHK.shape[1] == kept_RHC.shape[1]
    assert pages_BHK.is_contiguous() and kept_RHC.is_contiguous()
    for part in (pages_BHK, kept_RHC, rows_B, count_B, keeps_B):
        assert part.dtype == torch.int32 and part.device == pages_BHK.device
    for part_B in (rows_B, count_B, keeps_B):
        assert part_B.shape == pages_BHK.shape[:1] and part_B.is_contiguous()
    run = _launch if pages_BHK.is_cuda else reference_select.keep_pages
    run(pages_BHK, kept_RHC, rows_B=rows_B, count_B=count_B, keeps_B=keeps_B)


def _launch(
    pages_BHK: Tensor, kept_RHC: Tensor, *, rows_B: Tensor, count_B: Tensor, keeps_B: Tensor
) -> None:
    num_requests, num_heads, width = pages_BHK.shape
    if pages_BHK.numel():
        _keep_kernel[(num_requests, num_heads)](
            pages_BHK,
            kept_RHC,
            rows_B,
            count_B,
            keeps_B,
            width,
            kept_RHC.shape[2],
            TILE=_TILE,
            num_warps=4,
            enable_fp_fusion=True,
        )


@triton.jit(
    do_not_specialize=["width", "columns"],
    do_not_specialize_on_alignment=["pages_BHK", "kept_RHC", "rows_B", "count_B", "keeps_B"],
)
def _keep_kernel(
    pages_BHK: tl.tensor,
    kept_RHC: tl.tensor,
    rows_B: tl.tensor,
    count_B: tl.tensor,
    keeps_B: tl.tensor,
    width: tl.int32,
    columns: tl.int32,
    TILE: tl.constexpr,
) -> None:
    b, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, keeps = tl.load(rows_B + b).to(tl.int64), tl.load(keeps_B + b)
    count = tl.minimum(tl.load(count_B + b), tl.minimum(width, columns))
    if count > 0:
        pages_K = pages_BHK + (b.to(tl.int64) * num_heads + head) * width
        kept_C = kept_RHC + (row * num_heads + head) * columns
        for first in range(0, width, TILE):
            i = first + tl.arange(0, TILE)
            if keeps > 0:
                found = tl.load(kept_C + i, mask=i < count, other=-1)
                tl.store(pages_K + i, found, mask=i < width)
            else:
                chosen = tl.load(pages_K + i, mask=i < count, other=-1)
                tl.store(kept_C + i, chosen, mask=i < count)
