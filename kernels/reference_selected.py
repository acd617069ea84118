"""Twin of ``kernels.selected`` in plain torch: all hits are one split, all misses another."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsed.kernels import reference

if TYPE_CHECKING:
    from sparsed.kernels.selected import Partials, Selected


def attend_part(
    q_BHGD: Tensor,
    arena_NTCD: Tensor,
    selected: Selected,
    partials: Partials,
    scale: float,
    *,
    misses: bool,
) -> None:
    slots_BHK = selected.slots_BHK
    columns_K = torch.arange(slots_BHK.shape[2], device=slots_BHK.device)
    is_hit_BHK = columns_K < selected.num_hits_BH[..., None]
    is_wanted_BHK = columns_K < selected.count_B[:, None, None]
    is_wanted_BHK = is_wanted_BHK & (~is_hit_BHK if misses else is_hit_BHK)
    last_BH1 = selected.tail_slots_BH[..., None]
    if misses:
        last_BH1 = torch.full_like(last_BH1, -1)
    slots = torch.cat((torch.where(is_wanted_BHK, slots_BHK, -1), last_BH1), dim=-1)
    o_BHGD, lse_BHG = reference.attend_pages(
        q_BHGD,
        arena_NTCD,
        slots_BHK=slots.contiguous(),
        tail_tokens_B=selected.tail_tokens_B,
        scale=scale,
    )
    half = partials.lse_BHSG.shape[2] // 2
    split = half + 1 if misses else half
    partials.o_BHSGD[:, :, split] = o_BHGD
    partials.lse_BHSG[:, :, split] = lse_BHG / math.log(2)


def merge_selected(
    selected: Selected, partials: Partials, page_size: int, out_BHGD: Tensor, lse_BHG: Tensor
) -> None:
    half = partials.lse_BHSG.shape[2] // 2
    o_BHSGD, lse_BHSG = (part[:, :, half : half + 2] for part in partials)
    is_hit_BH = selected.count_B[:, None] <= selected.num_hits_BH  # no misses, maybe never written
    no_misses_BHS1 = torch.stack((torch.zeros_like(is_hit_BH), is_hit_BH), dim=-1)[..., None]
    o_BHSGD = o_BHSGD.masked_fill(no_misses_BHS1[..., None], 0.0)
    lse_BHSG = (lse_BHSG * math.log(2)).masked_fill(no_misses_BHS1, -math.inf)
    total_BHG = lse_BHSG.logsumexp(2)
    merged = (o_BHSGD * (lse_BHSG - total_BHG[:, :, None]).exp()[..., None]).sum(2)
    runs_B = selected.count_B > 0
    out_BHGD.copy_(torch.where(runs_B[:, None, None, None], merged.to(out_BHGD.dtype), out_BHGD))
    lse_BHG.copy_(torch.where(runs_B[:, None, None], total_BHG, lse_BHG))
