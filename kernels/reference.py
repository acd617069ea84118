"""Every operation of this folder in plain torch: the CPU path, and the oracle of the kernels.

Shape legend: B requests in the batch, H KV heads, G query heads per KV head, D head dim, T tokens
of a page, N slots of the arena, R page rows, K page columns, M pages to move, F frames, P pages,
C = 2 (key, value), E = 2 * D (upper and lower page bound, or the query split to meet them).
"""

from __future__ import annotations

import torch
from torch import Tensor


def copy_pages(dst_RX: Tensor, src_RX: Tensor, *, dst_rows_M: Tensor, src_rows_M: Tensor) -> None:
    """See ``kernels.copy.copy_pages``."""
    wanted = src_rows_M >= 0
    dst_rows, src_rows = dst_rows_M[wanted], src_rows_M[wanted]
    if src_rows.numel():
        dst_RX.index_copy_(0, dst_rows, src_RX.index_select(0, src_rows).to(dst_RX.device))


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


def score_pages(query_BHE: Tensor, summaries_FXE: Tensor, *, rows_BHF: Tensor) -> Tensor:
    """See ``kernels.score.score_pages``."""
    num_requests, num_heads, num_frames = rows_BHF.shape
    pages_per_frame, width = summaries_FXE.shape[1:]
    rows = rows_BHF.clamp(min=0).flatten()
    bounds = summaries_FXE.view(len(summaries_FXE), -1).index_select(0, rows)
    bounds_LPE = bounds.view(num_requests * num_heads, num_frames * pages_per_frame, width)
    query_LE1 = query_BHE.reshape(-1, width, 1).to(bounds_LPE.dtype)
    scores_BHFX = torch.bmm(bounds_LPE, query_LE1).float().view(*rows_BHF.shape, pages_per_frame)
    scores_BHFX.masked_fill_((rows_BHF < 0)[..., None], float("-inf"))
    return scores_BHFX.view(num_requests, num_heads, -1)


def attend_pages(
    q_BHGD: Tensor, arena_NTCD: Tensor, *, slots_BHK: Tensor, tail_tokens_B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See ``kernels.attend.attend_pages``."""
    num_requests, num_heads, _, head_dim = q_BHGD.shape
    num_columns, page_size = slots_BHK.shape[2], arena_NTCD.shape[1]
    rows = slots_BHK.clamp(min=0).flatten()
    kv = arena_NTCD.view(len(arena_NTCD), -1).index_select(0, rows)
    kv = kv.view(num_requests * num_heads, num_columns * page_size, 2, head_dim)
    hidden = _hidden_tokens(slots_BHK, tail_tokens_B, page_size)
    # Room never written may hold anything, even NaN, and NaN times a weight of 0 is NaN.
    kv.flatten(0, 1).index_fill_(0, hidden.flatten().nonzero()[:, 0], 0)
    q_LGD = (q_BHGD * scale).reshape(num_requests * num_heads, -1, head_dim).to(kv.dtype)
    logits_LGW = torch.bmm(q_LGD, kv[:, :, 0].transpose(1, 2)).float()
    logits = logits_LGW.view(num_requests, num_heads, -1, num_columns, page_size)
    logits.masked_fill_(hidden[:, :, None], float("-inf"))
    lse_LG = torch.logsumexp(logits_LGW, dim=-1)
    weights_LGW = torch.exp(logits_LGW - lse_LG.clamp(min=-1e30)[..., None])
    o_LGD = torch.bmm(weights_LGW.to(kv.dtype), kv[:, :, 1]).float()
    return o_LGD.view_as(q_BHGD), lse_LG.view(q_BHGD.shape[:3])


def merge_states(
    o_a_BHGD: Tensor, lse_a_BHG: Tensor, o_b_BHGD: Tensor, lse_b_BHG: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``kernels.merge.merge_states``."""
    lse_BHG = torch.logaddexp(lse_a_BHG, lse_b_BHG)
    base_BHG = lse_BHG.clamp(min=-1e30)  # -inf - -inf is not a number
    weight_a_BHG, weight_b_BHG = torch.exp(lse_a_BHG - base_BHG), torch.exp(lse_b_BHG - base_BHG)
    return o_a_BHGD * weight_a_BHG[..., None] + o_b_BHGD * weight_b_BHG[..., None], lse_BHG


def _hidden_tokens(slots_BHK: Tensor, tail_tokens_B: Tensor, page_size: int) -> Tensor:
    """Mask (B, H, K, T) of tokens not to attend: absent pages, and the end of the last page."""
    position_T = torch.arange(page_size, device=slots_BHK.device)
    hidden = (slots_BHK < 0)[..., None].repeat(1, 1, 1, page_size)
    hidden[:, :, -1] |= position_T[None, None] >= tail_tokens_B.to(position_T)[:, None, None]
    return hidden
