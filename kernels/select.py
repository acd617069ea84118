"""The best pages of each lane from logits, on the device: no sort, no word from the host.

Whoever writes logits also leaves, of every tile of them and every query head, the peak and the sum
of weights against it. A lane's program keeps the keys of all its pages in registers, in pieces, of
which it computes those that the request has.

Shape legend: B requests, H KV heads, G query heads per KV head, P columns of pages of a request, K
selected pages of the lane with most, S tiles of a request, W pages of a tile or of a piece.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference_select
from sparsed.kernels.reference_select import COLUMN_ALIGN
from sparsed.kernels.threshold import find_threshold, page_keys, write_ids

TILE_PAGES: Final = 512
_MIN_PIECE, _PIECE = 128, 1024
_MAX_PIECES: Final = 16  # of more pages, the pieces are larger
_WARP_PAGES: Final = 128  # of a piece: four of each thread
_MAX_WARPS: Final = 16
_LOG2_E = tl.constexpr(1.4426950408889634)


def select_pages(
    logits_BHGP: Tensor,
    *,
    num_full_B: Tensor,
    count_B: Tensor,
    sink_pages: int,
    recent_pages: int,
    out_BHK: Tensor,
) -> None:
    """Write the ids of the ``count`` best full pages of every lane, in any order, then -1.

    A page's score is the sum of its softmax weights over its G query heads, each over all pages of
    the request; below 2**-40 it counts as 0. Equal scores: the lower id comes first. The first
    ``sink_pages`` and the last ``recent_pages`` full pages come before all others (where ``count``
    is less than these, the lower ids of them are selected). A request with fewer full pages than
    ``count`` gets them all; ``count`` 0 writes -1 everywhere: padding, or a request that selects
    nothing.

    A query head with a logit of NaN or +inf, or with -inf alone, counts for nothing. Columns from
    ``num_full`` on may hold anything.

    Shapes: logits (B, H, G, P) float32, contiguous, P a multiple of 4; num_full, count (B,) int32,
    on the logits' device, num_full at most P, count at most K; out (B, H, K) int32, contiguous.
    Units: logits are natural logs, scaled.
    Changes: out, all of it, on the current stream.
    Precision: float32 throughout: pages whose scores differ by less than rounding may change
    places. A request's pages depend on its own logits and on P alone.
    Errors: AssertionError on other shapes or dtypes, on a negative number of forced pages, and on
    the CPU on a ``num_full`` out of bounds, which the device does not look at.
    Source: ours; pages by the best scores are Quest's, arXiv 2406.10774.
    """
    num_requests, num_heads, num_selected = out_BHK.shape
    assert logits_BHGP.dtype == torch.float32 and logits_BHGP.is_contiguous()
    assert logits_BHGP.ndim == 4 and logits_BHGP.shape[:2] == (num_requests, num_heads)
    assert logits_BHGP.shape[3] % COLUMN_ALIGN == 0 and logits_BHGP.data_ptr() % 16 == 0
    assert out_BHK.dtype == torch.int32 and out_BHK.is_contiguous() and num_selected > 0
    for part_B in (num_full_B, count_B):
        assert part_B.shape == (num_requests,) and part_B.dtype == torch.int32
        assert part_B.is_contiguous() and part_B.device == logits_BHGP.device
    assert sink_pages >= 0 and recent_pages >= 0
    run = _launch if logits_BHGP.is_cuda else reference_select.select_pages
    run(
        logits_BHGP,
        num_full_B=num_full_B,
        count_B=count_B,
        sink_pages=sink_pages,
        recent_pages=recent_pages,
        out_BHK=out_BHK,
    )


def _launch(
    logits_BHGP: Tensor,
    *,
    num_full_B: Tensor,
    count_B: Tensor,
    sink_pages: int,
    recent_pages: int,
    out_BHK: Tensor,
    max_piece: int = _PIECE,
) -> None:
    num_requests, num_heads, group, columns = logits_BHGP.shape
    stats_BHS2G = make_stats(logits_BHGP)
    if num_requests:
        _stats_kernel[(num_requests * num_heads, stats_BHS2G.shape[2])](
            logits_BHGP,
            num_full_B,
            stats_BHS2G,
            columns,
            NUM_HEADS=num_heads,
            GROUP=group,
            PADDED_GROUP=triton.next_power_of_2(group),
            TILE=TILE_PAGES,
            ALIGN=COLUMN_ALIGN,
            enable_fp_fusion=True,
        )
    launch_select(
        logits_BHGP,
        stats_BHS2G,
        num_full_B=num_full_B,
        count_B=count_B,
        sink_pages=sink_pages,
        recent_pages=recent_pages,
        out_BHK=out_BHK,
        max_piece=max_piece,
    )


def make_stats(logits_BHGP: Tensor) -> Tensor:
    """Room for what ``store_stats`` leaves of every tile: (B, H, S, 2, padded G)."""
    num_requests, num_heads, group, columns = logits_BHGP.shape
    shape = (triton.cdiv(columns, TILE_PAGES), 2, triton.next_power_of_2(group))
    return logits_BHGP.new_empty((num_requests, num_heads, *shape))


def launch_select(
    logits_BHGP: Tensor,
    stats_BHS2G: Tensor,
    *,
    num_full_B: Tensor,
    count_B: Tensor,
    sink_pages: int,
    recent_pages: int,
    out_BHK: Tensor,
    max_piece: int = _PIECE,
) -> None:
    """``select_pages`` on a device, of logits whose tiles have been summed."""
    num_requests, num_heads, group, columns = logits_BHGP.shape
    tiles, _, padded_group = stats_BHS2G.shape[2:]
    piece = min(max(_MIN_PIECE, triton.next_power_of_2(columns)), max_piece)
    piece = max(piece, triton.next_power_of_2(triton.cdiv(columns, _MAX_PIECES)))
    if num_requests:
        _select_kernel[(num_requests * num_heads,)](
            logits_BHGP,
            stats_BHS2G,
            num_full_B,
            count_B,
            out_BHK,
            columns,
            tiles,
            out_BHK.shape[2],
            sink_pages,
            recent_pages,
            NUM_HEADS=num_heads,
            GROUP=group,
            PADDED_GROUP=padded_group,
            TILE=TILE_PAGES,
            TILES=triton.next_power_of_2(tiles),
            PIECE=piece,
            PIECES=triton.cdiv(columns, piece),
            ALIGN=COLUMN_ALIGN,
            num_warps=min(max(1, piece // _WARP_PAGES), _MAX_WARPS),
            enable_fp_fusion=True,
        )


# No variant is to be compiled while requests wait, whatever the batch and its addresses.
_TABLES = ["num_full_B", "count_B", "out_BHK"]


@triton.jit(do_not_specialize=["columns", *_TABLES])
def _stats_kernel(
    logits_BHGP: tl.tensor,
    num_full_B: tl.tensor,
    stats_BHS2G: tl.tensor,
    columns: tl.int32,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    lane, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_full = tl.load(num_full_B + lane // NUM_HEADS)
    if tile * TILE >= num_full:
        return
    head_G1 = tl.arange(0, PADDED_GROUP)[:, None]
    logits_G1 = logits_BHGP + (lane * GROUP + head_G1) * (columns // ALIGN * ALIGN)
    id_1W = tile * TILE + tl.arange(0, TILE)[None, :]
    logit_GW = _load(logits_G1, id_1W, head_G1 < GROUP, num_full, ALIGN)
    store_stats(logit_GW, stats_BHS2G + (lane * tl.num_programs(1) + tile) * 2 * PADDED_GROUP)


@triton.jit
def store_stats(logit_GW: tl.tensor, stats_2G: tl.tensor) -> None:
    """The peak of each query head in a tile, and the sum of the weights against it. Logits of what
    is no page, and of no head, are -inf."""
    groups = tl.arange(0, logit_GW.shape[0])
    peak_G = tl.max(logit_GW, axis=1)
    base_G = tl.where(peak_G == float("-inf"), 0.0, peak_G)
    sum_G = tl.sum(tl.exp2((logit_GW - base_G[:, None]) * _LOG2_E), axis=1)
    tl.store(stats_2G + groups, peak_G)
    tl.store(stats_2G + logit_GW.shape[0] + groups, sum_G)


@triton.jit(
    do_not_specialize=[
        "columns", "tiles", "num_selected", "sink_pages", "recent_pages", *_TABLES,
    ]
)  # fmt: skip
def _select_kernel(
    logits_BHGP: tl.tensor,
    stats_BHS2G: tl.tensor,
    num_full_B: tl.tensor,
    count_B: tl.tensor,
    out_BHK: tl.tensor,
    columns: tl.int32,
    tiles: tl.int32,
    num_selected: tl.int32,
    sink_pages: tl.int32,
    recent_pages: tl.int32,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    lane = tl.program_id(0).to(tl.int64)
    num_full = tl.load(num_full_B + lane // NUM_HEADS)
    count = tl.minimum(tl.load(count_B + lane // NUM_HEADS), num_selected)
    out_K, num_chosen = out_BHK + lane * num_selected, 0
    if (count > 0) & (num_full > count):
        stats = stats_BHS2G + lane * tiles * (2 * PADDED_GROUP)
        peak_G, share_G = _softmax(stats, tl.cdiv(num_full, TILE), PADDED_GROUP, TILES)
        # A multiple already; now the compiler knows, and reads 16 bytes at once.
        stride = columns // ALIGN * ALIGN
        logits_GP = logits_BHGP + lane * GROUP * stride
        keys = ()
        for i in tl.static_range(PIECES):
            if i * PIECE < num_full:
                id_W = i * PIECE + tl.arange(0, PIECE)
                score_W = tl.zeros([PIECE], tl.float32)
                for g in tl.static_range(GROUP):
                    logit_W = _load(logits_GP + g * stride, id_W, GROUP > 0, num_full, ALIGN)
                    score_W += _weights(logit_W, peak_G, share_G, g)
                key_W = page_keys(score_W, id_W, num_full, sink_pages, num_full - recent_pages)
            else:
                key_W = tl.full([PIECE], -1, tl.int32)
            # Triton compiles no star, which RUF005 asks for. The loop is unrolled, so the tuple has
            # another type each time round, which mypy takes for an error.
            keys = keys + (key_W,)  # type: ignore[assignment]  # noqa: RUF005
        num_forced = tl.minimum(sink_pages + recent_pages, num_full)
        threshold = find_threshold(keys, count, num_full, num_forced, GROUP, PIECE, PIECES)
        write_ids(keys, threshold, count, out_K, PIECE, PIECES)
        num_chosen = count
    for start in range(0, num_selected, PIECE):
        place_W = start + tl.arange(0, PIECE)
        id_W = tl.where(place_W < tl.minimum(count, num_full), place_W, -1)
        tl.store(out_K + place_W, id_W, mask=(place_W >= num_chosen) & (place_W < num_selected))


@triton.jit
def _load(
    logits: tl.tensor, ids: tl.tensor, wanted: tl.tensor, num_full: tl.tensor, ALIGN: tl.constexpr
) -> tl.tensor:
    """Logits, -inf for what is no page. What lies beyond the last page is read and not used, since
    only a mask of whole groups leaves the reads wide."""
    is_near = wanted & (ids < tl.cdiv(num_full, ALIGN) * ALIGN)
    found = tl.load(logits + ids, mask=is_near, other=float("-inf"))
    return tl.where(ids < num_full, found, float("-inf"))


@triton.jit
def _weights(
    logit_W: tl.tensor, peak_G: tl.tensor, share_G: tl.tensor, g: tl.constexpr
) -> tl.tensor:
    """Softmax weights of one query head; a head whose sum is not a number counts for nothing."""
    is_head_G = tl.arange(0, peak_G.shape[0]) == g
    peak = tl.sum(tl.where(is_head_G, peak_G, 0.0), axis=0)
    share = tl.sum(tl.where(is_head_G, share_G, 0.0), axis=0)
    return tl.where(share > 0.0, tl.exp2((logit_W - peak) * _LOG2_E) * share, 0.0)


@triton.jit
def _softmax(
    stats_S2G: tl.tensor, num_tiles: tl.tensor, PADDED_GROUP: tl.constexpr, TILES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The peak of each query head, and the share of a page that has it (0 where the sum is not a
    number or nothing), both (G,)."""
    tile_1S = tl.arange(0, TILES)[None, :]
    stats_GS = stats_S2G + tl.arange(0, PADDED_GROUP)[:, None] + tile_1S * (2 * PADDED_GROUP)
    there_1S = tile_1S < num_tiles
    peak_GS = tl.load(stats_GS, mask=there_1S, other=float("-inf"))
    sum_GS = tl.load(stats_GS + PADDED_GROUP, mask=there_1S, other=0.0)
    peak_G = tl.max(peak_GS, axis=1)
    base_G = tl.where(peak_G == float("-inf"), 0.0, peak_G)
    sum_G = tl.sum(sum_GS * tl.exp2((peak_GS - base_G[:, None]) * _LOG2_E), axis=1)
    share_G = tl.where(sum_G > 0.0, 1.0 / tl.where(sum_G > 0.0, sum_G, 1.0), 0.0)
    return base_G, share_G
