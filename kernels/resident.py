"""Attention of decode tokens over requests whose whole KV lies in the hot tier, block by block.

Shape legend: B requests, Q tokens of each (N = B * Q), H KV heads, G query heads per KV head,
X = Q * G lines of a KV head (in a kernel: a tile of them), D head dim, W tokens of a tile,
I items, S items merged at a time, R rows of the page tables, F frames of a row, M frames of all
rows and the spare one, L layers, P pages of a block.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference
from sparsed.kernels.softmax import absorb

BLOCK_TOKENS = 128  # tokens of a block: contiguous in the arena
MAX_QUERIES = 8
_TILE_BYTES = 32 << 10  # of keys, half of it in float32; as many of values
_MAX_LINES = 64  # of a tile, and no more than half its tokens; those beyond are another program's
_TILE_ITEMS = 16
_MIN_DOT = 16  # tl.dot takes no smaller side
_LOG2_E = 1.4426950408889634


class ResidentPlan(NamedTuple):
    """What is read for whom: made on the host once a step, the same for every layer.

    All int32, on the arena's device. ``rows_B``: row of the page tables. ``lengths_B``: tokens of
    the request, those of this step included; at least Q, or 0: padding. ``items_I3``: (b, first
    token, token after the last), the items of a request one after the other in order, first
    tokens multiples of 128; ``first_item_B``: where those of b begin; ``num_items_1``: how many
    there are.
    """

    rows_B: Tensor
    lengths_B: Tensor
    items_I3: Tensor
    first_item_B: Tensor
    num_items_1: Tensor


def attend_resident(
    q_NHD: Tensor,
    arena_NTCD: Tensor,
    *,
    frames_RF: Tensor,
    page_slot_MLHP: Tensor,
    layer: int,
    plan: ResidentPlan,
    scale: float,
    programs: int,
) -> Tensor:
    """Causal softmax attention of the last Q tokens of every request over all its tokens.

    Shapes: q (B * Q, H * G, D), the tokens of a request one after the other, Q at most 8, heads
    and dims contiguous; arena (slots, T, 2, D) contiguous, T a power of two up to 128, keys first;
    frames (R, F) int32: the frame of each 128 tokens of a row; page_slot (M, L, H, P) int32,
    P * T = 128: the slots of the pages of a frame; those of a block lie in consecutive slots, of
    which the first is read; both contiguous. Returns o like q, contiguous; 0 for padding. At most ``programs`` programs a
    KV head for every tile of its Q * G lines.
    Units: logits are q.k * scale.
    Precision: dot products in the arena's dtype (float32 is never rounded), sums in float32.
    A request's result depends on its own tokens and items alone, never on the batch.
    Errors: AssertionError on other shapes or dtypes.
    Source: split-K flash decoding, arXiv 2205.14135 and its follow-up on decoding; ours.
    """
    num_requests, num_heads = len(plan.rows_B), page_slot_MLHP.shape[2]
    assert q_NHD.shape[0] % num_requests == 0 and q_NHD.shape[0] <= MAX_QUERIES * num_requests
    assert q_NHD.shape[1] % num_heads == 0 and q_NHD.shape[2] == arena_NTCD.shape[3]
    assert q_NHD.stride(2) == 1 and q_NHD.stride(1) == q_NHD.shape[2]
    assert arena_NTCD.is_contiguous() and frames_RF.is_contiguous()
    assert page_slot_MLHP.is_contiguous() and arena_NTCD.shape[2] == 2
    assert arena_NTCD.shape[1] * page_slot_MLHP.shape[3] == BLOCK_TOKENS
    assert frames_RF.dtype == page_slot_MLHP.dtype == torch.int32
    assert all(x.dtype == torch.int32 for x in plan)
    if not arena_NTCD.is_cuda:
        slots_MHP = page_slot_MLHP[:, layer]
        return reference.attend_resident(q_NHD, arena_NTCD, frames_RF, slots_MHP, plan, scale)
    return _launch(q_NHD, arena_NTCD, frames_RF, page_slot_MLHP, layer, plan, scale, programs)


def _launch(
    q_NHD: Tensor,
    arena_NTCD: Tensor,
    frames_RF: Tensor,
    page_slot_MLHP: Tensor,
    layer: int,
    plan: ResidentPlan,
    scale: float,
    programs: int,
) -> Tensor:
    _, num_layers, num_heads, _ = page_slot_MLHP.shape
    head_dim, num_items = q_NHD.shape[2], len(plan.items_I3)
    num_lines = len(q_NHD) // len(plan.rows_B) * q_NHD.shape[1] // num_heads
    tile = _tile(num_lines, triton.next_power_of_2(head_dim), arena_NTCD.element_size())
    num_tiles = triton.cdiv(num_lines, tile["TILE_LINES"])
    o_IHXD = q_NHD.new_empty((num_items, num_heads, num_lines, head_dim), dtype=torch.float32)
    lse_IHX = q_NHD.new_empty((num_items, num_heads, num_lines), dtype=torch.float32)
    _attend_kernel[(min(programs, num_items), num_heads, num_tiles)](
        q_NHD,
        arena_NTCD,
        frames_RF,
        page_slot_MLHP,
        plan.rows_B,
        plan.lengths_B,
        plan.items_I3,
        plan.num_items_1,
        o_IHXD,
        lse_IHX,
        scale * _LOG2_E,
        layer,
        num_layers,
        frames_RF.shape[1],
        q_NHD.stride(0),
        NUM_HEADS=num_heads,
        GROUP=q_NHD.shape[1] // num_heads,
        NUM_LINES=num_lines,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        PAGE_SIZE=arena_NTCD.shape[1],
        BLOCK_TOKENS=BLOCK_TOKENS,
        num_stages=2,
        enable_fp_fusion=True,
        **tile,
    )
    return _merge_items(o_IHXD, lse_IHX, plan, like_NHD=q_NHD)


def _tile(num_lines: int, padded_dim: int, element_bytes: int) -> dict[str, int | None]:
    """The largest tile that fits the registers and shared memory of sm_80 to sm_100, two programs
    on a multiprocessor."""
    tile_tokens = _TILE_BYTES // (element_bytes // 2) // (padded_dim * element_bytes)
    max_lines = min(triton.next_power_of_2(num_lines), tile_tokens // 2, _MAX_LINES)
    tile_lines = max(_MIN_DOT, max_lines)
    num_warps = 4 if tile_lines == _MIN_DOT else 8
    return {
        "TILE_LINES": tile_lines,
        "TILE_TOKENS": min(max(_MIN_DOT, tile_tokens), BLOCK_TOKENS),
        "num_warps": num_warps,
        "maxnreg": 128 if num_warps == 8 else None,  # fewer warps stay below 256 anyway
    }


def _merge_items(
    o_IHXD: Tensor, lse_IHX: Tensor, plan: ResidentPlan, *, like_NHD: Tensor
) -> Tensor:
    num_heads, num_lines, head_dim = o_IHXD.shape[1:]
    o_NHD = torch.empty_like(like_NHD, memory_format=torch.contiguous_format)
    _merge_kernel[(len(plan.rows_B) * num_heads, num_lines)](
        o_IHXD,
        lse_IHX,
        plan.lengths_B,
        plan.first_item_B,
        plan.num_items_1,
        o_NHD,
        len(plan.rows_B),
        NUM_HEADS=num_heads,
        GROUP=like_NHD.shape[1] // num_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        TILE_ITEMS=_TILE_ITEMS,
        enable_fp_fusion=True,
    )
    return o_NHD


@triton.jit(do_not_specialize=["layer", "num_columns"])
def _attend_kernel(
    q_NHD: tl.tensor,
    arena_NTCD: tl.tensor,
    frames_RF: tl.tensor,
    page_slot_MLHP: tl.tensor,
    rows_B: tl.tensor,
    lengths_B: tl.tensor,
    items_I3: tl.tensor,
    num_items_1: tl.tensor,
    o_IHXD: tl.tensor,
    lse_IHX: tl.tensor,
    scale_log2: tl.float32,
    layer: tl.int32,
    num_layers: tl.int32,
    num_columns: tl.int32,
    q_stride: tl.int32,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_LINES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_LINES: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
) -> None:
    head = tl.program_id(1)
    lines = tl.program_id(2) * TILE_LINES + tl.arange(0, TILE_LINES)
    dims = tl.arange(0, PADDED_DIM)
    mask_XD = (lines < NUM_LINES)[:, None] & (dims < HEAD_DIM)[None, :]
    frame_pages = num_layers * NUM_HEADS * (BLOCK_TOKENS // PAGE_SIZE)
    pages = page_slot_MLHP + (layer * NUM_HEADS + head) * (BLOCK_TOKENS // PAGE_SIZE)
    for item in range(tl.program_id(0), tl.load(num_items_1), tl.num_programs(0)):
        b = tl.load(items_I3 + item * 3)
        first, last = tl.load(items_I3 + item * 3 + 1), tl.load(items_I3 + item * 3 + 2)
        token_X = b * (NUM_LINES // GROUP) + lines // GROUP
        q = q_NHD + token_X.to(tl.int64)[:, None] * q_stride + dims[None, :]
        q += (head * GROUP + lines % GROUP)[:, None] * HEAD_DIM
        q_XD = tl.load(q, mask=mask_XD, other=0.0).to(arena_NTCD.dtype.element_ty)
        num_after_X = NUM_LINES // GROUP - 1 - lines // GROUP
        seen_X = tl.minimum(tl.load(lengths_B + b) - num_after_X, last)
        frames = frames_RF + tl.load(rows_B + b).to(tl.int64) * num_columns
        first_frame = tl.load(frames + first // BLOCK_TOKENS).to(tl.int64)
        slot = tl.load(pages + first_frame * frame_pages)
        peak_X = tl.full([TILE_LINES], float("-inf"), tl.float32)  # logits in powers of two
        sum_X = tl.zeros([TILE_LINES], tl.float32)
        o_XD = tl.zeros([TILE_LINES, PADDED_DIM], tl.float32)
        for start in range(first, last, TILE_TOKENS):
            tokens = start + tl.arange(0, TILE_TOKENS)
            token_W = slot.to(tl.int64) * PAGE_SIZE + tokens % BLOCK_TOKENS
            kv_WD = arena_NTCD + token_W[:, None] * (2 * HEAD_DIM) + dims[None, :]
            mask_WD = (tokens < last)[:, None] & (dims < HEAD_DIM)[None, :]
            k_WD = tl.load(kv_WD, mask=mask_WD, other=0.0)
            v_WD = tl.load(kv_WD + HEAD_DIM, mask=mask_WD, other=0.0)
            # The next tile's slot is two loads away: they are under way while this tile is read.
            next_block = tl.minimum(start + TILE_TOKENS, last - 1) // BLOCK_TOKENS
            next_frame = tl.load(frames + next_block).to(tl.int64)
            next_slot = tl.load(pages + next_frame * frame_pages)
            logits_XW = tl.dot(q_XD, tl.trans(k_WD), input_precision="ieee") * scale_log2
            seen_XW = tokens[None, :] < seen_X[:, None]
            logits_XW = tl.where(seen_XW, logits_XW, float("-inf"))
            peak_X, sum_X, o_XD = absorb(logits_XW, v_WD, peak_X, sum_X, o_XD)
            slot = next_slot
        out_X = (item * NUM_HEADS + head) * NUM_LINES + lines.to(tl.int64)
        divisor_X = tl.where(sum_X > 0.0, sum_X, 1.0)
        o = o_IHXD + out_X[:, None] * HEAD_DIM + dims[None, :]
        tl.store(o, o_XD / divisor_X[:, None], mask=mask_XD)
        tl.store(lse_IHX + out_X, peak_X + tl.log2(divisor_X), mask=lines < NUM_LINES)


@triton.jit(do_not_specialize=["num_requests"])
def _merge_kernel(
    o_IHXD: tl.tensor,
    lse_IHX: tl.tensor,
    lengths_B: tl.tensor,
    first_item_B: tl.tensor,
    num_items_1: tl.tensor,
    o_NHD: tl.tensor,
    num_requests: tl.int32,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_ITEMS: tl.constexpr,
) -> None:
    b, head, line = tl.program_id(0) // NUM_HEADS, tl.program_id(0) % NUM_HEADS, tl.program_id(1)
    num_lines = tl.num_programs(1)
    dims = tl.arange(0, PADDED_DIM)
    end = tl.load(num_items_1)
    if b + 1 < num_requests:
        end = tl.load(first_item_B + b + 1)
    peak = float("-inf")
    total = 0.0
    o_D = tl.zeros([PADDED_DIM], tl.float32)
    for start in range(tl.load(first_item_B + b), end, TILE_ITEMS):
        items = start + tl.arange(0, TILE_ITEMS)
        line_S = (items.to(tl.int64) * NUM_HEADS + head) * num_lines + line
        lse_S = tl.load(lse_IHX + line_S, mask=items < end, other=float("-inf"))
        o = o_IHXD + line_S[:, None] * HEAD_DIM + dims[None, :]
        o_SD = tl.load(o, mask=(items < end)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        new_peak = tl.maximum(peak, tl.max(lse_S, axis=0))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight_S = tl.exp2(lse_S - base)
        keep = tl.exp2(peak - base)
        total = total * keep + tl.sum(weight_S, axis=0)
        o_D = o_D * keep + tl.sum(o_SD * weight_S[:, None], axis=0)
        peak = new_peak
    token = (b * (num_lines // GROUP) + line // GROUP).to(tl.int64)
    out = (token * NUM_HEADS + head) * GROUP + line % GROUP
    empty = (total == 0.0) | (tl.load(lengths_B + b) == 0)
    o_D = tl.where(empty, 0.0, o_D / tl.where(empty, 1.0, total))
    tl.store(o_NHD + out * HEAD_DIM + dims, o_D, mask=dims < HEAD_DIM)
