"""The best pages of each lane from estimated logits, on the device: no sort, no word from the host.

Shape legend: B requests, H KV heads, G query heads per KV head, X columns (pages of all requests),
K selected pages of the lane with most, P pages of a request, W pages of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference_select
from sparsed.kernels.reference_select import COLUMN_ALIGN
from sparsed.kernels.threshold import bisect, page_keys, write_ids

_MAX_TILE = 8192  # pages that a program keeps in registers; of more, it reads the keys anew
_WARP_PAGES = 512
_MIN_WARPS, _MAX_WARPS = 4, 16
_WIDE_REGISTERS = 64  # a thread of the largest program: two of them fit one multiprocessor
_FILL = 1024
_MIN_TILE = 128
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
    """Write the ids of the ``count`` best full pages of every lane, rising, then -1.

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
    max_tile: int = _MAX_TILE,
) -> None:
    num_requests, num_heads, num_selected = out_BHK.shape
    _, group, num_columns = logits_HGX.shape
    tile = min(max(_MIN_TILE, triton.next_power_of_2(max_pages)), max_tile)
    one_tile = max_pages <= tile
    num_warps = min(max(_MIN_WARPS, tile // _WARP_PAGES), _MAX_WARPS)
    # Room for keys that registers cannot hold; where they can, any tensor stands for it.
    keys_HX = logits_HGX if one_tile else out_BHK.new_empty((num_heads, num_columns))
    if num_requests:
        _select_kernel[(num_requests * num_heads,)](
            logits_HGX,
            keys_HX,
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
            PADDED_GROUP=triton.next_power_of_2(group),
            TILE=tile,
            ONE_TILE=one_tile,
            FILL=_FILL,
            ALIGN=COLUMN_ALIGN,
            num_warps=num_warps,
            maxnreg=_WIDE_REGISTERS if num_warps == _MAX_WARPS else None,
            enable_fp_fusion=True,
        )


# No variant is to be compiled while requests wait, whatever the batch and its addresses.
_TABLES = ["first_B", "num_full_B", "count_B", "out_BHK"]
_COUNTS = ["num_columns", "num_selected", "sink_pages", "recent_pages"]


@triton.jit(do_not_specialize=[*_TABLES, *_COUNTS])
def _select_kernel(
    logits_HGX: tl.tensor,
    keys_HX: tl.tensor,
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
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
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
        first = tl.load(first_B + b) // ALIGN * ALIGN
        stride = num_columns // ALIGN * ALIGN
        logits_GP = logits_HGX + head * GROUP * stride + first
        num_keys = tl.cdiv(num_full, ALIGN) * ALIGN
        first_recent = num_full - recent_pages
        if ONE_TILE:
            id_W = tl.arange(0, TILE)
            score_W = _scores(logits_GP, id_W, num_full, num_keys, stride, GROUP)
            keys = page_keys(score_W, id_W, num_full, sink_pages, first_recent)
        else:
            keys = keys_HX + head * stride + first
            _store_keys(
                logits_GP,
                keys,
                num_full,
                num_keys,
                stride,
                sink_pages,
                first_recent,
                GROUP,
                PADDED_GROUP,
                max(1, TILE // PADDED_GROUP),
            )
        num_forced = tl.minimum(sink_pages + recent_pages, num_full)
        last_key, num_last = bisect(keys, num_keys, count, num_forced, GROUP, TILE, ONE_TILE)
        write_ids(keys, num_keys, last_key, num_last, out_K, TILE, ONE_TILE)
    num_chosen = tl.where(choose, count, 0)
    for start in range(0, num_selected, FILL):
        place_W = start + tl.arange(0, FILL)
        id_W = tl.where(place_W < tl.minimum(count, num_full), place_W, -1)
        tl.store(out_K + place_W, id_W, mask=(place_W >= num_chosen) & (place_W < num_selected))


@triton.jit
def _load(
    logits: tl.tensor, id_W: tl.tensor, wanted: tl.tensor, num_full: tl.tensor, num_keys: tl.tensor
) -> tl.tensor:
    """Logits, -inf for what is no page. What lies beyond the last page is read and not used, since
    only a mask of whole groups leaves the reads wide."""
    logits_W = tl.load(logits + id_W, mask=wanted & (id_W < num_keys), other=float("-inf"))
    return tl.where(id_W < num_full, logits_W, float("-inf"))


@triton.jit
def _share(sum_X: tl.tensor) -> tl.tensor:
    """What a weight of 1 is worth; 0 where the sum is not a number or nothing."""
    return tl.where(sum_X > 0.0, 1.0 / tl.where(sum_X > 0.0, sum_X, 1.0), 0.0)


@triton.jit
def _scores(
    logits_GP: tl.tensor,
    id_W: tl.tensor,
    num_full: tl.tensor,
    num_keys: tl.tensor,
    stride: tl.tensor,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """Sums of softmax weights, where one tile holds all pages: every logit is read once."""
    score_W = tl.zeros([id_W.shape[0]], tl.float32)
    ahead_W = _load(logits_GP, id_W, GROUP > 0, num_full, num_keys)
    for g in range(GROUP):
        logit_W = ahead_W
        # The next head's logits travel while this one's are summed.
        logits_GP += stride
        ahead_W = _load(logits_GP, id_W, g + 1 < GROUP, num_full, num_keys)
        weight_W = tl.exp2((logit_W - tl.max(logit_W, axis=0)) * _LOG2_E)
        share = _share(tl.sum(weight_W, axis=0))
        score_W += tl.where(share > 0.0, weight_W * share, 0.0)
    return score_W


@triton.jit
def _store_keys(
    logits_GP: tl.tensor,
    keys_P: tl.tensor,
    num_full: tl.tensor,
    num_keys: tl.tensor,
    stride: tl.tensor,
    sink_pages: tl.int32,
    first_recent: tl.tensor,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Keys of any number of pages, where every logit is read twice."""
    head_G1 = tl.arange(0, PADDED_GROUP)[:, None]
    logits_G1 = logits_GP + head_G1 * stride
    peak_G1, share_G1 = _softmax(
        logits_G1, head_G1 < GROUP, num_full, num_keys, PADDED_GROUP, TILE_COLUMNS
    )
    for start in range(0, num_keys, TILE_COLUMNS):
        id_W = start + tl.arange(0, TILE_COLUMNS)
        logit_GW = _load(logits_G1, id_W[None, :], head_G1 < GROUP, num_full, num_keys)
        weight_GW = tl.exp2((logit_GW - peak_G1) * _LOG2_E) * share_G1
        score_W = tl.sum(tl.where(share_G1 > 0.0, weight_GW, 0.0), axis=0)
        key_W = page_keys(score_W, id_W, num_full, sink_pages, first_recent)
        tl.store(keys_P + id_W, key_W, mask=id_W < num_keys)
    tl.debug_barrier()  # other threads read them


@triton.jit
def _softmax(
    logits_G1: tl.tensor,
    real_G1: tl.tensor,
    num_full: tl.tensor,
    num_keys: tl.tensor,
    PADDED_GROUP: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The peak of each query head, and the share of a page that has it.

    Every place of the tile has a running softmax of its own: no sum over threads before the end.
    """
    peak_GW = tl.full([PADDED_GROUP, TILE_COLUMNS], _LOWEST, tl.float32)
    sum_GW = tl.zeros([PADDED_GROUP, TILE_COLUMNS], tl.float32)
    for start in range(0, num_keys, TILE_COLUMNS):
        id_1W = start + tl.arange(0, TILE_COLUMNS)[None, :]
        logit_GW = _load(logits_G1, id_1W, real_G1, num_full, num_keys)
        rise_GW = logit_GW - peak_GW
        # Of the two weights one is 1: it is the peak's.
        weight_GW = tl.exp2(-tl.abs(rise_GW) * _LOG2_E)
        sum_GW = tl.where(rise_GW > 0.0, sum_GW * weight_GW + 1.0, sum_GW + weight_GW)
        peak_GW = tl.maximum(peak_GW, logit_GW)
    peak_G1 = tl.max(peak_GW, axis=1)[:, None]
    sum_G = tl.sum(sum_GW * tl.exp2((peak_GW - peak_G1) * _LOG2_E), axis=1)
    return peak_G1, _share(sum_G)[:, None]
