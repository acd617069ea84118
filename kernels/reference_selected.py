"""Twin of ``kernels.selected`` in plain torch: all hits are one split."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsed.kernels import reference

if TYPE_CHECKING:
    from sparsed.kernels.selected import Partials, Selected


def attend_hits(
    q_BHGD: Tensor, arena_NTCD: Tensor, selected: Selected, partials: Partials, scale: float
) -> None:
    is_hit_BHK, _ = _kinds(selected)
    slots_BHK = torch.where(is_hit_BHK, selected.slots_BHK, -1)
    no_tail_BH1 = torch.full_like(selected.tail_slots_BH, -1)[..., None]
    o_BHGD, lse_BHG = reference.attend_pages(
        q_BHGD,
        arena_NTCD,
        slots_BHK=torch.cat((slots_BHK, no_tail_BH1), dim=-1),
        tail_tokens_B=selected.tail_tokens_B,
        scale=scale,
    )
    partials.o_BHSGD[:, :, 0] = o_BHGD
    partials.lse_BHSG[:, :, 0] = lse_BHG / math.log(2)


def attend_rest(
    q_BHGD: Tensor,
    arena_NTCD: Tensor,
    selected: Selected,
    partials: Partials,
    scale: float,
    out_BHGD: Tensor,
    lse_BHG: Tensor,
) -> None:
    is_hit_BHK, is_miss_BHK = _kinds(selected)
    slots_BHK = torch.where(is_miss_BHK, selected.slots_BHK, -1)
    o_BHGD, rest_lse_BHG = reference.attend_pages(
        q_BHGD,
        arena_NTCD,
        slots_BHK=torch.cat((slots_BHK, selected.tail_slots_BH[..., None]), dim=-1),
        tail_tokens_B=selected.tail_tokens_B,
        scale=scale,
    )
    no_hits_BH1 = ~is_hit_BHK.any(-1, keepdim=True)  # nothing was ever written
    hits_BHGD = partials.o_BHSGD[:, :, 0].masked_fill(no_hits_BH1[..., None], 0.0)
    hits_lse_BHG = partials.lse_BHSG[:, :, 0] * math.log(2)
    hits_lse_BHG = hits_lse_BHG.masked_fill(no_hits_BH1, -math.inf)
    total_BHG = torch.logaddexp(hits_lse_BHG, rest_lse_BHG)
    merged = hits_BHGD * (hits_lse_BHG - total_BHG).exp()[..., None]
    merged += o_BHGD * (rest_lse_BHG - total_BHG).exp()[..., None]
    runs_B11 = (selected.count_B > 0)[:, None, None]
    out_BHGD.copy_(torch.where(runs_B11[..., None], merged.to(out_BHGD.dtype), out_BHGD))
    lse_BHG.copy_(torch.where(runs_B11, total_BHG, lse_BHG))


def _kinds(selected: Selected) -> tuple[Tensor, Tensor]:
    """Which of the selected pages are hits, and which are misses, (B, H, K)."""
    columns_K = torch.arange(selected.slots_BHK.shape[2], device=selected.slots_BHK.device)
    is_hit_BHK = columns_K < selected.num_hits_BH[..., None]
    is_wanted_BHK = columns_K < selected.count_B[:, None, None]
    return is_wanted_BHK & is_hit_BHK, is_wanted_BHK & ~is_hit_BHK
