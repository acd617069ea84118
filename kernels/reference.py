"""Every operation of this folder in plain torch: the CPU path, and the oracle of the kernels.

Shape legend: B requests in the batch, H KV heads, G query heads per KV head, D head dim, T tokens
of a page, N slots of the arena, R page rows, K page columns, M pages to move (or frames with their
slots), L = B * H lanes,
W tokens gathered, F frames, P pages, C = 2 (key, value), E = 2 * D (upper and lower page bound, or
the query split to meet them).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from sparsed.kernels.resident import ResidentPlan
    from sparsed.kernels.sample import DrawPlan

FIRST_MULTIPLIER: Final = 0x2545F4914F6CDD1D  # of checksums: odd, and below 2**63
SECOND_MULTIPLIER: Final = 0x5851F42D4C957F2D
PHILOX_MULTIPLIERS: Final = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
PHILOX_STEPS: Final = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)  # from one round's key to the next
_WORD: Final = 0xFFFFFFFFFFFFFFFF
_NOTHING: Final = -1e30  # a logit that no real one comes near, and unlike -inf a number


def copy_pages(
    dst_RX: Tensor,
    src_RX: Tensor,
    *,
    dst_rows_M: Tensor,
    src_rows_M: Tensor,
    count: Tensor | None = None,
) -> None:
    """See ``kernels.copy.copy_pages``."""
    wanted = src_rows_M >= 0
    if count is not None:
        wanted &= torch.arange(len(wanted), device=wanted.device) < count
    dst_rows, src_rows = dst_rows_M[wanted], src_rows_M[wanted]
    if src_rows.numel():
        dst_RX.index_copy_(0, dst_rows, src_RX.index_select(0, src_rows).to(dst_RX.device))


def page_checksums(store_RX: Tensor, *, rows_M: Tensor) -> Tensor:
    """See ``kernels.checksum.page_checksums``."""
    rows = rows_M.clamp(min=0).to(store_RX.device)
    words_MW = store_RX.flatten(1).view(torch.int32).index_select(0, rows).long()
    place_W = torch.arange(words_MW.shape[1], device=words_MW.device)
    mixed_MW = (words_MW & 0xFFFFFFFF).bitwise_or_(place_W << 32).mul_(FIRST_MULTIPLIER)
    mixed_MW = mixed_MW.bitwise_xor_((mixed_MW >> 32) & 0xFFFFFFFF).mul_(SECOND_MULTIPLIER)
    sums_M = mixed_MW.sum(1).to(rows_M.device)
    sums_M.masked_fill_(sums_M == 0, 1)
    return sums_M.masked_fill_(rows_M < 0, 0)


def store_tokens(
    arena_NTCD: Tensor, *, slots_BH: Tensor, offsets_B: Tensor, k_BHD: Tensor, v_BHD: Tensor
) -> None:
    """See ``kernels.store.store_tokens``."""
    wanted = slots_BH >= 0
    rows_BH = slots_BH.long() * arena_NTCD.shape[1] + offsets_B.long()[:, None]
    tokens_BHCD = torch.stack((k_BHD, v_BHD), dim=2)
    arena_NTCD.flatten(0, 1).index_copy_(0, rows_BH[wanted], tokens_BHCD[wanted])


def page_bounds(pages_MTCD: Tensor, *, minmax: bool) -> Tensor:
    """See ``kernels.bounds.page_bounds``."""
    keys_MTD = pages_MTCD[:, :, 0].float()
    low_MD, high_MD = keys_MTD.aminmax(dim=1)
    if not minmax:
        center_MD = (high_MD + low_MD) / 2
        radius_MD = (keys_MTD - center_MD[:, None]).abs().mean(dim=1)
        low_MD, high_MD = center_MD - radius_MD, center_MD + radius_MD
    return torch.stack((high_MD, low_MD), dim=1).to(pages_MTCD.dtype)


def score_pages(
    query_BHE: Tensor,
    summaries_FXE: Tensor,
    *,
    rows_BHF: Tensor,
    scales_FX: Tensor | None = None,
) -> Tensor:
    """See ``kernels.score.score_pages``; multiplies in the summaries' dtype, int8 in float32."""
    num_requests, num_heads, num_frames = rows_BHF.shape
    pages_per_frame, width = summaries_FXE.shape[1:]
    rows = rows_BHF.clamp(min=0).flatten()
    bounds = summaries_FXE.view(len(summaries_FXE), -1).index_select(0, rows)
    bounds = bounds if scales_FX is None else bounds.float()
    bounds_LPE = bounds.view(num_requests * num_heads, num_frames * pages_per_frame, width)
    query_LE1 = query_BHE.reshape(-1, width, 1).to(bounds_LPE.dtype)
    scores_BHFX = torch.bmm(bounds_LPE, query_LE1).float().view(*rows_BHF.shape, pages_per_frame)
    if scales_FX is not None:
        scores_BHFX *= scales_FX.index_select(0, rows).view_as(scores_BHFX)
    scores_BHFX.masked_fill_((rows_BHF < 0)[..., None], float("-inf"))
    return scores_BHFX.view(num_requests, num_heads, -1)


