"""Estimated attention to every page of a lane, from what is kept of its keys in few bits.

A page keeps its mean key in R dims of a basis of the lane, four bits each, and a scale. The pages
of a frame and lane lie together: R / 2 rows of codes, two dims a byte, then the scales.

Shape legend: B requests, H KV heads, G query heads per KV head, D head dim, R kept dims, F frames
of a request, X pages of all requests one after the other, M rows of the store (lanes of frames),
Y bytes of such a row, P pages of a frame.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference_estimate as reference

SCALE_BYTES = 2  # float16
_TILE_PAGES = 256
_MIN_DOT = 16  # tl.dot takes no smaller side
_WANTED_PROGRAMS = 528  # four for each multiprocessor of a large device


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
    num_full - 1`` of ``out`` for each request; other columns stay as they are.

    Shapes: q (B, H, G, D) contiguous; store (M, Y) uint8, row ``(frame * num_layers + layer) * H +
    head``; basis (H, D, R) contiguous, R a multiple of 4, takes queries to the kept dims; rows,
    num_full, first (B,) int32; frames (any, F) int32, of each request row the frames in order;
    out (H, G, X) float32 contiguous.
    Units: the product of query and mean key, times ``scale``.
    Changes: out, on the current stream.
    Errors: AssertionError on other shapes or dtypes.
    Source: the mean key of a page is ShadowKV's summary, arXiv 2410.21465; the low rank is ours.
    """
    num_requests, num_heads, group, head_dim = q_BHGD.shape
    num_dims = basis_HDR.shape[2]
    assert q_BHGD.is_contiguous() and basis_HDR.is_contiguous() and out_HGX.is_contiguous()
    assert basis_HDR.shape == (num_heads, head_dim, num_dims) and num_dims % 4 == 0
    assert store_MY.dtype == torch.uint8 and store_MY.is_contiguous()
    assert store_MY.shape[1] == row_bytes(pages_per_frame, num_dims)
    assert out_HGX.shape[:2] == (num_heads, group) and out_HGX.dtype == torch.float32
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
    num_requests, num_heads, group, head_dim = q_BHGD.shape
    half_dims = basis_HDR.shape[2] // 2
    if not num_requests:
        return
    most_tiles = triton.cdiv(frames_RF.shape[1] * pages_per_frame, _TILE_PAGES)
    splits = max(1, min(_WANTED_PROGRAMS // (num_requests * num_heads), most_tiles))
    _estimate_kernel[(num_requests * num_heads, splits)](
        q_BHGD,
        store_MY,
        basis_HDR,
        rows_B,
        frames_RF,
        num_full_B,
        first_B,
        out_HGX,
        scale,
        layer,
        num_layers,
        frames_RF.shape[1],
        out_HGX.shape[2],
        NUM_HEADS=num_heads,
        GROUP=group,
        PADDED_GROUP=max(_MIN_DOT, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        PADDED_DIM=max(_MIN_DOT, triton.next_power_of_2(head_dim)),
        HALF_DIMS=half_dims,
        PADDED_HALF=max(_MIN_DOT, triton.next_power_of_2(half_dims)),
        PAGES=pages_per_frame,
        WORD=tl.uint32 if pages_per_frame % 4 == 0 else tl.uint8,
        WORD_PAGES=4 if pages_per_frame % 4 == 0 else 1,
        TILE_PAGES=_TILE_PAGES,
        enable_fp_fusion=True,
    )


@triton.jit
def _project(
    q_GD: tl.tensor, basis: tl.tensor, first: tl.constexpr, dims: tl.tensor, halves: tl.tensor,
    HEAD_DIM: tl.constexpr, HALF_DIMS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The query in one half of the kept dims, (G, R / 2)."""
    mask_DR = (dims < HEAD_DIM)[:, None] & (halves < HALF_DIMS)[None, :]
    entry = basis + dims[:, None] * (2 * HALF_DIMS) + first + halves[None, :]
    basis_DR = tl.load(entry, mask=mask_DR, other=0.0)
    return tl.dot(q_GD, basis_DR.to(tl.float32))


@triton.jit(do_not_specialize=["layer", "num_frames", "num_columns"])
def _estimate_kernel(
    q_BHGD: tl.tensor,
    store_MY: tl.tensor,
    basis_HDR: tl.tensor,
    rows_B: tl.tensor,
    frames_RF: tl.tensor,
    num_full_B: tl.tensor,
    first_B: tl.tensor,
    out_HGX: tl.tensor,
    scale: tl.float32,
    layer: tl.int32,
    num_layers: tl.int32,
    num_frames: tl.int32,
    num_columns: tl.int32,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HALF_DIMS: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PAGES: tl.constexpr,
    WORD: tl.constexpr,
    WORD_PAGES: tl.constexpr,
    TILE_PAGES: tl.constexpr,
) -> None:
    b, head = tl.program_id(0) // NUM_HEADS, tl.program_id(0) % NUM_HEADS
    num_full = tl.load(num_full_B + b)
    if tl.program_id(1) * TILE_PAGES >= num_full:
        return
    groups, dims = tl.arange(0, PADDED_GROUP), tl.arange(0, PADDED_DIM)
    halves = tl.arange(0, PADDED_HALF)
    mask_GD = (groups < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q = q_BHGD + (tl.program_id(0).to(tl.int64) * GROUP + groups)[:, None] * HEAD_DIM
    q_GD = tl.load(q + dims[None, :], mask=mask_GD, other=0.0).to(tl.float32)
    basis = basis_HDR + head * (HEAD_DIM * 2 * HALF_DIMS)
    low_GR = _project(q_GD, basis, 0, dims, halves, HEAD_DIM, HALF_DIMS)
    high_GR = _project(q_GD, basis, HALF_DIMS, dims, halves, HEAD_DIM, HALF_DIMS)

    frame_row = frames_RF + tl.load(rows_B + b).to(tl.int64) * num_frames
    column = out_HGX + head.to(tl.int64) * GROUP * num_columns + tl.load(first_B + b)
    out_G1 = column + groups[:, None].to(tl.int64) * num_columns
    row_bytes: tl.constexpr = PAGES * (HALF_DIMS + 2)
    row_words: tl.constexpr = PAGES // WORD_PAGES
    words = tl.arange(0, TILE_PAGES // WORD_PAGES)
    for start in range(tl.program_id(1) * TILE_PAGES, num_full, tl.num_programs(1) * TILE_PAGES):
        page_W = start + words * WORD_PAGES
        there_W = page_W < num_full
        frame_W = tl.load(frame_row + page_W // PAGES, mask=there_W, other=0).to(tl.int64)
        row_W = store_MY + ((frame_W * num_layers + layer) * NUM_HEADS + head) * row_bytes
        word = row_W.to(tl.pointer_type(WORD))[None, :] + (words % row_words)[None, :]
        word_RW = tl.load(
            word + halves[:, None] * row_words,
            mask=there_W[None, :] & (halves < HALF_DIMS)[:, None],
            other=0,
        ).to(tl.int32)
        scale_W = (row_W + HALF_DIMS * PAGES).to(tl.pointer_type(tl.float16)) + page_W % PAGES
        for part in tl.static_range(WORD_PAGES):
            there = page_W + part < num_full
            page_scale_W = tl.load(scale_W + part, mask=there, other=0.0).to(tl.float32) * scale
            logits_GW = tl.dot(low_GR, _value(word_RW >> (8 * part)))
            logits_GW = tl.dot(high_GR, _value(word_RW >> (8 * part + 4)), logits_GW)
            out = out_G1 + page_W[None, :] + part
            mask = (groups < GROUP)[:, None] & there[None, :]
            tl.store(out, logits_GW * page_scale_W[None, :], mask=mask)


@triton.jit
def _value(code_RW: tl.tensor) -> tl.tensor:
    """The value of the lowest four bits, 0 for a code of 8: as the last bits of 2**23 they are read
    as a float at once, where a conversion would take several times as long."""
    return ((code_RW & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
