"""The best pages of a lane by the votes of its query heads: what selection kernels share.

A kernel brings two functions: ``fetch(source, start, W, SHAPE)`` reads what there is of W pages, and
``logits(source, read, start, W, SHAPE)`` makes their logits of it (G, W), -inf for what is no page
and no query head; ``SHAPE`` is known to the compiler. Both are called twice for every page: no lane is too long, and nothing but the keys of
its pages, in pieces, is kept in registers.

Shape legend: G query heads per KV head, W pages of a piece or of a tile, K selected pages.
"""

from typing import Final

import triton
import triton.language as tl

from sparsed.kernels.threshold import find_threshold, page_keys, write_ids

PIECE: Final = 1024  # pages
_MIN_PIECE: Final = 128
_MAX_PIECES: Final = 16  # of more pages, the pieces are larger
_WARP_PAGES: Final = 128  # of a piece: four of each thread
_MAX_WARPS: Final = 16
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1e30)  # no logit comes near, and unlike -inf it is a number


def launch_shape(max_pages: int, group: int, *, max_piece: int = PIECE) -> dict[str, int]:
    """Constants of a kernel that chooses from so many pages at most."""
    piece = min(max(_MIN_PIECE, triton.next_power_of_2(max_pages)), max_piece)
    piece = max(piece, triton.next_power_of_2(triton.cdiv(max_pages, _MAX_PIECES)))
    return {
        "GROUP": group,
        "PADDED_GROUP": triton.next_power_of_2(group),
        "PIECE": piece,
        "PIECES": triton.cdiv(max_pages, piece),
        "num_warps": min(max(1, piece // _WARP_PAGES), _MAX_WARPS),
    }


@triton.jit
def choose(
    fetch: tl.constexpr,
    logits: tl.constexpr,
    source: tl.tuple,
    SHAPE: tl.constexpr,
    pages: tl.tuple,
    out_K: tl.tensor,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
) -> None:
    """Write the best of (full pages, wanted ones, places of ``out``, sinks, recent pages), then -1."""
    num_full, count, num_selected, sink_pages, recent_pages = pages
    num_chosen = 0
    if (count > 0) & (num_full > count):
        peak_G, share_G = _softmax(fetch, logits, source, SHAPE, num_full, PADDED_GROUP, PIECE)
        keys = ()
        for i in tl.static_range(PIECES):
            if i * PIECE < num_full:
                read = fetch(source, i * PIECE, PIECE, SHAPE)
                logit_GW = logits(source, read, i * PIECE, PIECE, SHAPE)
                score_W = _scores(logit_GW, peak_G, share_G)
                id_W = i * PIECE + tl.arange(0, PIECE)
                key_W = page_keys(score_W, id_W, num_full, sink_pages, num_full - recent_pages)
            else:
                key_W = tl.full([PIECE], -1, tl.int32)
            keys = keys + (key_W,)  # noqa: RUF005  # the compiler knows no unpacking
        num_forced = tl.minimum(sink_pages + recent_pages, num_full)
        threshold = find_threshold(keys, count, num_full, num_forced, GROUP, PIECE, PIECES)
        write_ids(keys, threshold, count, out_K, PIECE, PIECES)
        num_chosen = count
    for start in range(0, num_selected, PIECE):
        place_W = start + tl.arange(0, PIECE)
        id_W = tl.where(place_W < tl.minimum(count, num_full), place_W, -1)
        tl.store(out_K + place_W, id_W, mask=(place_W >= num_chosen) & (place_W < num_selected))


@triton.jit
def _softmax(
    fetch: tl.constexpr,
    logits: tl.constexpr,
    source: tl.tuple,
    SHAPE: tl.constexpr,
    num_full: tl.tensor,
    PADDED_GROUP: tl.constexpr,
    PIECE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The peak of each query head, and the share of a page that has it (0 where the sum is not a
    number or nothing), both (G,).

    Every place of the tile has a running softmax of its own: no sum over threads before the end.
    """
    peak_GW = tl.full([PADDED_GROUP, PIECE], _LOWEST, tl.float32)
    sum_GW = tl.zeros([PADDED_GROUP, PIECE], tl.float32)
    ahead = fetch(source, 0, PIECE, SHAPE)
    for start in range(0, num_full, PIECE):
        read = ahead
        ahead = fetch(source, start + PIECE, PIECE, SHAPE)  # travels while this tile is summed
        logit_GW = logits(source, read, start, PIECE, SHAPE)
        rise_GW = logit_GW - peak_GW
        # Of the two weights one is 1: it is the peak's.
        weight_GW = tl.exp2(-tl.abs(rise_GW) * _LOG2_E)
        sum_GW = tl.where(rise_GW > 0.0, sum_GW * weight_GW + 1.0, sum_GW + weight_GW)
        peak_GW = tl.maximum(peak_GW, logit_GW)
    peak_G = tl.max(peak_GW, axis=1)
    sum_G = tl.sum(sum_GW * tl.exp2((peak_GW - peak_G[:, None]) * _LOG2_E), axis=1)
    return peak_G, tl.where(sum_G > 0.0, 1.0 / tl.where(sum_G > 0.0, sum_G, 1.0), 0.0)


@triton.jit
def _scores(logit_GW: tl.tensor, peak_G: tl.tensor, share_G: tl.tensor) -> tl.tensor:
    """Sums of the softmax weights; a head whose sum is not a number counts for nothing."""
    weight_GW = tl.exp2((logit_GW - peak_G[:, None]) * _LOG2_E) * share_G[:, None]
    return tl.sum(tl.where(share_G[:, None] > 0.0, weight_GW, 0.0), axis=0)
