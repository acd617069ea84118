"""Attention of one decode token to the selected pages of a lane: first to those that were in the
hot tier and to the partial page, then to those that had to be fetched.

Shape legend: B requests, H KV heads, G query heads per KV head, D head dim, K selected pages of a
lane, N slots of the arena, T tokens of a page, S splits: of hits, the partial page, of misses; a
tile of a kernel has W tokens or so many splits.
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference_selected
from sparsed.kernels.softmax import absorb

SPLIT_TOKENS: Final = 256  # fixed, so that a result never depends on who else is in the batch
_TILE_BYTES = 16 << 10  # of keys; as many of values
_TILE_SPLITS = 16
_MIN_DOT = 16  # tl.dot takes no smaller side
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
    """Attention over parts of the pages: ``o_BHSGD`` and ``lse_BHSG`` float32, lse a log of 2."""

    o_BHSGD: Tensor
    lse_BHSG: Tensor


def num_splits(num_columns: int, page_size: int) -> int:
    """Splits of the hits of a lane, or of its misses."""
    return -(-num_columns * page_size // SPLIT_TOKENS)


def make_partials(selected: Selected, q_BHGD: Tensor, *, page_size: int) -> Partials:
    """Room for what ``attend_hits`` and ``attend_misses`` write."""
    num_requests, num_heads, group, head_dim = q_BHGD.shape
    splits = 2 * num_splits(selected.slots_BHK.shape[2], page_size) + 1
    shape = (num_requests, num_heads, splits, group)
    o_BHSGD = q_BHGD.new_empty((*shape, head_dim), dtype=torch.float32)
    return Partials(o_BHSGD, q_BHGD.new_empty(shape, dtype=torch.float32))


def attend_hits(
    q_BHGD: Tensor, arena_NTCD: Tensor, *, selected: Selected, partials: Partials, scale: float
) -> None:
    """Attend to the pages that were hot, and to the partial page.

    Shapes: q (B, H, G, D) contiguous; arena (N, T, 2, D) contiguous, T a power of two, keys first;
    ``selected`` and ``partials`` as there. A slot of -1 counts for nothing, and is never read.
    Units: logits are q.k * scale.
    Precision: dot products in the arena's dtype (float32 is never rounded), sums in float32.
    Changes: ``partials``, on the current stream.
    Errors: AssertionError on other shapes or dtypes.
    Source: split-K flash decoding, arXiv 2205.14135 and its follow-up on decoding; ours.
    """
    _check(q_BHGD, arena_NTCD, selected, partials)
    run = _launch if q_BHGD.is_cuda else reference_selected.attend_part
    run(q_BHGD, arena_NTCD, selected, partials, scale, misses=False)


def attend_misses(
    q_BHGD: Tensor, arena_NTCD: Tensor, *, selected: Selected, partials: Partials, scale: float
) -> None:
    """Attend to the pages that have been fetched; all else as in ``attend_hits``."""
    _check(q_BHGD, arena_NTCD, selected, partials)
    run = _launch if q_BHGD.is_cuda else reference_selected.attend_part
    run(q_BHGD, arena_NTCD, selected, partials, scale, misses=True)


def merge_selected(
    selected: Selected, partials: Partials, *, page_size: int, out_BHGD: Tensor, lse_BHG: Tensor
) -> None:
    """Attention over hits, misses and the partial page together, from its parts.

    Shapes: out (B, H, G, D) contiguous, any floating dtype; lse (B, H, G) float32, natural log.
    Requests with ``count`` 0 leave both as they are.
    Changes: ``out`` and ``lse``, on the current stream.
    Source: the log-sum-exp merge of FlashDecoding and of FlashInfer, arXiv 2501.01005.
    """
    assert out_BHGD.is_contiguous() and lse_BHG.is_contiguous()
    assert lse_BHG.shape == out_BHGD.shape[:3] and lse_BHG.dtype == torch.float32
    run = _launch_merge if out_BHGD.is_cuda else reference_selected.merge_selected
    run(selected, partials, page_size, out_BHGD, lse_BHG)


def _check(q_BHGD: Tensor, arena_NTCD: Tensor, selected: Selected, partials: Partials) -> None:
    num_requests, num_heads, group, head_dim = q_BHGD.shape
    page_size = arena_NTCD.shape[1]
    assert q_BHGD.is_contiguous() and arena_NTCD.is_contiguous()
    assert arena_NTCD.shape[2:] == (2, head_dim) and page_size.bit_count() == 1
    assert selected.slots_BHK.shape[:2] == (num_requests, num_heads)
    assert selected.num_hits_BH.shape == selected.tail_slots_BH.shape == (num_requests, num_heads)
    assert selected.count_B.shape == selected.tail_tokens_B.shape == (num_requests,)
    assert all(part.dtype == torch.int32 and part.is_contiguous() for part in selected)
    splits = 2 * num_splits(selected.slots_BHK.shape[2], page_size) + 1
    assert partials.o_BHSGD.shape == (num_requests, num_heads, splits, group, head_dim)
    assert partials.lse_BHSG.shape == (num_requests, num_heads, splits, group)


def _launch(
    q_BHGD: Tensor,
    arena_NTCD: Tensor,
    selected: Selected,
    partials: Partials,
    scale: float,
    *,
    misses: bool,
) -> None:
    num_requests, num_heads, group, head_dim = q_BHGD.shape
    num_columns, page_size = selected.slots_BHK.shape[2], arena_NTCD.shape[1]
    splits = num_splits(num_columns, page_size)
    padded_dim = triton.next_power_of_2(head_dim)
    tile_tokens = _TILE_BYTES // (padded_dim * arena_NTCD.element_size())
    if num_requests:
        _attend_kernel[(num_requests * num_heads, splits if misses else splits + 1)](
            q_BHGD,
            arena_NTCD,
            *selected,
            *partials,
            scale * _LOG2_E,
            num_columns,
            splits,
            MISSES=misses,
            NUM_HEADS=num_heads,
            GROUP=group,
            PADDED_GROUP=max(_MIN_DOT, triton.next_power_of_2(group)),
            PAGE_SIZE=page_size,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim,
            TILE_TOKENS=min(max(_MIN_DOT, tile_tokens), SPLIT_TOKENS),
            SPLIT_TOKENS=SPLIT_TOKENS,
            num_stages=3,
            enable_fp_fusion=True,
        )


def _launch_merge(
    selected: Selected, partials: Partials, page_size: int, out_BHGD: Tensor, lse_BHG: Tensor
) -> None:
    num_requests, num_heads, group, head_dim = out_BHGD.shape
    if num_requests:
        _merge_kernel[(num_requests * num_heads, group)](
            selected.num_hits_BH,
            selected.count_B,
            *partials,
            out_BHGD,
            lse_BHG,
            num_splits(selected.slots_BHK.shape[2], page_size),
            NUM_HEADS=num_heads,
            PAGE_SIZE=page_size,
            HEAD_DIM=head_dim,
            PADDED_DIM=triton.next_power_of_2(head_dim),
            SPLIT_TOKENS=SPLIT_TOKENS,
            TILE_SPLITS=_TILE_SPLITS,
            num_warps=2,
            enable_fp_fusion=True,
        )


# Some are a part of a larger tensor, wherever it begins: a CUDA graph cannot compile a variant.
_VIEWS = ["slots_BHK", "num_hits_BH", "count_B", "tail_slots_BH", "tail_tokens_B"]


@triton.jit(do_not_specialize=["num_columns", "num_splits"], do_not_specialize_on_alignment=_VIEWS)
def _attend_kernel(
    q_BHGD: tl.tensor,
    arena_NTCD: tl.tensor,
    slots_BHK: tl.tensor,
    num_hits_BH: tl.tensor,
    count_B: tl.tensor,
    tail_slots_BH: tl.tensor,
    tail_tokens_B: tl.tensor,
    o_BHSGD: tl.tensor,
    lse_BHSG: tl.tensor,
    scale_log2: tl.float32,
    num_columns: tl.int32,
    num_splits: tl.int32,
    MISSES: tl.constexpr,
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
    count = tl.load(count_B + lane // NUM_HEADS)
    num_hits = tl.load(num_hits_BH + lane)
    slots = slots_BHK + lane * num_columns
    first = split * SPLIT_TOKENS
    if MISSES:
        slots += num_hits
        num_tokens = (count - num_hits) * PAGE_SIZE
    else:
        num_tokens = num_hits * PAGE_SIZE
        if split == num_splits:
            slots = tail_slots_BH + lane
            num_tokens = tl.load(tail_tokens_B + lane // NUM_HEADS)
            first = 0
    if (count == 0) | (first >= num_tokens):
        return
    groups, dims = tl.arange(0, PADDED_GROUP), tl.arange(0, PADDED_DIM)
    mask_GD = (groups < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q = q_BHGD + (lane * GROUP + groups)[:, None] * HEAD_DIM + dims[None, :]
    q_GD = tl.load(q, mask=mask_GD, other=0.0).to(arena_NTCD.dtype.element_ty)

    peak_G = tl.full([PADDED_GROUP], float("-inf"), tl.float32)  # logits in powers of two
    sum_G = tl.zeros([PADDED_GROUP], tl.float32)
    o_GD = tl.zeros([PADDED_GROUP, PADDED_DIM], tl.float32)
    for start in range(first, min(first + SPLIT_TOKENS, num_tokens), TILE_TOKENS):
        tokens = start + tl.arange(0, TILE_TOKENS)
        slot_W = tl.load(slots + tokens // PAGE_SIZE, mask=tokens < num_tokens, other=-1)
        slot_W = slot_W.to(tl.int64)
        token_W = arena_NTCD + (slot_W * PAGE_SIZE + tokens % PAGE_SIZE) * (2 * HEAD_DIM)
        kv_WD = token_W[:, None] + dims[None, :]
        mask_WD = (slot_W >= 0)[:, None] & (dims < HEAD_DIM)[None, :]
        k_WD = tl.load(kv_WD, mask=mask_WD, other=0.0)
        v_WD = tl.load(kv_WD + HEAD_DIM, mask=mask_WD, other=0.0)

        logits_GW = tl.dot(q_GD, tl.trans(k_WD), input_precision="ieee") * scale_log2
        logits_GW = tl.where((slot_W >= 0)[None, :], logits_GW, float("-inf"))
        peak_G, sum_G, o_GD = absorb(logits_GW, v_WD, peak_G, sum_G, o_GD)

    if MISSES:
        split += num_splits + 1
    row_G = (lane * (2 * num_splits + 1) + split) * GROUP + groups
    divisor_G = tl.where(sum_G > 0.0, sum_G, 1.0)
    o_GD = o_GD / divisor_G[:, None]
    tl.store(o_BHSGD + row_G[:, None] * HEAD_DIM + dims[None, :], o_GD, mask=mask_GD)
    tl.store(lse_BHSG + row_G, peak_G + tl.log2(divisor_G), mask=groups < GROUP)


@triton.jit(
    do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["num_hits_BH", "count_B"]
)
def _merge_kernel(
    num_hits_BH: tl.tensor,
    count_B: tl.tensor,
    o_BHSGD: tl.tensor,
    lse_BHSG: tl.tensor,
    out_BHGD: tl.tensor,
    lse_BHG: tl.tensor,
    num_splits: tl.int32,
    NUM_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    TILE_SPLITS: tl.constexpr,
) -> None:
    lane, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_groups = tl.num_programs(1)
    count = tl.load(count_B + lane // NUM_HEADS)
    if count == 0:
        return
    hit_tokens = tl.load(num_hits_BH + lane) * PAGE_SIZE
    miss_tokens = count * PAGE_SIZE - hit_tokens
    dims = tl.arange(0, PADDED_DIM)
    peak = float("-inf")
    total = 0.0
    o_D = tl.zeros([PADDED_DIM], tl.float32)
    for start in range(0, 2 * num_splits + 1, TILE_SPLITS):
        splits = start + tl.arange(0, TILE_SPLITS)
        misses = splits - num_splits - 1
        ran_S = (splits < num_splits) & (splits * SPLIT_TOKENS < hit_tokens)
        ran_S |= splits == num_splits
        ran_S |= (misses >= 0) & (misses * SPLIT_TOKENS < miss_tokens)
        row_S = (lane * (2 * num_splits + 1) + splits) * num_groups + group
        lse_S = tl.load(lse_BHSG + row_S, mask=ran_S, other=float("-inf"))
        mask_SD = ran_S[:, None] & (dims < HEAD_DIM)[None, :]
        o_SD = tl.load(o_BHSGD + row_S[:, None] * HEAD_DIM + dims[None, :], mask=mask_SD, other=0.0)
        new_peak = tl.maximum(peak, tl.max(lse_S, axis=0))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight_S = tl.exp2(lse_S - base)
        keep = tl.exp2(peak - base)
        total = total * keep + tl.sum(weight_S, axis=0)
        o_D = o_D * keep + tl.sum(o_SD * weight_S[:, None], axis=0)
        peak = new_peak
    row = lane * num_groups + group
    divisor = tl.where(total > 0.0, total, 1.0)
    o_D = (o_D / divisor).to(out_BHGD.dtype.element_ty)
    tl.store(out_BHGD + row * HEAD_DIM + dims, o_D, mask=dims < HEAD_DIM)
    tl.store(lse_BHG + row, (peak + tl.log2(divisor)) * 0.6931471805599453)  # ln 2