def attend_pages(
    q_BHGD: Tensor, arena_NTCD: Tensor, *, slots_BHK: Tensor, tail_tokens_B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See ``kernels.attend.attend_pages``."""
    num_requests, num_heads, _, head_dim = q_BHGD.shape
    kv_LWCD, hidden_LW = _gather_tokens(arena_NTCD, slots_BHK, tail_tokens_B)
    q_LGD = (q_BHGD * scale).reshape(num_requests * num_heads, -1, head_dim).to(kv_LWCD.dtype)
    logits_LGW = torch.bmm(q_LGD, kv_LWCD[:, :, 0].transpose(1, 2)).float()
    if hidden_LW is not None:
        logits_LGW.masked_fill_(hidden_LW[:, None], _NOTHING)
    weights_LGW = torch.softmax(logits_LGW, dim=-1)
    o_LGD = torch.bmm(weights_LGW.to(kv_LWCD.dtype), kv_LWCD[:, :, 1]).float()
    lse_LG = logits_LGW.amax(dim=-1) - weights_LGW.amax(dim=-1).log()
    lse_LG = lse_LG.masked_fill(lse_LG < _NOTHING / 2, float("-inf"))
    return o_LGD.view_as(q_BHGD), lse_LG.view(q_BHGD.shape[:3])


def attend_resident(
    q_NHD: Tensor,
    arena_NTCD: Tensor,
    frames_RF: Tensor,
    slots_MHP: Tensor,
    plan: ResidentPlan,
    scale: float,
) -> Tensor:
    """See ``kernels.resident.attend_resident``; ``slots_MHP`` are the slots of its layer."""
    o_NHD = torch.zeros_like(q_NHD, memory_format=torch.contiguous_format)
    num_queries, page_size = len(q_NHD) // len(plan.rows_B), arena_NTCD.shape[1]
    requests = zip(plan.rows_B.tolist(), plan.lengths_B.tolist(), strict=True)
    for b, (row, length) in enumerate(requests):
        if length == 0:
            continue
        assert length >= num_queries
        slots_FHP = slots_MHP[
            frames_RF[row, : -(-length // (page_size * slots_MHP.shape[2]))].long()
        ]
        slots_HK = slots_FHP.transpose(0, 1).flatten(1)[:, : -(-length // page_size)].long()
        k_HWD, v_HWD = arena_NTCD[slots_HK].flatten(1, 2)[:, :length].unbind(2)
        here = slice(b * num_queries, (b + 1) * num_queries)
        q_QHGD = q_NHD[here].view(num_queries, len(slots_HK), -1, q_NHD.shape[2])
        scaled_QHGD = (q_QHGD * scale).to(k_HWD.dtype)
        logits_HGQW = torch.einsum("qhgd,hwd->hgqw", scaled_QHGD, k_HWD).float()
        places_W = torch.arange(length, device=q_NHD.device)
        hidden_QW = places_W > places_W[-num_queries:, None]
        weights = logits_HGQW.masked_fill(hidden_QW, float("-inf")).softmax(-1).to(v_HWD.dtype)
        o_NHD[here] = torch.einsum("hgqw,hwd->qhgd", weights, v_HWD).flatten(1, 2).to(o_NHD.dtype)
    return o_NHD


def rotate_heads(
    heads_NHD: Tensor,
    cos_ND: Tensor,
    sin_ND: Tensor,
    *,
    norm_HD: Tensor | None,
    eps: float,
    first_NFD: Tensor | None = None,
) -> Tensor:
    """See ``kernels.rotate.rotate_heads``; three passes, whatever the number of heads."""
    if norm_HD is not None:
        heads_NHD = F.rms_norm(heads_NHD, heads_NHD.shape[-1:], None, eps) * norm_HD
    swapped_NHD = heads_NHD.roll(heads_NHD.shape[-1] // 2, dims=-1)
    rotated_NHD = torch.addcmul(heads_NHD * cos_ND[:, None], swapped_NHD, sin_ND[:, None])
    if first_NFD is not None:
        first_NFD.copy_(rotated_NHD[:, : first_NFD.shape[1]])
    return rotated_NHD


def rms_norm(x_ND: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """See ``kernels.norm.rms_norm``."""
    return F.rms_norm(x_ND, weight_D.shape, weight_D, eps)


def silu_mul(gate_up_NF: Tensor) -> Tensor:
    """See ``kernels.gate.silu_mul``."""
    gate, up = gate_up_NF.chunk(2, dim=1)
    return F.silu(gate).mul_(up)


def draw_tokens(logits_BV: Tensor, plan: DrawPlan) -> Tensor:
    """See ``kernels.sample.draw_tokens``; sorts, and has probabilities in float64."""
    keys = [sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(key))
            for key in plan.key_4B.T.tolist()]  # fmt: skip
    rows = zip(logits_BV, keys, *(column_B.tolist() for column_B in plan[1:]), strict=True)
    tokens = [
        _draw_token(logits_V.masked_fill(logits_V.isnan(), float("-inf")), *row)
        for logits_V, *row in rows
    ]
    return torch.tensor(tokens, dtype=torch.int64, device=logits_BV.device)


def _draw_token(
    logits_V: Tensor,
    key: int,
    index: int,
    temperature: float,
    top_p: float,
    min_p: float,
    top_k: int,
) -> int:
    peak = logits_V.max()
    if temperature == 0.0 or peak == float("-inf"):
        return int(logits_V.argmax())
    weights_V = ((logits_V.double() - peak) / temperature).exp()
    order_V = logits_V.argsort(descending=True, stable=True)
    falling_V = weights_V[order_V]
    num_kept = int((falling_V >= min_p).sum())
    num_kept = min(num_kept, top_k) if top_k else num_kept
    if top_p < 1.0:
        mass_C = falling_V[:num_kept].cumsum(0)
        num_kept = int((mass_C < top_p * mass_C[-1]).sum()) + 1
    kept_C = order_V[:num_kept].sort().values
    mass_C = weights_V[kept_C].cumsum(0)
    return int(kept_C[int((mass_C <= philox_uniform(key, index=index) * mass_C[-1]).sum())])


def philox_uniform(key: int, *, index: int) -> float:
    """The number ``index`` in [0, 1) of a 128-bit key: Philox4x64-10 as numpy counts it."""
    words, keys = (index + 1, 0, 0, 0), (key & _WORD, key >> 64)
    for _ in range(10):
        products = [words[2 * i] * multiplier for i, multiplier in enumerate(PHILOX_MULTIPLIERS)]
        words = (
            (products[1] >> 64) ^ words[1] ^ keys[0],
            products[1] & _WORD,
            (products[0] >> 64) ^ words[3] ^ keys[1],
            products[0] & _WORD,
        )
        keys = ((keys[0] + PHILOX_STEPS[0]) & _WORD, (keys[1] + PHILOX_STEPS[1]) & _WORD)
    return (words[0] >> 11) * 2.0**-53


def _gather_tokens(
    arena_NTCD: Tensor, slots_BHK: Tensor, tail_tokens_B: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Tokens of every lane (B * H, W, 2, D), and which of them not to attend to (None: all are
    wanted). Room never written may hold anything, even NaN, so what is hidden is set to zero."""
    page_size, columns = arena_NTCD.shape[1], slots_BHK.shape[2]
    rows = slots_BHK.clamp(min=0).flatten()
    kv = arena_NTCD.view(len(arena_NTCD), -1).index_select(0, rows)
    kv = kv.view(-1, columns * page_size, *arena_NTCD.shape[2:])
    longest, shortest = max(tail_tokens_B.tolist()), min(tail_tokens_B.tolist())
    if longest == shortest > 0 and not (slots_BHK < 0).any():
        return kv[:, : (columns - 1) * page_size + longest], None
    hidden_LW = _hidden_tokens(slots_BHK, tail_tokens_B, page_size).view(kv.shape[:2])
    kv.flatten(0, 1).index_fill_(0, hidden_LW.flatten().nonzero()[:, 0], 0)
    return kv, hidden_LW


def merge_states(
    o_a_BHGD: Tensor, lse_a_BHG: Tensor, o_b_BHGD: Tensor, lse_b_BHG: Tensor, *, o_BHGD: Tensor
) -> Tensor:
    """See ``kernels.merge.merge_states``; writes ``o_BHGD``."""
    lse_BHG = torch.logaddexp(lse_a_BHG, lse_b_BHG)
    base_BHG = lse_BHG.clamp(min=_NOTHING)  # -inf - -inf is not a number
    weight_a_BHG, weight_b_BHG = torch.exp(lse_a_BHG - base_BHG), torch.exp(lse_b_BHG - base_BHG)
    o_BHGD.copy_(o_a_BHGD * weight_a_BHG[..., None] + o_b_BHGD * weight_b_BHG[..., None])
    return lse_BHG


def _hidden_tokens(slots_BHK: Tensor, tail_tokens_B: Tensor, page_size: int) -> Tensor:
    """Mask (B, H, K, T) of tokens not to attend: absent pages, and the end of the last page."""
    position_T = torch.arange(page_size, device=slots_BHK.device)
    hidden = (slots_BHK < 0)[..., None].repeat(1, 1, 1, page_size)
    hidden[:, :, -1] |= position_T[None, None] >= tail_tokens_B.to(position_T)[:, None, None]
    return hidden
