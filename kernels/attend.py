"""Attention of one decode token over chosen pages of the hot tier."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference
from sparsed.kernels.softmax import absorb

_TILE_BYTES = 16 << 10  # of keys; as many of values
_SPLIT_TOKENS = 256  # fixed, so that a result never depends on who else is in the batch
_TILE_SPLITS = 16
_MIN_DOT = 16  # tl.dot takes no smaller side
_LOG2_E = 1.4426950408889634


def attend_pages(
    q_BHGD: Tensor, arena_NTCD: Tensor, *, slots_BHK: Tensor, tail_tokens_B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each lane's G query heads over the tokens of its K pages.

    The last column is the partial page, of which the first ``tail_tokens`` tokens count; every
    other page is full. An absent page counts for nothing, and is never read.

    Shapes: q (B, H, G, D) contiguous; arena (N, T, 2, D) contiguous, T a power of two, keys
    first; slots (B, H, K) int32, negative: absent; tail_tokens (B,) int32, 0 to T. Returns o
    (B, H, G, D) and lse (B, H, G), float32; no token at all gives o = 0, lse = -inf.
    Units: logits are q.k * scale; lse is the natural log of the sum of their exponentials.
    Precision: dot products in the arena's dtype (float32 is never rounded), sums in float32.
    Errors: AssertionError on other shapes or dtypes.
    Source: split-K flash decoding, arXiv 2205.14135 and its follow-up on decoding; ours.
    """
    assert q_BHGD.shape[:2] == slots_BHK.shape[:2] and q_BHGD.shape[3] == arena_NTCD.shape[3]
    assert q_BHGD.is_contiguous() and arena_NTCD.is_contiguous() and slots_BHK.is_contiguous()
    assert arena_NTCD.shape[2] == 2 and arena_NTCD.shape[1].bit_count() == 1
    assert slots_BHK.dtype == tail_tokens_B.dtype == torch.int32
    assert tail_tokens_B.shape == q_BHGD.shape[:1] and slots_BHK.shape[2] > 0
    run = _launch if arena_NTCD.is_cuda else reference.attend_pages
    return run(q_BHGD, arena_NTCD, slots_BHK=slots_BHK, tail_tokens_B=tail_tokens_B, scale=scale)


