"""Dense attention of a prompt chunk over contiguous keys, with its log-sum-exp.

No kernel of ours: torch's flash attention on CPU and CUDA half precision, its memory-efficient
attention for CUDA float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend_dense(
    q_HGND: Tensor, kv_HMCD: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of N queries over M tokens, and log(sum(exp(logits))) to merge it with others.

    Shapes: q (H, G, N, D); kv (H, M, 2, D), any stride but the last; returns o (H, G, N, D) in
    q's dtype and lse (H, G, N), float32, natural log. ``causal``: query i sees tokens 0..i
    (N == M).
    Errors: AssertionError if causal and N != M.
    """
    assert not causal or q_HGND.shape[2] == kv_HMCD.shape[1]
    keys = kv_HMCD[:, None, :, 0].expand(-1, q_HGND.shape[1], -1, -1)
    values = kv_HMCD[:, None, :, 1].expand(-1, q_HGND.shape[1], -1, -1)
    if not q_HGND.is_cuda:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_HGND, keys, values, 0.0, causal, scale=scale
        )
    elif q_HGND.dtype == torch.float32:
        o, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q_HGND, keys, values, None, True, 0.0, causal, scale=scale
        )
        lse = lse[..., : q_HGND.shape[2]]  # padded to a multiple of 32 queries
    else:
        o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q_HGND, keys, values, 0.0, causal, False, scale=scale
        )
    return o, lse
