"""Attention of one decode token to the selected pages of a lane: first to those that were in the
hot tier, then to those that had to be fetched and to the partial page.

Shape legend: B requests, H KV heads, G query heads per KV head, D head dim, K selected pages of a
lane, N slots of the arena, T tokens of a page (of a tile: W), S splits of the hits.
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference_selected
from sparsed.kernels.softmax import absorb, join, nothing

SPLIT_TOKENS: Final = 256  # fixed, so that a result never depends on who else is in the batch
_TILE_BYTES = 16 << 10  # of keys; as many of values
_SPLITS_AT_ONCE = tl.constexpr(4)  # read before the first of them is needed
_MIN_DOT = 16  # tl.dot takes no smaller side
_HITS_REGISTERS = 128  # a thread: four programs fit one multiprocessor
_LOG2_E = 1.4426950408889634


class Selected(NamedTuple):
    """Where the pages are that each lane attends to, as ``resolve_pages`` says it.

    ``slots_BHK`` int32: hits, then misses, then -1; ``num_hits_BH`` int32. ``count_B`` int32: hits
    and misses of each lane of the request; 0: it attends to nothing here, not even to the partial
    page ``tail_slots_BH`` int32, of which ``tail_tokens_B`` int32 tokens count (1 to T).
    """

    slots_BHK: Tensor
    num_hits_BH: Tensor
    count_B: Tensor
    tail_slots_BH: Tensor
    tail_tokens_B: Tensor


class Partials(NamedTuple):
    """Attention over parts of the hits: ``o_BHSGD`` and ``lse_BHSG`` float32, lse a log of 2."""

    o_BHSGD: Tensor
    lse_BHSG: Tensor


def num_splits(num_columns: int, page_size: int) -> int:
    """Splits of so many hits of a lane."""
    return -(-num_columns * page_size // SPLIT_TOKENS)


def make_partials(selected: Selected, q_BHGD: Tensor, *, page_size: int) -> Partials:
    """Room for what ``attend_hits`` writes."""
    num_requests, num_heads, group, head_dim = q_BHGD.shape
    splits = num_splits(selected.slots_BHK.shape[2], page_size)
    shape = (num_requests, num_heads, splits, group)
    o_BHSGD = q_BHGD.new_empty((*shape, head_dim), dtype=torch.float32)
    return Partials(o_BHSGD, q_BHGD.new_empty(shape, dtype=torch.float32))


def attend_hits(
    q_BHGD: Tensor, arena_NTCD: Tensor, *, selected: Selected, partials: Partials, scale: float
) -> None:
    """Attend to the pages that were hot.

    Shapes: q (B, H, G, D) contiguous; arena (N, T, 2, D) contiguous, T a power of two, keys first;
    ``selected`` and ``partials`` as there. A slot of -1 counts for nothing, and is never read.
    Units: logits are q.k * scale.
    Precision: dot products in the arena's dtype (float32 is never rounded), sums in float32.
    Changes: ``partials``, on the current stream.
    Errors: AssertionError on other shapes or dtypes.
    Source: split-K flash decoding, arXiv 2205.14135 and its follow-up on decoding; ours.
    """
    _check(q_BHGD, arena_NTCD, selected, partials)
    run = _launch_hits if q_BHGD.is_cuda else reference_selected.attend_hits
    run(q_BHGD, arena_NTCD, selected, partials, scale)


def attend_rest(
    q_BHGD: Tensor,
    arena_NTCD: Tensor,
    *,
    selected: Selected,
    partials: Partials,
    scale: float,
    out_BHGD: Tensor,
    lse_BHG: Tensor,
) -> None:
    """Attend to the pages that have been fetched and to the partial page, and to what
    ``attend_hits`` has made of the others: attention over all of them.

    Shapes: as in ``attend_hits``; out (B, H, G, D) contiguous, any floating dtype; lse (B, H, G)
    float32, natural log. Requests with ``count`` 0 leave both as they are.
    Changes: ``out`` and ``lse``, on the current stream.
    Source: the log-sum-exp merge of FlashDecoding and of FlashInfer, arXiv 2501.01005.
    """
    _check(q_BHGD, arena_NTCD, selected, partials)
    assert out_BHGD.shape == q_BHGD.shape and out_BHGD.is_contiguous()
    assert lse_BHG.shape == out_BHGD.shape[:3] and lse_BHG.dtype == torch.float32
    assert lse_BHG.is_contiguous()
    run = _launch_rest if q_BHGD.is_cuda else reference_selected.attend_rest
    run(q_BHGD, arena_NTCD, selected, partials, scale, out_BHGD, lse_BHG)


def _check(q_BHGD: Tensor, arena_NTCD: Tensor, selected: Selected, partials: Partials) -> None:
    num_requests, num_heads, group, head_dim = q_BHGD.shape
    page_size = arena_NTCD.shape[1]
    assert q_BHGD.is_contiguous() and arena_NTCD.is_contiguous()
    assert arena_NTCD.shape[2:] == (2, head_dim) and page_size.bit_count() == 1
    assert selected.slots_BHK.shape[:2] == (num_requests, num_heads)
    assert selected.num_hits_BH.shape == selected.tail_slots_BH.shape == (num_requests, num_heads)
    assert selected.count_B.shape == selected.tail_tokens_B.shape == (num_requests,)
    assert all(part.dtype == torch.int32 and part.is_contiguous() for part in selected)
    splits = num_splits(selected.slots_BHK.shape[2], page_size)
    assert partials.o_BHSGD.shape == (num_requests, num_heads, splits, group, head_dim)
    assert partials.lse_BHSG.shape == (num_requests, num_heads, splits, group)


def _launch_hits(
    q_BHGD: Tensor, arena_NTCD: Tensor, selected: Selected, partials: Partials, scale: float
) -> None:
    num_requests, num_heads, splits = partials.o_BHSGD.shape[:3]
    if num_requests:
        _hits_kernel[(num_requests * num_heads, splits)](
            q_BHGD,
            arena_NTCD,
            *selected[:3],
            *partials,
            scale * _LOG2_E,
            selected.slots_BHK.shape[2],
            SPLIT_TOKENS=SPLIT_TOKENS,
            **_shape(q_BHGD, arena_NTCD),
            num_stages=2,
            maxnreg=_HITS_REGISTERS,
            enable_fp_fusion=True,
        )


def _launch_rest(
    q_BHGD: Tensor,
    arena_NTCD: Tensor,
    selected: Selected,
    partials: Partials,
    scale: float,
    out_BHGD: Tensor,
    lse_BHG: Tensor,
) -> None:
    num_requests, num_heads, splits = partials.o_BHSGD.shape[:3]
    if num_requests:
        _rest_kernel[(num_requests * num_heads,)](
            q_BHGD,
            arena_NTCD,
            *selected,
            *partials,
            out_BHGD,
            lse_BHG,
            scale * _LOG2_E,
            selected.slots_BHK.shape[2],
            splits,
            SPLIT_TOKENS=SPLIT_TOKENS,
            **_shape(q_BHGD, arena_NTCD),
            num_stages=3,
            enable_fp_fusion=True,
        )


def _shape(q_BHGD: Tensor, arena_NTCD: Tensor) -> dict[str, int]:
    """Constants of a kernel."""
    _, num_heads, group, head_dim = q_BHGD.shape
    padded_dim = triton.next_power_of_2(head_dim)
    tile_tokens = _TILE_BYTES // (padded_dim * arena_NTCD.element_size())
    return {
        "NUM_HEADS": num_heads,
        "GROUP": group,
        "PADDED_GROUP": max(_MIN_DOT, triton.next_power_of_2(group)),
        "PAGE_SIZE": arena_NTCD.shape[1],
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_dim,
        "TILE_TOKENS": min(max(_MIN_DOT, tile_tokens), SPLIT_TOKENS),
    }


# Some are a part of a larger tensor, wherever it begins: a CUDA graph cannot compile a variant.
_VIEWS = ["slots_BHK", "num_hits_BH", "count_B"]
_TAIL_VIEWS = ["tail_slots_BH", "tail_tokens_B", "lse_BHG"]


@triton.jit(do_not_specialize=["num_columns"], do_not_specialize_on_alignment=_VIEWS)
def _hits_kernel(
    q_BHGD: tl.tensor,
    arena_NTCD: tl.tensor,
    slots_BHK: tl.tensor,
    num_hits_BH: tl.tensor,
    count_B: tl.tensor,
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
    lane, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_tokens = tl.load(num_hits_BH + lane) * PAGE_SIZE
    first = split * SPLIT_TOKENS
    if (tl.load(count_B + lane // NUM_HEADS) == 0) | (first >= num_tokens):
        return
    groups, dims = tl.arange(0, PADDED_GROUP), tl.arange(0, PADDED_DIM)
    q_GD = _load_query(q_BHGD, lane, arena_NTCD, GROUP, PADDED_GROUP, HEAD_DIM, PADDED_DIM)
    state = nothing(PADDED_GROUP, PADDED_DIM)
    for start in range(first, min(first + SPLIT_TOKENS, num_tokens), TILE_TOKENS):
        tokens = start + tl.arange(0, TILE_TOKENS)
        slots = slots_BHK + lane * num_columns + tokens // PAGE_SIZE
        slot_W = tl.load(slots, mask=tokens < num_tokens, other=-1)
        state = _attend(
            q_GD, slot_W, tokens % PAGE_SIZE, arena_NTCD, scale_log2, state,
            PAGE_SIZE, HEAD_DIM, PADDED_DIM,
        )  # fmt: skip
    peak_G, sum_G, o_GD = state
    row_G = (lane * tl.num_programs(1) + split) * GROUP + groups
    divisor_G = tl.where(sum_G > 0.0, sum_G, 1.0)
    mask_GD = (groups < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    out = o_BHSGD + row_G[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out, o_GD / divisor_G[:, None], mask=mask_GD)
    tl.store(lse_BHSG + row_G, peak_G + tl.log2(divisor_G), mask=groups < GROUP)


@triton.jit(
    do_not_specialize=["num_columns", "num_splits"],
    do_not_specialize_on_alignment=[*_VIEWS, *_TAIL_VIEWS],
)
def _rest_kernel(
    q_BHGD: tl.tensor,
    arena_NTCD: tl.tensor,
    slots_BHK: tl.tensor,
    num_hits_BH: tl.tensor,
    count_B: tl.tensor,
    tail_slots_BH: tl.tensor,
    tail_tokens_B: tl.tensor,
    o_BHSGD: tl.tensor,
    lse_BHSG: tl.tensor,
    out_BHGD: tl.tensor,
    lse_BHG: tl.tensor,
    scale_log2: tl.float32,
    num_columns: tl.int32,
    num_splits: tl.int32,
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
    count = tl.load(count_B + lane // NUM_HEADS)
    if count == 0:
        return
    num_hits = tl.load(num_hits_BH + lane)
    groups, dims = tl.arange(0, PADDED_GROUP), tl.arange(0, PADDED_DIM)
    mask_GD = (groups < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    hits, ran = nothing(PADDED_GROUP, PADDED_DIM), tl.cdiv(num_hits * PAGE_SIZE, SPLIT_TOKENS)
    for start in range(0, ran, _SPLITS_AT_ONCE):
        for i in tl.static_range(_SPLITS_AT_ONCE):
            split_G = start + i + tl.zeros([PADDED_GROUP], tl.int32)
            row_G = (lane * num_splits + split_G) * GROUP + groups
            mask_G = (groups < GROUP) & (split_G < ran)
            lse_G = tl.load(lse_BHSG + row_G, mask=mask_G, other=float("-inf"))
            part = o_BHSGD + row_G[:, None] * HEAD_DIM + dims[None, :]
            part_GD = tl.load(part, mask=mask_GD & mask_G[:, None], other=0.0)
            hits = join(hits, (lse_G, 1.0, part_GD))
    q_GD = _load_query(q_BHGD, lane, arena_NTCD, GROUP, PADDED_GROUP, HEAD_DIM, PADDED_DIM)
    state = nothing(PADDED_GROUP, PADDED_DIM)
    tail_slot, miss_tokens = tl.load(tail_slots_BH + lane), (count - num_hits) * PAGE_SIZE
    num_tokens = miss_tokens + tl.load(tail_tokens_B + lane // NUM_HEADS)
    for start in range(0, num_tokens, TILE_TOKENS):
        tokens = start + tl.arange(0, TILE_TOKENS)
        slots = slots_BHK + lane * num_columns + num_hits + tokens // PAGE_SIZE
        slot_W = tl.load(slots, mask=tokens < miss_tokens, other=-1)
        is_tail_W = (tokens >= miss_tokens) & (tokens < num_tokens)
        slot_W = tl.where(is_tail_W, tail_slot, slot_W)
        state = _attend(
            q_GD, slot_W, tokens % PAGE_SIZE, arena_NTCD, scale_log2, state,
            PAGE_SIZE, HEAD_DIM, PADDED_DIM,
        )  # fmt: skip
    peak_G, sum_G, o_GD = join(state, hits)
    row_G = lane * GROUP + groups
    divisor_G = tl.where(sum_G > 0.0, sum_G, 1.0)
    o_GD = (o_GD / divisor_G[:, None]).to(out_BHGD.dtype.element_ty)
    tl.store(out_BHGD + row_G[:, None] * HEAD_DIM + dims[None, :], o_GD, mask=mask_GD)
    lse_G = (peak_G + tl.log2(divisor_G)) * 0.6931471805599453  # ln 2
    tl.store(lse_BHG + row_G, lse_G, mask=groups < GROUP)


@triton.jit
def _load_query(
    q_BHGD: tl.tensor,
    lane: tl.tensor,
    arena_NTCD: tl.tensor,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
) -> tl.tensor:
    groups, dims = tl.arange(0, PADDED_GROUP), tl.arange(0, PADDED_DIM)
    mask_GD = (groups < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q = q_BHGD + (lane * GROUP + groups)[:, None] * HEAD_DIM + dims[None, :]
    return tl.load(q, mask=mask_GD, other=0.0).to(arena_NTCD.dtype.element_ty)


@triton.jit
def _attend(
    q_GD: tl.tensor,
    slot_W: tl.tensor,
    offset_W: tl.tensor,
    arena_NTCD: tl.tensor,
    scale_log2: tl.float32,
    state: tl.tuple,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One more tile of tokens; a slot of -1 is none."""
    dims, slot_W = tl.arange(0, PADDED_DIM), slot_W.to(tl.int64)
    token_W = arena_NTCD + (slot_W * PAGE_SIZE + offset_W) * (2 * HEAD_DIM)
    kv_WD = token_W[:, None] + dims[None, :]
    mask_WD = (slot_W >= 0)[:, None] & (dims < HEAD_DIM)[None, :]
    k_WD = tl.load(kv_WD, mask=mask_WD, other=0.0)
    v_WD = tl.load(kv_WD + HEAD_DIM, mask=mask_WD, other=0.0)
    logits_GW = tl.dot(q_GD, tl.trans(k_WD), input_precision="ieee") * scale_log2
    logits_GW = tl.where((slot_W >= 0)[None, :], logits_GW, float("-inf"))
    peak_G, sum_G, o_GD = state
    peak_G, sum_G, o_GD = absorb(logits_GW, v_WD, peak_G, sum_G, o_GD)
    return peak_G, sum_G, o_GD
