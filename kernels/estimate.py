"""Estimated attention to every page of a lane, from what is kept of its keys in few bits.

A page keeps its mean key in R dims of a basis of the lane, four bits each, and a scale. The pages
of a frame and lane lie together: for every eight dims a word of each page, then the scales. The
queries are taken to the same dims and rounded to eight bits, so that four products are one
instruction; what that loses is far below what four bits have lost already.

Shape legend: B requests, H KV heads, G query heads per KV head, D head dim, R kept dims, F frames
of a request, X pages of all requests one after the other, M rows of the store (lanes of frames),
Y bytes of such a row, P pages of a frame, W pages of a tile.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference_estimate as reference
from sparsed.kernels.levels import WHOLE
from sparsed.kernels.reference_select import COLUMN_ALIGN

SCALE_BYTES = 2  # float16
DIM_ALIGN = 8  # dims of a word
_TILE_PAGES = 512
_WANTED_PROGRAMS = 2112  # sixteen for each multiprocessor of a large device
_MAX_LEVEL = tl.constexpr(float(reference.MAX_QUERY_LEVEL))
_CODE_ZERO = tl.constexpr(float(reference.CODE_ZERO))
_WHOLE = tl.constexpr(WHOLE)


class _Queries(NamedTuple):
    """Queries in the kept dims: levels (B * H, G, R) int8; factors (B * H, 2, padded G) float32,
    what a level is worth, and what codes of zero add up to."""

    levels: Tensor
    factors: Tensor


def row_bytes(num_pages: int, num_dims: int) -> int:
    """Bytes kept of ``num_pages`` pages."""
    return num_pages * (num_dims // 2 + SCALE_BYTES)


def estimate_pages(
    q_BHGD: Tensor,
    store_MY: Tensor,
    *,
    basis_HDR: Tensor,
    rows_B: Tensor,
    frames_RF: Tensor,
    num_full_B: Tensor,
    first_B: Tensor,
    layer: int,
    num_layers: int,
    pages_per_frame: int,
    scale: float,
    out_HGX: Tensor,
) -> None:
    """Estimated logits of each page, from the mean of its keys: columns ``first`` to ``first +
    num_full - 1`` of ``out`` for each request; what follows up to a multiple of 4 may hold
    anything, other columns stay as they are.

    Shapes: q (B, H, G, D) contiguous; store (M, Y) uint8, row ``(frame * num_layers + layer) * H +
    head``; basis (H, D, R) contiguous, R a multiple of 8, takes queries to the kept dims; rows,
    num_full, first (B,) int32, ``first`` multiples of 4; frames (any, F) int32, of each request row
    the frames in order; out (H, G, X) float32 contiguous, X a multiple of 4.
    Units: the product of query and mean key, times ``scale``.
    Precision: a query in its kept dims is rounded to 127 steps of its largest value.
    Changes: out, on the current stream.
    Errors: AssertionError on other shapes or dtypes.
    Source: the mean key of a page is ShadowKV's summary, arXiv 2410.21465; the low rank is ours.
    """
    num_requests, num_heads, group, head_dim = q_BHGD.shape
    num_dims = basis_HDR.shape[2]
    assert q_BHGD.is_contiguous() and basis_HDR.is_contiguous() and out_HGX.is_contiguous()
    assert basis_HDR.shape == (num_heads, head_dim, num_dims) and num_dims % DIM_ALIGN == 0
    assert store_MY.dtype == torch.uint8 and store_MY.is_contiguous()
    assert store_MY.shape[1] == row_bytes(pages_per_frame, num_dims)
    assert out_HGX.shape[:2] == (num_heads, group) and out_HGX.dtype == torch.float32
    assert out_HGX.shape[2] % COLUMN_ALIGN == 0 and out_HGX.data_ptr() % 16 == 0
    assert rows_B.dtype == num_full_B.dtype == first_B.dtype == frames_RF.dtype == torch.int32
    assert rows_B.shape == num_full_B.shape == first_B.shape == (num_requests,)
    assert 0 <= layer < num_layers and pages_per_frame.bit_count() == 1
    run = _launch if q_BHGD.is_cuda else reference.estimate_pages
    run(
        q_BHGD,
        store_MY,
        basis_HDR=basis_HDR,
        rows_B=rows_B,
        frames_RF=frames_RF,
        num_full_B=num_full_B,
        first_B=first_B,
        layer=layer,
        num_layers=num_layers,
        pages_per_frame=pages_per_frame,
        scale=scale,
        out_HGX=out_HGX,
    )


def _launch(
    q_BHGD: Tensor,
    store_MY: Tensor,
    *,
    basis_HDR: Tensor,
    rows_B: Tensor,
    frames_RF: Tensor,
    num_full_B: Tensor,
    first_B: Tensor,
    layer: int,
    num_layers: int,
    pages_per_frame: int,
    scale: float,
    out_HGX: Tensor,
) -> None:
    num_requests, num_heads, group, _ = q_BHGD.shape
    if not num_requests:
        return
    lanes, tiles = num_requests * num_heads, frames_RF.shape[1] * pages_per_frame
    splits = min(triton.cdiv(_WANTED_PROGRAMS, lanes), triton.cdiv(tiles, _TILE_PAGES))
    _estimate_kernel[(lanes, splits)](
        *_project(q_BHGD, basis_HDR, scale=scale),
        store_MY,
        rows_B,
        frames_RF,
        num_full_B,
        first_B,
        out_HGX,
        layer,
        num_layers,
        frames_RF.shape[1],
        out_HGX.shape[2],
        NUM_HEADS=num_heads,
        GROUP=group,
        PADDED_GROUP=triton.next_power_of_2(group),
        WORDS=basis_HDR.shape[2] // DIM_ALIGN,
        PAGES=pages_per_frame,
        ALIGN=COLUMN_ALIGN,
        TILE_PAGES=_TILE_PAGES,
        HAS_ASSEMBLY=not triton.knobs.runtime.interpret,
        enable_fp_fusion=True,
    )


def _project(q_BHGD: Tensor, basis_HDR: Tensor, *, scale: float) -> _Queries:
    num_requests, num_heads, group, head_dim = q_BHGD.shape
    lanes, num_dims = num_requests * num_heads, basis_HDR.shape[2]
    padded_group = triton.next_power_of_2(group)
    queries = _Queries(
        q_BHGD.new_empty((lanes, group, num_dims), dtype=torch.int8),
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
    levels_BHGR: tl.tensor,
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
    tl.store(levels_BHGR + row * DIMS + kept, level_R.to(tl.int8), mask=kept < DIMS)
    factor = factors_BH2G + lane * (2 * PADDED_GROUP) + g
    tl.store(factor, step * scale)
    tl.store(factor + PADDED_GROUP, tl.sum(level_R, axis=0) * _CODE_ZERO)


@triton.jit(do_not_specialize=["layer", "num_frames", "num_columns"])
def _estimate_kernel(
    levels_BHGR: tl.tensor,
    factors_BH2G: tl.tensor,
    store_MY: tl.tensor,
    rows_B: tl.tensor,
    frames_RF: tl.tensor,
    num_full_B: tl.tensor,
    first_B: tl.tensor,
    out_HGX: tl.tensor,
    layer: tl.int32,
    num_layers: tl.int32,
    num_frames: tl.int32,
    num_columns: tl.int32,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    PAGES: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE_PAGES: tl.constexpr,
    HAS_ASSEMBLY: tl.constexpr,
) -> None:
    lane = tl.program_id(0).to(tl.int64)
    b, head = lane // NUM_HEADS, lane % NUM_HEADS
    num_full = tl.load(num_full_B + b)
    if tl.program_id(1) * TILE_PAGES >= num_full:
        return
    groups, places = tl.arange(0, PADDED_GROUP), tl.arange(0, TILE_PAGES)
    words_G = (levels_BHGR + lane * (GROUP * 8 * WORDS)).to(tl.pointer_type(tl.int32))
    words_G += tl.minimum(groups, GROUP - 1) * (2 * WORDS)
    factor_G1 = tl.load(factors_BH2G + lane * (2 * PADDED_GROUP) + groups)[:, None]
    zero_G1 = tl.load(factors_BH2G + lane * (2 * PADDED_GROUP) + PADDED_GROUP + groups)[:, None]
    frame_row = frames_RF + tl.load(rows_B + b).to(tl.int64) * num_frames
    # They are multiples already; now the compiler knows, and writes 16 bytes at once.
    stride, first = num_columns // ALIGN * ALIGN, tl.load(first_B + b) // ALIGN * ALIGN
    out_G1 = out_HGX + (head * GROUP + groups[:, None]) * stride + first
    end = tl.cdiv(num_full, ALIGN) * ALIGN
    row_bytes: tl.constexpr = PAGES * (4 * WORDS + 2)
    for start in range(tl.program_id(1) * TILE_PAGES, num_full, tl.num_programs(1) * TILE_PAGES):
        page_W = start + places
        # Whole frames: the pages behind the last one are read, which leaves the reads wide.
        there_W = page_W // PAGES < tl.cdiv(num_full, PAGES)
        frame_W = tl.load(frame_row + page_W // PAGES, mask=there_W, other=0).to(tl.int64)
        row_W = store_MY + ((frame_W * num_layers + layer) * NUM_HEADS + head) * row_bytes
        word_W = row_W.to(tl.pointer_type(tl.int32)) + page_W % PAGES
        sum_GW = tl.zeros([PADDED_GROUP, TILE_PAGES], tl.int32)
        for k in tl.static_range(WORDS):
            code_1W = tl.load(word_W + k * PAGES, mask=there_W, other=0)[None, :]
            low_G1, high_G1 = tl.load(words_G + k)[:, None], tl.load(words_G + WORDS + k)[:, None]
            sum_GW = _add_products(sum_GW, code_1W & 0x0F0F0F0F, low_G1, HAS_ASSEMBLY)
            sum_GW = _add_products(sum_GW, (code_1W >> 4) & 0x0F0F0F0F, high_G1, HAS_ASSEMBLY)
        scales_W = (row_W + 4 * WORDS * PAGES).to(tl.pointer_type(tl.float16)) + page_W % PAGES
        scale_W = tl.load(scales_W, mask=there_W, other=0.0).to(tl.float32)
        logit_GW = (sum_GW.to(tl.float32) - zero_G1) * factor_G1 * scale_W[None, :]
        mask_GW = (groups < GROUP)[:, None] & (page_W < end)[None, :]
        tl.store(out_G1 + page_W[None, :], logit_GW, mask=mask_GW)


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
            is_pure=True,
            pack=1,
        )
    else:  # the interpreter knows no instructions
        for i in tl.static_range(4):
            level = (level_G1 << (24 - 8 * i)) >> 24
            sum_GW += ((code_1W >> (8 * i)) & 255) * level
        return sum_GW
