"""Merge of two partial attentions over disjoint sets of tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference

_TILE_ROWS = 8


def merge_states(
    o_a_BHGD: Tensor,
    lse_a_BHG: Tensor,
    o_b_BHGD: Tensor,
    lse_b_BHG: Tensor,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of tokens, from the result over each.

    Shapes: o (B, H, G, D), any floating dtype, D contiguous, normalised over its own set; lse
    (B, H, G) float32, natural log of the sum of exponentials, -inf for an empty set (then its o
    must be finite); other strides as they come. Returns the merged pair; two empty sets give o = 0,
    lse = -inf. The merged o goes to ``out`` where given, of any floating dtype, D contiguous, else
    it is a new float32 tensor.
    Errors: AssertionError on other shapes.
    Source: the log-sum-exp merge of FlashDecoding and of FlashInfer, arXiv 2501.01005.
    """
    assert o_a_BHGD.shape == o_b_BHGD.shape
    assert o_a_BHGD.stride(3) == o_b_BHGD.stride(3) == 1
    assert lse_a_BHG.shape == lse_b_BHG.shape == o_a_BHGD.shape[:-1]
    if out is None:
        contiguous = torch.contiguous_format
        out = torch.empty_like(o_a_BHGD, dtype=torch.float32, memory_format=contiguous)
    assert out.shape == o_a_BHGD.shape and out.stride(3) == 1
    run = _launch if o_a_BHGD.is_cuda else reference.merge_states
    return out, run(o_a_BHGD, lse_a_BHG, o_b_BHGD, lse_b_BHG, o_BHGD=out)


def _launch(
    o_a_BHGD: Tensor, lse_a_BHG: Tensor, o_b_BHGD: Tensor, lse_b_BHG: Tensor, *, o_BHGD: Tensor
) -> Tensor:
    lse_BHG = torch.empty_like(
        lse_a_BHG, dtype=torch.float32, memory_format=torch.contiguous_format
    )
    num_requests, num_heads, group, head_dim = o_BHGD.shape
    if o_BHGD.numel():
        _merge_kernel[(num_requests * num_heads, triton.cdiv(group, _TILE_ROWS))](
            o_a_BHGD,
            lse_a_BHG,
            o_b_BHGD,
            lse_b_BHG,
            o_BHGD,
            lse_BHG,
            *o_a_BHGD.stride()[:3],
            *lse_a_BHG.stride(),
            *o_b_BHGD.stride()[:3],
            *lse_b_BHG.stride(),
            *o_BHGD.stride()[:3],
            num_heads,
            group,
            HEAD_DIM=head_dim,
            PADDED_DIM=triton.next_power_of_2(head_dim),
            TILE_ROWS=_TILE_ROWS,
            enable_fp_fusion=True,
        )
    return lse_BHG


@triton.jit
def _load_state(
    o_BHGD: tl.tensor,
    lse_BHG: tl.tensor,
    o_first: tl.int64,
    lse_first: tl.int64,
    o_stride: tl.int32,
    lse_stride: tl.int32,
    rows: tl.tensor,
    dims: tl.tensor,
    mask_RD: tl.tensor,
    num_rows: tl.int32,
) -> tuple[tl.tensor, tl.tensor]:
    o = o_BHGD + o_first + rows.to(tl.int64)[:, None] * o_stride + dims[None, :]
    o_RD = tl.load(o, mask=mask_RD, other=0.0).to(tl.float32)
    lse = lse_BHG + lse_first + rows.to(tl.int64) * lse_stride
    return o_RD, tl.load(lse, mask=rows < num_rows, other=float("-inf"))


@triton.jit(do_not_specialize=["num_rows"])
def _merge_kernel(
    o_a: tl.tensor,
    lse_a: tl.tensor,
    o_b: tl.tensor,
    lse_b: tl.tensor,
    o_BHGD: tl.tensor,
    lse_BHG: tl.tensor,
    o_a_B: tl.int64,
    o_a_H: tl.int64,
    o_a_G: tl.int32,
    lse_a_B: tl.int64,
    lse_a_H: tl.int64,
    lse_a_G: tl.int32,
    o_b_B: tl.int64,
    o_b_H: tl.int64,
    o_b_G: tl.int32,
    lse_b_B: tl.int64,
    lse_b_H: tl.int64,
    lse_b_G: tl.int32,
    o_B: tl.int64,
    o_H: tl.int64,
    o_G: tl.int32,
    num_heads: tl.int32,
    num_rows: tl.int32,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
) -> None:
    lane = tl.program_id(0).to(tl.int64)
    b, h = lane // num_heads, lane % num_heads
    rows = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    dims = tl.arange(0, PADDED_DIM)
    mask = (rows < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    first_a, first_b = b * o_a_B + h * o_a_H, b * o_b_B + h * o_b_H
    o_a_RD, lse_a_R = _load_state(
        o_a, lse_a, first_a, b * lse_a_B + h * lse_a_H, o_a_G, lse_a_G, rows, dims, mask, num_rows
    )
    o_b_RD, lse_b_R = _load_state(
        o_b, lse_b, first_b, b * lse_b_B + h * lse_b_H, o_b_G, lse_b_G, rows, dims, mask, num_rows
    )
    peak_R = tl.maximum(lse_a_R, lse_b_R)
    base_R = tl.where(peak_R == float("-inf"), 0.0, peak_R)
    weight_a_R, weight_b_R = tl.exp(lse_a_R - base_R), tl.exp(lse_b_R - base_R)
    total_R = weight_a_R + weight_b_R
    divisor_R = tl.where(total_R > 0.0, total_R, 1.0)
    o_RD = o_a_RD * (weight_a_R / divisor_R)[:, None] + o_b_RD * (weight_b_R / divisor_R)[:, None]
    o = o_BHGD + b * o_B + h * o_H + rows.to(tl.int64)[:, None] * o_G + dims[None, :]
    tl.store(o, o_RD.to(o_BHGD.dtype.element_ty), mask=mask)
    tl.store(lse_BHG + lane * num_rows + rows, peak_R + tl.log(divisor_R), mask=rows < num_rows)
