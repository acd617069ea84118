"""The best pages of each lane from estimated logits, on the device: no sort, no word from the host.

A lane's program keeps the scores of all its pages in registers, in pieces, of which it computes
those that the request has.

Shape legend: B requests, H KV heads, G query heads per KV head, X columns (pages of all requests),
K selected pages of the lane with most, W pages of a piece (of a tile of logits: several).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference_select
from sparsed.kernels.reference_select import COLUMN_ALIGN
from sparsed.kernels.threshold import find_threshold, page_keys, write_ids

_MIN_PIECE, _PIECE = 128, 1024
_MAX_PIECES = 16  # of more pages, the pieces are larger
_WARP_PAGES = 128  # of a piece: four of each thread
_WARP_LOGITS = 1024  # of a tile: 32 of each thread
_MAX_WARPS = 16
_FILL = 1024
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1e30)  # no logit comes near, and unlike -inf it is a number


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
    max_piece: int = _PIECE,
) -> None:
    num_requests, num_heads, num_selected = out_BHK.shape
    _, group, num_columns = logits_HGX.shape
    piece = min(max(_MIN_PIECE, triton.next_power_of_2(max_pages)), max_piece)
    piece = max(piece, triton.next_power_of_2(triton.cdiv(max_pages, _MAX_PIECES)))
    num_warps = min(max(1, piece // _WARP_PAGES), _MAX_WARPS)
    padded_group = triton.next_power_of_2(group)
    if num_requests:
        _select_kernel[(num_requests * num_heads,)](
            logits_HGX,
            first_B,
            num_full_B,
            count_B,
            out_BHK,
            num_columns,
            num_selected,
            sink_pages,
            recent_pages,
            NUM_HEADS=num_heads,
            GROUP=group,
            PADDED_GROUP=padded_group,
            COLUMNS=max(_MIN_PIECE, num_warps * _WARP_LOGITS // padded_group),
            PIECE=piece,
            PIECES=triton.cdiv(max_pages, piece),
            FILL=_FILL,
            ALIGN=COLUMN_ALIGN,
            num_warps=num_warps,
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
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    FILL: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    lane = tl.program_id(0).to(tl.int64)
    b, head = lane // NUM_HEADS, lane % NUM_HEADS
    num_full = tl.load(num_full_B + b)
    count = tl.minimum(tl.load(count_B + b), num_selected)
    out_K = out_BHK + lane * num_selected
    choose = (count > 0) & (num_full > count)
    if choose:
        # They are multiples already; now the compiler knows, and reads 16 bytes at once.
        first, stride = tl.load(first_B + b) // ALIGN * ALIGN, num_columns // ALIGN * ALIGN
        logits = logits_HGX + head * GROUP * stride + first, stride, num_full, ALIGN
        softmax = _softmax(logits, GROUP, PADDED_GROUP, COLUMNS)
        forced = sink_pages, num_full - recent_pages
        keys = ()
        for i in tl.static_range(PIECES):
            if i * PIECE < num_full:
                key_W = _keys(i * PIECE, logits, softmax, forced, GROUP, PADDED_GROUP, PIECE)
            else:
                key_W = tl.full([PIECE], -1, tl.int32)
            keys = keys + (key_W,)  # noqa: RUF005  # the compiler knows no unpacking
        num_forced = tl.minimum(sink_pages + recent_pages, num_full)
        threshold = find_threshold(keys, count, num_full, num_forced, GROUP, PIECE, PIECES)
        write_ids(keys, threshold, count, out_K, PIECE, PIECES)
    num_chosen = tl.where(choose, count, 0)
    for start in range(0, num_selected, FILL):
        place_W = start + tl.arange(0, FILL)
        id_W = tl.where(place_W < tl.minimum(count, num_full), place_W, -1)
        tl.store(out_K + place_W, id_W, mask=(place_W >= num_chosen) & (place_W < num_selected))


@triton.jit
def _load(logits: tl.tensor, ids: tl.tensor, wanted: tl.tensor, of: tl.tuple) -> tl.tensor:
    """Logits, -inf for what is no page. What lies beyond the last page is read and not used, since
    only a mask of whole groups leaves the reads wide."""
    _, _, num_full, align = of
    is_near = wanted & (ids < tl.cdiv(num_full, align) * align)
    found = tl.load(logits + ids, mask=is_near, other=float("-inf"))
    return tl.where(ids < num_full, found, float("-inf"))


@triton.jit
def _softmax(
    logits: tl.tuple, GROUP: tl.constexpr, PADDED_GROUP: tl.constexpr, COLUMNS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The peak of each query head, and the share of a page that has it (0 where the sum is not a
    number or nothing), both (G,).

    Every place of the tile has a running softmax of its own: no sum over threads before the end.
    """
    logits_GP, stride, num_full, _ = logits
    head_G1 = tl.arange(0, PADDED_GROUP)[:, None]
    logits_G1 = logits_GP + head_G1 * stride
    peak_GW = tl.full([PADDED_GROUP, COLUMNS], _LOWEST, tl.float32)
    sum_GW = tl.zeros([PADDED_GROUP, COLUMNS], tl.float32)
    for start in range(0, num_full, COLUMNS):
        id_1W = start + tl.arange(0, COLUMNS)[None, :]
        logit_GW = _load(logits_G1, id_1W, head_G1 < GROUP, logits)
        rise_GW = logit_GW - peak_GW
        # Of the two weights one is 1: it is the peak's.
        weight_GW = tl.exp2(-tl.abs(rise_GW) * _LOG2_E)
        sum_GW = tl.where(rise_GW > 0.0, sum_GW * weight_GW + 1.0, sum_GW + weight_GW)
        peak_GW = tl.maximum(peak_GW, logit_GW)
    peak_G = tl.max(peak_GW, axis=1)
    sum_G = tl.sum(sum_GW * tl.exp2((peak_GW - peak_G[:, None]) * _LOG2_E), axis=1)
    return peak_G, tl.where(sum_G > 0.0, 1.0 / tl.where(sum_G > 0.0, sum_G, 1.0), 0.0)


@triton.jit
def _keys(
    start: tl.constexpr,
    logits: tl.tuple,
    softmax: tl.tuple,
    forced: tl.tuple,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PIECE: tl.constexpr,
) -> tl.tensor:
    """Keys of the pages from ``start`` on, in the order of the sums of their softmax weights."""
    logits_GP, stride, num_full, _ = logits
    peak_G, share_G = softmax
    id_W, heads = start + tl.arange(0, PIECE), tl.arange(0, PADDED_GROUP)
    score_W = tl.zeros([PIECE], tl.float32)
    for g in tl.static_range(GROUP):
        logit_W = _load(logits_GP + g * stride, id_W, PIECE > 0, logits)
        peak = tl.sum(tl.where(heads == g, peak_G, 0.0), axis=0)
        share = tl.sum(tl.where(heads == g, share_G, 0.0), axis=0)
        weight_W = tl.exp2((logit_W - peak) * _LOG2_E) * share
        score_W += tl.where(share > 0.0, weight_W, 0.0)
    return page_keys(score_W, id_W, num_full, *forced)
