"""The best pages of each lane by what is kept of the mean of their keys, in few bits of few dims.

A page keeps its mean key in R dims of a basis of the lane, four bits each, and a scale. The pages
of a frame and lane lie together: for every eight dims a word of each page, then the scales. The
queries are taken to the same dims and rounded to eight bits, so that four products are one
instruction; what that loses is far below what four bits have lost already.

Shape legend: B requests, H KV heads, G query heads per KV head, D head dim, R kept dims, F frames
of a request, M rows of the store (lanes of frames), Y bytes of such a row, P pages of a frame, W
pages of a tile, K selected pages of the lane with most.
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference_mean_keys as reference
from sparsed.kernels.levels import WHOLE
from sparsed.kernels.reference_select import COLUMN_ALIGN
from sparsed.kernels.select import TILE_PAGES, launch_select, make_stats, store_stats

SCALE_BYTES: Final = 2  # float16
DIM_ALIGN: Final = 8  # dims of a word
WORD_BYTES: Final = 4
_MAX_LEVEL = tl.constexpr(float(reference.MAX_QUERY_LEVEL))
_CODE_ZERO = tl.constexpr(float(reference.CODE_ZERO))
_WHOLE = tl.constexpr(WHOLE)


class _Queries(NamedTuple):
    """Queries in the kept dims: levels (B * H, R / 4, padded G, 4) int8; factors (B * H, 2, padded
    G) float32, what a level is worth, and what codes of zero add up to."""

    levels: Tensor
    factors: Tensor


def row_bytes(num_pages: int, num_dims: int) -> int:
    """Bytes kept of ``num_pages`` pages, whole words."""
    return -(-num_pages * (num_dims // 2 + SCALE_BYTES) // WORD_BYTES) * WORD_BYTES


def select_by_mean_keys(
    q_BHGD: Tensor,
    store_MY: Tensor,
    *,
    basis_HDR: Tensor,
    rows_B: Tensor,
    frames_RF: Tensor,
    num_full_B: Tensor,
    count_B: Tensor,
    layer: int,
    num_layers: int,
    pages_per_frame: int,
    scale: float,
    sink_pages: int,
    recent_pages: int,
    max_pages: int,
    out_BHK: Tensor,
) -> None:
    """Write the ids of the ``count`` best full pages of every lane, in any order, then -1.

    A page's logits are the products of its mean key and the queries, times ``scale``; what is best
    by them, ``kernels.select.select_pages`` says, and of ``count``, ``sink_pages``,
    ``recent_pages`` and ``out`` all that there is to say; ``num_full`` is at most ``max_pages``.

    Shapes: q (B, H, G, D) contiguous; store (M, Y) uint8, row ``(frame * num_layers + layer) * H +
    head``; basis (H, D, R) contiguous, R a multiple of 8, takes queries to the kept dims; rows,
    num_full, count (B,) int32; frames (any, F) int32, of each request row the frames in order.
    Precision: a query in its kept dims is rounded to 127 steps of its largest value.
    Changes: out, all of it, on the current stream.
    Errors: AssertionError on other shapes or dtypes.
    Source: the mean key of a page is ShadowKV's summary, arXiv 2410.21465; the low rank is ours.
    """
    num_requests, num_heads, _, head_dim = q_BHGD.shape
    num_dims = basis_HDR.shape[2]
    assert q_BHGD.is_contiguous() and basis_HDR.is_contiguous() and frames_RF.is_contiguous()
    assert basis_HDR.shape == (num_heads, head_dim, num_dims) and num_dims % DIM_ALIGN == 0
    assert store_MY.dtype == torch.uint8 and store_MY.is_contiguous()
    assert store_MY.shape[1] == row_bytes(pages_per_frame, num_dims)
    assert frames_RF.dtype == torch.int32 and out_BHK.dtype == torch.int32
    for part_B in (rows_B, num_full_B, count_B):
        assert part_B.shape == (num_requests,) and part_B.dtype == torch.int32
        assert part_B.is_contiguous() and part_B.device == q_BHGD.device
    assert out_BHK.shape[:2] == (num_requests, num_heads) and out_BHK.is_contiguous()
    assert 0 <= layer < num_layers and pages_per_frame.bit_count() == 1
    assert sink_pages >= 0 and recent_pages >= 0 and max_pages > 0
    run = _launch if q_BHGD.is_cuda else reference.select_by_mean_keys
    run(
        q_BHGD,
        store_MY,
        basis_HDR=basis_HDR,
        rows_B=rows_B,
        frames_RF=frames_RF,
        num_full_B=num_full_B,
        count_B=count_B,
        layer=layer,
        num_layers=num_layers,
        pages_per_frame=pages_per_frame,
        scale=scale,
        sink_pages=sink_pages,
        recent_pages=recent_pages,
        max_pages=max_pages,
        out_BHK=out_BHK,
    )


def _launch(
    q_BHGD: Tensor,
    store_MY: Tensor,
    *,
    basis_HDR: Tensor,
    rows_B: Tensor,
    frames_RF: Tensor,
    num_full_B: Tensor,
    count_B: Tensor,
    layer: int,
    num_layers: int,
    pages_per_frame: int,
    scale: float,
    sink_pages: int,
    recent_pages: int,
    max_pages: int,
    out_BHK: Tensor,
) -> None:
    num_requests, num_heads, group, _ = q_BHGD.shape
    columns = triton.cdiv(max_pages, COLUMN_ALIGN) * COLUMN_ALIGN
    logits_BHGP = q_BHGD.new_empty((num_requests, num_heads, group, columns), dtype=torch.float32)
    stats_BHS2G = make_stats(logits_BHGP)
    if num_requests:
        _estimate_kernel[(num_requests * num_heads, stats_BHS2G.shape[2])](
            *_project(q_BHGD, basis_HDR, scale=scale),
            store_MY,
            rows_B,
            frames_RF,
            num_full_B,
            logits_BHGP,
            stats_BHS2G,
            layer,
            num_layers,
            frames_RF.shape[1],
            columns,
            NUM_HEADS=num_heads,
            GROUP=group,
            PADDED_GROUP=triton.next_power_of_2(group),
            WORDS=basis_HDR.shape[2] // DIM_ALIGN,
            PAGES=pages_per_frame,
            ROW_BYTES=store_MY.shape[1],
            TILE=TILE_PAGES,
            ALIGN=COLUMN_ALIGN,
            HAS_ASSEMBLY=not triton.knobs.runtime.interpret,
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
    )


def _project(q_BHGD: Tensor, basis_HDR: Tensor, *, scale: float) -> _Queries:
    num_requests, num_heads, group, head_dim = q_BHGD.shape
    lanes, num_dims = num_requests * num_heads, basis_HDR.shape[2]
    padded_group = triton.next_power_of_2(group)
    queries = _Queries(
        q_BHGD.new_empty((lanes, num_dims // 4, padded_group, 4), dtype=torch.int8),
        q_BHGD.new_empty((lanes, 2, padded_group), dtype=torch.float32),
    )
    _project_kernel[(lanes, group)](
        q_BHGD,
        basis_HDR,
        *queries,
        scale,
        NUM_HEADS=num_heads,
        PADDED_GROUP=padded_group,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        DIMS=num_dims,
        PADDED_DIMS=triton.next_power_of_2(num_dims),
        enable_fp_fusion=True,
    )
    return queries


@triton.jit
def _project_kernel(
    q_BHGD: tl.tensor,
    basis_HDR: tl.tensor,
    levels_BHRG4: tl.tensor,
    factors_BH2G: tl.tensor,
    scale: tl.float32,
    NUM_HEADS: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PADDED_DIMS: tl.constexpr,
) -> None:
    lane, g = tl.program_id(0), tl.program_id(1)
    dims, kept = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_DIMS)
    mask_DR = (dims < HEAD_DIM)[:, None] & (kept < DIMS)[None, :]
    basis_DR = basis_HDR + (lane % NUM_HEADS) * (HEAD_DIM * DIMS) + dims[:, None] * DIMS + kept
    row = lane.to(tl.int64) * tl.num_programs(1) + g
    q_D = tl.load(q_BHGD + row * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
    q_R = tl.sum(q_D[:, None] * tl.load(basis_DR, mask=mask_DR, other=0.0), axis=0)
    peak = tl.max(tl.abs(q_R), axis=0)
    step = tl.where(peak == 0.0, 1.0, peak / _MAX_LEVEL)
    level_R = q_R / step + _WHOLE - _WHOLE
    level = levels_BHRG4 + lane * (DIMS * PADDED_GROUP) + (kept // 4 * PADDED_GROUP + g) * 4
    tl.store(level + kept % 4, level_R.to(tl.int8), mask=kept < DIMS)
    factor = factors_BH2G + lane * (2 * PADDED_GROUP) + g
    tl.store(factor, step * scale)
    tl.store(factor + PADDED_GROUP, tl.sum(level_R, axis=0) * _CODE_ZERO)


# No variant is to be compiled while requests wait, whatever the batch and its addresses.
@triton.jit(do_not_specialize=["layer", "num_frames", "columns", "rows_B", "num_full_B"])
def _estimate_kernel(
    levels_BHRG4: tl.tensor,
    factors_BH2G: tl.tensor,
    store_MY: tl.tensor,
    rows_B: tl.tensor,
    frames_RF: tl.tensor,
    num_full_B: tl.tensor,
    logits_BHGP: tl.tensor,
    stats_BHS2G: tl.tensor,
    layer: tl.int32,
    num_layers: tl.int32,
    num_frames: tl.int32,
    columns: tl.int32,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    PAGES: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_ASSEMBLY: tl.constexpr,
) -> None:
    lane, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, head = lane // NUM_HEADS, lane % NUM_HEADS
    num_full = tl.load(num_full_B + b)
    if tile * TILE >= num_full:
        return
    page_W = tile * TILE + tl.arange(0, TILE)
    # Of whole frames: what lies beyond the last page is read and not used, which leaves the reads
    # wide.
    there_W = page_W // PAGES < tl.cdiv(num_full, PAGES)
    frame_row = frames_RF + tl.load(rows_B + b).to(tl.int64) * num_frames
    frame_W = tl.load(frame_row + page_W // PAGES, mask=there_W, other=0).to(tl.int64)
    row_W = store_MY + ((frame_W * num_layers + layer) * NUM_HEADS + head) * ROW_BYTES
    word_W = row_W.to(tl.pointer_type(tl.int32)) + page_W % PAGES
    scales_W = (row_W + 4 * WORDS * PAGES).to(tl.pointer_type(tl.float16)) + page_W % PAGES
    scale_W = tl.load(scales_W, mask=there_W, other=0.0).to(tl.float32)
    groups = tl.arange(0, PADDED_GROUP)
    levels_G = (levels_BHRG4 + lane * (8 * WORDS * PADDED_GROUP)).to(tl.pointer_type(tl.int32))
    levels_G += groups
    sum_GW = tl.zeros([PADDED_GROUP, TILE], tl.int32)
    for k in tl.static_range(WORDS):
        code_1W = tl.load(word_W + k * PAGES, mask=there_W, other=0)[None, :]
        low_G1 = tl.load(levels_G + k * PADDED_GROUP)[:, None]
        high_G1 = tl.load(levels_G + (WORDS + k) * PADDED_GROUP)[:, None]
        sum_GW = _add_products(sum_GW, code_1W & 0x0F0F0F0F, low_G1, HAS_ASSEMBLY)
        sum_GW = _add_products(sum_GW, (code_1W >> 4) & 0x0F0F0F0F, high_G1, HAS_ASSEMBLY)
    factors_G = factors_BH2G + lane * (2 * PADDED_GROUP) + groups
    zero_G1 = tl.load(factors_G + PADDED_GROUP)[:, None]
    logit_GW = (sum_GW.to(tl.float32) - zero_G1) * tl.load(factors_G)[:, None] * scale_W[None, :]
    is_head_G1 = (groups < GROUP)[:, None]
    logit_GW = tl.where(is_head_G1 & (page_W < num_full)[None, :], logit_GW, float("-inf"))
    # A multiple already; now the compiler knows, and writes 16 bytes at once.
    stride = columns // ALIGN * ALIGN
    logits_G1 = logits_BHGP + (lane * GROUP + groups[:, None]) * stride
    is_near_1W = (page_W < tl.cdiv(num_full, ALIGN) * ALIGN)[None, :]
    tl.store(logits_G1 + page_W[None, :], logit_GW, mask=is_head_G1 & is_near_1W)
    store_stats(logit_GW, stats_BHS2G + (lane * tl.num_programs(1) + tile) * 2 * PADDED_GROUP)


@triton.jit
def _add_products(
    sum_GW: tl.tensor, code_1W: tl.tensor, level_G1: tl.tensor, HAS_ASSEMBLY: tl.constexpr
) -> tl.tensor:
    """Add the products of the four bytes of each, codes without a sign and levels with one."""
    if HAS_ASSEMBLY:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [code_1W, level_G1, sum_GW],
            dtype=tl.int32,
            is_pure=False,  # or it is done once more for every layout of its result
            pack=1,
        )
    else:  # the interpreter knows no instructions
        for i in tl.static_range(4):
            level = (level_G1 << (24 - 8 * i)) >> 24
            sum_GW += ((code_1W >> (8 * i)) & 255) * level
        return sum_GW
