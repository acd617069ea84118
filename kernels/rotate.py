"""Rotary position embedding of query and key heads, with the norm some families put before it."""

import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference

_TILE_HEADS = 16


def rotate_heads(
    heads_NHD: Tensor,
    cos_ND: Tensor,
    sin_ND: Tensor,
    *,
    norm_HD: Tensor | None,
    eps: float,
    first_NFD: Tensor | None = None,
) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of each head, after an RMS norm where ``norm_HD`` is given.

    Shapes: heads (N, H, D), heads and dims contiguous, rows any distance apart; cos, sin (N, D),
    sin with the sign of each half; norm (H, D), one weight a head; all of one dtype. Returns
    (N, H, D): on CUDA ``heads`` itself, changed in place; elsewhere a new tensor. Of so many first
    heads the result goes to ``first`` (N, F, D), contiguous, if there is one, and what is returned
    of them may be anything.
    Precision: float32 inside on CUDA, the dtype of heads elsewhere.
    Errors: AssertionError on other shapes or dtypes.
    Source: RoPE, arXiv 2104.09864; QK-norm as in Qwen3.
    """
    num_tokens, num_heads, head_dim = heads_NHD.shape
    assert cos_ND.shape == sin_ND.shape == (num_tokens, head_dim)
    assert cos_ND.dtype == sin_ND.dtype == heads_NHD.dtype
    assert heads_NHD.stride(2) == 1 and heads_NHD.stride(1) == head_dim and head_dim % 2 == 0
    if norm_HD is not None:
        assert norm_HD.shape == (num_heads, head_dim) and norm_HD.dtype == heads_NHD.dtype
    assert cos_ND.is_contiguous() and sin_ND.is_contiguous()
    if first_NFD is not None:
        assert first_NFD.shape[::2] == (num_tokens, head_dim) and first_NFD.is_contiguous()
        assert first_NFD.shape[1] <= num_heads and first_NFD.dtype == heads_NHD.dtype
    run = _launch if heads_NHD.is_cuda else reference.rotate_heads
    return run(heads_NHD, cos_ND, sin_ND, norm_HD=norm_HD, eps=eps, first_NFD=first_NFD)


def _launch(
    heads_NHD: Tensor,
    cos_ND: Tensor,
    sin_ND: Tensor,
    *,
    norm_HD: Tensor | None,
    eps: float,
    first_NFD: Tensor | None = None,
) -> Tensor:
    num_tokens, num_heads, head_dim = heads_NHD.shape
    if num_tokens:
        _rotate_kernel[(num_tokens, triton.cdiv(num_heads, _TILE_HEADS))](
            heads_NHD,
            cos_ND,
            sin_ND,
            heads_NHD if norm_HD is None else norm_HD.contiguous(),
            heads_NHD if first_NFD is None else first_NFD,
            heads_NHD.stride(0),
            num_heads,
            0 if first_NFD is None else first_NFD.shape[1],
            eps,
            HEAD_DIM=head_dim,
            PADDED_HALF=triton.next_power_of_2(head_dim // 2),
            TILE_HEADS=_TILE_HEADS,
            NORM=norm_HD is not None,
            FIRST=first_NFD is not None,
            enable_fp_fusion=True,
        )
    return heads_NHD


@triton.jit(do_not_specialize=["num_heads", "num_first"])
def _rotate_kernel(
    heads_NHD: tl.tensor,
    cos_ND: tl.tensor,
    sin_ND: tl.tensor,
    norm_HD: tl.tensor,
    first_NFD: tl.tensor,
    stride_N: tl.int32,
    num_heads: tl.int32,
    num_first: tl.int32,
    eps: tl.float32,
    HEAD_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    NORM: tl.constexpr,
    FIRST: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = HEAD_DIM // 2
    heads = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)
    dims = tl.arange(0, PADDED_HALF)
    mask_HF = (heads < num_heads)[:, None] & (dims < half)[None, :]
    place_HF = heads[:, None] * HEAD_DIM + dims[None, :]
    low = heads_NHD + token * stride_N + place_HF
    x_HF = tl.load(low, mask=mask_HF, other=0.0).to(tl.float32)
    y_HF = tl.load(low + half, mask=mask_HF, other=0.0).to(tl.float32)
    if NORM:
        mean_H = (tl.sum(x_HF * x_HF, axis=1) + tl.sum(y_HF * y_HF, axis=1)) / HEAD_DIM
        factor_H1 = (1.0 / tl.sqrt(mean_H + eps))[:, None]
        weight = norm_HD + place_HF
        x_HF *= factor_H1 * tl.load(weight, mask=mask_HF, other=0.0).to(tl.float32)
        y_HF *= factor_H1 * tl.load(weight + half, mask=mask_HF, other=0.0).to(tl.float32)
    angle, mask = token * HEAD_DIM + dims, dims < half
    cos_x_F = tl.load(cos_ND + angle, mask=mask).to(tl.float32)
    cos_y_F = tl.load(cos_ND + angle + half, mask=mask).to(tl.float32)
    sin_x_F = tl.load(sin_ND + angle, mask=mask).to(tl.float32)
    sin_y_F = tl.load(sin_ND + angle + half, mask=mask).to(tl.float32)
    element = heads_NHD.dtype.element_ty
    x_HF, y_HF = x_HF * cos_x_F + y_HF * sin_x_F, y_HF * cos_y_F + x_HF * sin_y_F
    if FIRST:
        first = first_NFD + token * num_first * HEAD_DIM + place_HF
        is_first_HF = mask_HF & (heads < num_first)[:, None]
        tl.store(first, x_HF.to(element), mask=is_first_HF)
        tl.store(first + half, y_HF.to(element), mask=is_first_HF)
        mask_HF = mask_HF & (heads >= num_first)[:, None]
    tl.store(low, x_HF.to(element), mask=mask_HF)
    tl.store(low + half, y_HF.to(element), mask=mask_HF)
