"""Dense attention of a prompt chunk over contiguous keys, with its log-sum-exp.

No kernel of ours: torch's flash attention on CPU and CUDA half precision or cuDNN's, torch's
memory-efficient attention for CUDA float32.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor


class Backend(StrEnum):
    """Implementations for CUDA half precision; elsewhere there is one."""

    FLASH = "flash"
    CUDNN = "cudnn"


def attend_dense(
    q_HGND: Tensor,
    k_HMD: Tensor,
    v_HMD: Tensor,
    *,
    causal: bool,
    scale: float,
    backend: Backend = Backend.FLASH,
) -> tuple[Tensor, Tensor]:
    """Attention of N queries over M tokens, and log(sum(exp(logits))) to merge it with others.

    Shapes: q (H, G, N, D); k, v (H, M, D), any strides but the last; returns o (H, G, N, D) in
    q's dtype and lse (H, G, N), float32, natural log. ``causal``: query i sees tokens 0..i
    (N == M).
    Errors: AssertionError if causal and N != M; RuntimeError if cuDNN does not know the shape.
    """
    assert not causal or q_HGND.shape[2] == k_HMD.shape[1]
    k, v = (x[:, None].expand(-1, q_HGND.shape[1], -1, -1) for x in (k_HMD, v_HMD))
    aten = torch.ops.aten
    if not q_HGND.is_cuda:
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q_HGND, k, v, 0.0, causal, scale=scale
        )
    elif q_HGND.dtype == torch.float32:
        o, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q_HGND, k, v, None, True, 0.0, causal, scale=scale
        )
        lse = lse[..., : q_HGND.shape[2]]  # padded to a multiple of 32 queries
    elif backend is Backend.CUDNN:
        o, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            q_HGND, k, v, None, True, 0.0, causal, False, scale=scale
        )
        lse = lse.view(q_HGND.shape[:3])
    else:
        o, lse, *_ = aten._scaled_dot_product_flash_attention(
            q_HGND, k, v, 0.0, causal, False, scale=scale
        )
    return o, lse
