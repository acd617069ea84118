"""Write of one new token per lane into its partial page."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference


def store_tokens(
    arena_NTCD: Tensor, *, slots_BH: Tensor, offsets_B: Tensor, k_BHD: Tensor, v_BHD: Tensor
) -> None:
    """Write key and value of one token per lane to ``offsets`` in page ``slots``.

    Shapes: arena (N, T, 2, D) contiguous; slots (B, H) int32, negative: the lane writes nothing;
    offsets (B,) int32, tokens from the start of the page; k, v (B, H, D) in the arena's dtype,
    their last dimension contiguous. No two lanes may share a slot.
    Changes: arena, on the current stream.
    Errors: AssertionError on other shapes or dtypes.
    Source: ours.
    """
    num_heads, head_dim = slots_BH.shape[1], arena_NTCD.shape[3]
    assert arena_NTCD.is_contiguous() and arena_NTCD.shape[2] == 2
    assert slots_BH.dtype == offsets_B.dtype == torch.int32
    assert k_BHD.shape == v_BHD.shape == (len(offsets_B), num_heads, head_dim)
    assert k_BHD.dtype == v_BHD.dtype == arena_NTCD.dtype
    assert k_BHD.stride(2) == v_BHD.stride(2) == 1
    run = _launch if arena_NTCD.is_cuda else reference.store_tokens
    run(arena_NTCD, slots_BH=slots_BH, offsets_B=offsets_B, k_BHD=k_BHD, v_BHD=v_BHD)


def _launch(
    arena_NTCD: Tensor, *, slots_BH: Tensor, offsets_B: Tensor, k_BHD: Tensor, v_BHD: Tensor
) -> None:
    assert slots_BH.is_contiguous() and offsets_B.is_contiguous()
    num_requests, num_heads, head_dim = k_BHD.shape
    if num_requests:
        _store_kernel[(num_requests, num_heads)](
            arena_NTCD,
            slots_BH,
            offsets_B,
            k_BHD,
            v_BHD,
            *k_BHD.stride()[:2],
            *v_BHD.stride()[:2],
            PAGE_SIZE=arena_NTCD.shape[1],
            HEAD_DIM=head_dim,
            PADDED_DIM=triton.next_power_of_2(head_dim),
            num_warps=1,
            enable_fp_fusion=True,
        )


@triton.jit
def _store_kernel(
    arena_NTCD: tl.tensor,
    slots_BH: tl.tensor,
    offsets_B: tl.tensor,
    k_BHD: tl.tensor,
    v_BHD: tl.tensor,
    k_stride_B: tl.int32,
    k_stride_H: tl.int32,
    v_stride_B: tl.int32,
    v_stride_H: tl.int32,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
) -> None:
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_BH + request * tl.num_programs(1) + head).to(tl.int64)
    if slot < 0:
        return
    offset = tl.load(offsets_B + request)
    dims = tl.arange(0, PADDED_DIM)
    mask = dims < HEAD_DIM
    token = arena_NTCD + (slot * PAGE_SIZE + offset) * (2 * HEAD_DIM) + dims
    k_D = tl.load(k_BHD + request * k_stride_B + head * k_stride_H + dims, mask=mask)
    v_D = tl.load(v_BHD + request * v_stride_B + head * v_stride_H + dims, mask=mask)
    tl.store(token, k_D, mask=mask)
    tl.store(token + HEAD_DIM, v_D, mask=mask)
