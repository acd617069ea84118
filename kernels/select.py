"""The best pages of each lane from logits, on the device: no sort, no word from the host.

Shape legend: B requests, H KV heads, G query heads per KV head, X columns (pages of all requests),
K selected pages of the lane with most, W pages of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference_select
from sparsed.kernels.choose import PIECE, choose, launch_shape
from sparsed.kernels.reference_select import COLUMN_ALIGN


def select_pages(
    logits_HGX: Tensor,
    *,
    first_B: Tensor,
    num_full_B: Tensor,
    count_B: Tensor,
    sink_pages: int,
    recent_pages: int,
    max_pages: int,
    out_BHK: Tensor,
) -> None:
    """Write the ids of the ``count`` best full pages of every lane, in any order, then -1.

    The pages of request b are the columns from ``first`` on, ``num_full`` of them. A page's score
    is the sum of its softmax weights over its G query heads, each over all pages of the request;
    below 2**-40 it counts as 0. Equal scores: the lower id comes first. The first ``sink_pages``
    and the last ``recent_pages`` full pages come before all others (where ``count`` is less than
    these, the lower ids of them are selected). A request with fewer full pages than ``count`` gets
    them all; ``count`` 0 writes -1 everywhere: padding, or a request that selects nothing.

    A query head with a logit of NaN or +inf, or with -inf alone, counts for nothing. Columns of no
    request may hold anything.

    Shapes: logits (H, G, X) float32, contiguous; first, num_full, count (B,) int32, on the logits'
    device; ``first`` and X multiples of 4, num_full at most ``max_pages``, count at most K; out
    (B, H, K) int32, contiguous.
    Units: logits are natural logs, scaled.
    Changes: out, all of it, on the current stream.
    Precision: float32 throughout: pages whose scores differ by less than rounding may change
    places. A request's pages depend on its own logits and on ``max_pages`` alone.
    Errors: AssertionError on other shapes or dtypes, on a negative number of forced pages, and on
    the CPU on a ``first`` or ``num_full`` out of bounds, which the device does not look at.
    Source: ours; pages by the best scores are Quest's, arXiv 2406.10774.
    """
    num_requests, num_heads, num_selected = out_BHK.shape
    assert logits_HGX.dtype == torch.float32 and logits_HGX.is_contiguous()
    assert logits_HGX.ndim == 3 and logits_HGX.shape[0] == num_heads
    assert logits_HGX.shape[2] % COLUMN_ALIGN == 0 and logits_HGX.data_ptr() % 16 == 0
    assert out_BHK.dtype == torch.int32 and out_BHK.is_contiguous() and num_selected > 0
    for part_B in (first_B, num_full_B, count_B):
        assert part_B.shape == (num_requests,) and part_B.dtype == torch.int32
        assert part_B.is_contiguous() and part_B.device == logits_HGX.device
    assert sink_pages >= 0 and recent_pages >= 0 and max_pages > 0
    run = _launch if logits_HGX.is_cuda else reference_select.select_pages
    run(
        logits_HGX,
        first_B=first_B,
        num_full_B=num_full_B,
        count_B=count_B,
        sink_pages=sink_pages,
        recent_pages=recent_pages,
        max_pages=max_pages,
        out_BHK=out_BHK,
    )


def _launch(
    logits_HGX: Tensor,
    *,
    first_B: Tensor,
    num_full_B: Tensor,
    count_B: Tensor,
    sink_pages: int,
    recent_pages: int,
    max_pages: int,
    out_BHK: Tensor,
    max_piece: int = PIECE,
) -> None:
    num_requests, num_heads, num_selected = out_BHK.shape
    if num_requests:
        _select_kernel[(num_requests * num_heads,)](
            logits_HGX,
            first_B,
            num_full_B,
            count_B,
            out_BHK,
            logits_HGX.shape[2],
            num_selected,
            sink_pages,
            recent_pages,
            NUM_HEADS=num_heads,
            ALIGN=COLUMN_ALIGN,
            **launch_shape(max_pages, logits_HGX.shape[1], max_piece=max_piece),
            enable_fp_fusion=True,
        )


# No variant is to be compiled while requests wait, whatever the batch and its addresses.
_TABLES = ["first_B", "num_full_B", "count_B", "out_BHK"]
_COUNTS = ["num_columns", "num_selected", "sink_pages", "recent_pages"]


@triton.jit(do_not_specialize=[*_TABLES, *_COUNTS])
def _select_kernel(
    logits_HGX: tl.tensor,
    first_B: tl.tensor,
    num_full_B: tl.tensor,
    count_B: tl.tensor,
    out_BHK: tl.tensor,
    num_columns: tl.int32,
    num_selected: tl.int32,
    sink_pages: tl.int32,
    recent_pages: tl.int32,
    NUM_HEADS: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
) -> None:
    lane = tl.program_id(0).to(tl.int64)
    b, head = lane // NUM_HEADS, lane % NUM_HEADS
    num_full, count = tl.load(num_full_B + b), tl.minimum(tl.load(count_B + b), num_selected)
    # They are multiples already; now the compiler knows, and reads 16 bytes at once.
    first, stride = tl.load(first_B + b) // ALIGN * ALIGN, num_columns // ALIGN * ALIGN
    head_G1 = tl.arange(0, PADDED_GROUP)[:, None]
    logits_G1 = logits_HGX + (head * GROUP + head_G1) * stride + first
    source = logits_G1, head_G1 < GROUP, num_full
    pages = num_full, count, num_selected, sink_pages, recent_pages
    out_K = out_BHK + lane * num_selected
    choose(_fetch, _logits, source, ALIGN, pages, out_K, GROUP, PADDED_GROUP, PIECE, PIECES)


@triton.jit
def _fetch(
    source: tl.tuple, start: tl.tensor, TILE: tl.constexpr, ALIGN: tl.constexpr
) -> tl.tensor:
    """What lies beyond the last page is read and not used, since only a mask of whole groups leaves
    the reads wide."""
    logits_G1, is_head_G1, num_full = source
    id_1W = start + tl.arange(0, TILE)[None, :]
    is_near_GW = is_head_G1 & (id_1W < tl.cdiv(num_full, ALIGN) * ALIGN)
    return tl.load(logits_G1 + id_1W, mask=is_near_GW, other=float("-inf"))


@triton.jit
def _logits(
    source: tl.tuple,
    read_GW: tl.tensor,
    start: tl.tensor,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
) -> tl.tensor:
    _, _, num_full = source
    id_1W = start + tl.arange(0, TILE)[None, :]
    return tl.where(id_1W < num_full, read_GW, float("-inf"))
