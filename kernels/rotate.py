"""Rotary position embedding of query and key heads, with the norm some families put before it."""

import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference


def rotate_heads(
    heads_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor, *, norm_HD: Tensor | None, eps: float
) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of each head, after an RMS norm where ``norm_HD`` is given.

    Shapes: heads (N, H, D), heads and dims contiguous, rows any distance apart; cos, sin (N, D),
    sin with the sign of each half; norm (H, D), one weight a head; all of one dtype. Returns
    (N, H, D): on CUDA ``heads`` itself, changed in place; elsewhere a new tensor.
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
    run = _launch if heads_NHD.is_cuda else reference.rotate_heads
    return run(heads_NHD, cos_ND, sin_ND, norm_HD=norm_HD, eps=eps)


def _launch(
    heads_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor, *, norm_HD: Tensor | None, eps: float
) -> Tensor:
    num_tokens, num_heads, head_dim = heads_NHD.shape
    if num_tokens:
        _rotate_kernel[(num_tokens, num_heads)](
            heads_NHD,
            cos_ND,
            sin_ND,
            heads_NHD if norm_HD is None else norm_HD.contiguous(),
            heads_NHD.stride(0),
            eps,
            HEAD_DIM=head_dim,
            PADDED_HALF=triton.next_power_of_2(head_dim // 2),
            NORM=norm_HD is not None,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return heads_NHD


@triton.jit
def _rotate_kernel(
    heads_NHD: tl.tensor,
    cos_ND: tl.tensor,
    sin_ND: tl.tensor,
    norm_HD: tl.tensor,
    stride_N: tl.int32,
    eps: tl.float32,
    HEAD_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    NORM: tl.constexpr,
) -> None:
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, PADDED_HALF)
    mask = dims < half
    low = heads_NHD + token * stride_N + head * HEAD_DIM + dims
    x_F = tl.load(low, mask=mask, other=0.0).to(tl.float32)
    y_F = tl.load(low + half, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        mean = (tl.sum(x_F * x_F, axis=0) + tl.sum(y_F * y_F, axis=0)) / HEAD_DIM
        factor = 1.0 / tl.sqrt(mean + eps)
        weight = norm_HD + head * HEAD_DIM + dims
        x_F *= factor * tl.load(weight, mask=mask, other=0.0).to(tl.float32)
        y_F *= factor * tl.load(weight + half, mask=mask, other=0.0).to(tl.float32)
    angle = token * HEAD_DIM + dims
    cos_x_F = tl.load(cos_ND + angle, mask=mask).to(tl.float32)
    cos_y_F = tl.load(cos_ND + angle + half, mask=mask).to(tl.float32)
    sin_x_F = tl.load(sin_ND + angle, mask=mask).to(tl.float32)
    sin_y_F = tl.load(sin_ND + angle + half, mask=mask).to(tl.float32)
    element = heads_NHD.dtype.element_ty
    tl.store(low, (x_F * cos_x_F + y_F * sin_x_F).to(element), mask=mask)
    tl.store(low + half, (y_F * cos_y_F + x_F * sin_y_F).to(element), mask=mask)
