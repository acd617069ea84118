"""Selection of pages in plain torch: the CPU path, and the oracle of the kernel.

Shape legend: B requests, H KV heads, G query heads per KV head, K selected pages of the lane with
most, P columns of pages of a request.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

COLUMN_ALIGN: Final = 4  # of the columns of a lane: 16 bytes are read at once
SMALLEST_SCORE: Final = 2.0**-40  # of the whole mass: what is less is no reason to prefer a page


def select_pages(
    logits_BHGP: Tensor,
    *,
    num_full_B: Tensor,
    count_B: Tensor,
    sink_pages: int,
    recent_pages: int,
    out_BHK: Tensor,
) -> None:
    """See ``kernels.select.select_pages``; sorts."""
    assert (num_full_B <= logits_BHGP.shape[3]).all()
    plan = zip(logits_BHGP, num_full_B.tolist(), count_B.tolist(), out_BHK, strict=True)
    out_BHK.fill_(-1)
    for logits_HGP, num_full, count, out_HK in plan:
        count = min(max(count, 0), num_full, out_HK.shape[1])
        if count:
            scores_HP = page_scores(logits_HGP[..., :num_full])
            scores_HP[:, :sink_pages] = float("inf")
            scores_HP[:, max(num_full - recent_pages, 0) :] = float("inf")
            order_HP = scores_HP.sort(dim=-1, descending=True, stable=True).indices
            out_HK[:, :count] = order_HP[:, :count].sort(dim=-1).values


def keep_pages(
    pages_BHK: Tensor, kept_RHC: Tensor, *, rows_B: Tensor, count_B: Tensor, keeps_B: Tensor
) -> None:
    """See ``kernels.keep.keep_pages``."""
    plan = zip(pages_BHK, rows_B.tolist(), count_B.tolist(), keeps_B.tolist(), strict=True)
    for pages_HK, row, count, keeps in plan:
        count = min(max(count, 0), pages_HK.shape[1], kept_RHC.shape[2])
        if count and keeps:
            pages_HK.fill_(-1)
            pages_HK[:, :count] = kept_RHC[row, :, :count]
        elif count:
            kept_RHC[row, :, :count] = pages_HK[:, :count]


def page_scores(logits_HGP: Tensor) -> Tensor:
    """Sums (H, P) of the softmax weights of the query heads, 0 below the smallest score.

    From float64, so that columns of the same logits have the same score wherever they lie.
    """
    weights_HGP = torch.softmax(logits_HGP.double(), dim=-1).nan_to_num(nan=0.0)
    scores_HP = weights_HGP.sum(dim=1).float()
    return scores_HP.masked_fill(scores_HP < SMALLEST_SCORE, 0.0)