def _launch(
    q_BHGD: Tensor, arena_NTCD: Tensor, *, slots_BHK: Tensor, tail_tokens_B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    num_requests, num_heads, group, head_dim = q_BHGD.shape
    num_columns, page_size = slots_BHK.shape[2], arena_NTCD.shape[1]
    num_splits = triton.cdiv(num_columns * page_size, _SPLIT_TOKENS)
    padded_dim = triton.next_power_of_2(head_dim)
    tile_tokens = _TILE_BYTES // (padded_dim * arena_NTCD.element_size())
    shape = (num_requests, num_heads, num_splits, group)
    o_BHSGD = q_BHGD.new_empty((*shape, head_dim), dtype=torch.float32)
    lse_BHSG = q_BHGD.new_empty(shape, dtype=torch.float32)
    if num_requests:
        _attend_kernel[(num_requests * num_heads, num_splits)](
            q_BHGD,
            arena_NTCD,
            slots_BHK,
            tail_tokens_B,
            o_BHSGD,
            lse_BHSG,
            scale * _LOG2_E,
            num_columns,
            NUM_HEADS=num_heads,
            GROUP=group,
            PADDED_GROUP=max(_MIN_DOT, triton.next_power_of_2(group)),
            PAGE_SIZE=page_size,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim,
            TILE_TOKENS=min(max(_MIN_DOT, tile_tokens), _SPLIT_TOKENS),
            SPLIT_TOKENS=_SPLIT_TOKENS,
            num_stages=3,
            enable_fp_fusion=True,
        )
    if num_splits == 1:
        return o_BHSGD[:, :, 0], lse_BHSG[:, :, 0]
    return _merge_splits(o_BHSGD, lse_BHSG)


def _merge_splits(o_BHSGD: Tensor, lse_BHSG: Tensor) -> tuple[Tensor, Tensor]:
    num_requests, num_heads, num_splits, group, head_dim = o_BHSGD.shape
    o_BHGD = o_BHSGD.new_empty((num_requests, num_heads, group, head_dim))
    lse_BHG = o_BHSGD.new_empty((num_requests, num_heads, group))
    if num_requests:
        _merge_kernel[(num_requests * num_heads, group)](
            o_BHSGD,
            lse_BHSG,
            o_BHGD,
            lse_BHG,
            num_splits,
            HEAD_DIM=head_dim,
            PADDED_DIM=triton.next_power_of_2(head_dim),
            TILE_SPLITS=_TILE_SPLITS,
            enable_fp_fusion=True,
        )
    return o_BHGD, lse_BHG


@triton.jit(do_not_specialize=["num_columns"])
def _attend_kernel(
    q_BHGD: tl.tensor,
    arena_NTCD: tl.tensor,
    slots_BHK: tl.tensor,
    tail_tokens_B: tl.tensor,
    o_BHSGD: tl.tensor,
    lse_BHSG: tl.tensor,
    scale_log2: tl.float32,
    num_columns: tl.int32,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
) -> None:
    lane = tl.program_id(0).to(tl.int64)
    groups, dims = tl.arange(0, PADDED_GROUP), tl.arange(0, PADDED_DIM)
    mask_GD = (groups < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q = q_BHGD + (lane * GROUP + groups)[:, None] * HEAD_DIM + dims[None, :]
    q_GD = tl.load(q, mask=mask_GD, other=0.0).to(arena_NTCD.dtype.element_ty)

    peak_G = tl.full([PADDED_GROUP], float("-inf"), tl.float32)  # logits in powers of two
    sum_G = tl.zeros([PADDED_GROUP], tl.float32)
    o_GD = tl.zeros([PADDED_GROUP, PADDED_DIM], tl.float32)
    num_tokens = (num_columns - 1) * PAGE_SIZE + tl.load(tail_tokens_B + lane // NUM_HEADS)
    first = tl.program_id(1) * SPLIT_TOKENS
    for start in range(first, min(first + SPLIT_TOKENS, num_tokens), TILE_TOKENS):
        tokens = start + tl.arange(0, TILE_TOKENS)
        slots = slots_BHK + lane * num_columns + tokens // PAGE_SIZE
        slot_W = tl.load(slots, mask=tokens < num_tokens, other=-1).to(tl.int64)
        token_W = arena_NTCD + (slot_W * PAGE_SIZE + tokens % PAGE_SIZE) * (2 * HEAD_DIM)
        kv_WD = token_W[:, None] + dims[None, :]
        mask_WD = (slot_W >= 0)[:, None] & (dims < HEAD_DIM)[None, :]
        k_WD = tl.load(kv_WD, mask=mask_WD, other=0.0)
        v_WD = tl.load(kv_WD + HEAD_DIM, mask=mask_WD, other=0.0)

        logits_GW = tl.dot(q_GD, tl.trans(k_WD), input_precision="ieee") * scale_log2
        logits_GW = tl.where((slot_W >= 0)[None, :], logits_GW, float("-inf"))
        peak_G, sum_G, o_GD = absorb(logits_GW, v_WD, peak_G, sum_G, o_GD)

    row_G = (lane * tl.num_programs(1) + tl.program_id(1)) * GROUP + groups
    divisor_G = tl.where(sum_G > 0.0, sum_G, 1.0)
    o_GD = o_GD / divisor_G[:, None]
    lse_G = (peak_G + tl.log2(divisor_G)) * 0.6931471805599453  # ln 2
    tl.store(o_BHSGD + row_G[:, None] * HEAD_DIM + dims[None, :], o_GD, mask=mask_GD)
    tl.store(lse_BHSG + row_G, lse_G, mask=groups < GROUP)


@triton.jit(do_not_specialize=["num_splits"])
def _merge_kernel(
    o_BHSGD: tl.tensor,
    lse_BHSG: tl.tensor,
    o_BHGD: tl.tensor,
    lse_BHG: tl.tensor,
    num_splits: tl.int32,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_SPLITS: tl.constexpr,
) -> None:
    lane, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_groups = tl.num_programs(1)
    dims = tl.arange(0, PADDED_DIM)
    peak = float("-inf")
    total = 0.0
    o_D = tl.zeros([PADDED_DIM], tl.float32)
    for start in range(0, num_splits, TILE_SPLITS):
        splits = start + tl.arange(0, TILE_SPLITS)
        row_S = (lane * num_splits + splits) * num_groups + group
        lse_S = tl.load(lse_BHSG + row_S, mask=splits < num_splits, other=float("-inf"))
        mask_SD = (splits < num_splits)[:, None] & (dims < HEAD_DIM)[None, :]
        o_SD = tl.load(o_BHSGD + row_S[:, None] * HEAD_DIM + dims[None, :], mask=mask_SD, other=0.0)
        new_peak = tl.maximum(peak, tl.max(lse_S, axis=0))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight_S = tl.exp(lse_S - base)
        keep = tl.exp(peak - base)
        total = total * keep + tl.sum(weight_S, axis=0)
        o_D = o_D * keep + tl.sum(o_SD * weight_S[:, None], axis=0)
        peak = new_peak
    row = lane * num_groups + group
    divisor = tl.where(total > 0.0, total, 1.0)
    tl.store(o_BHGD + row * HEAD_DIM + dims, o_D / divisor, mask=dims < HEAD_DIM)
    tl.store(lse_BHG + row, peak + tl.log(divisor))
