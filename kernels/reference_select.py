"""Selection of pages in plain torch: the CPU path, and the oracle of the kernel.

Shape legend: B requests, H KV heads, G query heads per KV head, X columns (pages of all requests),
K selected pages of the lane with most, P pages of a request, N selected pages of a request.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

COLUMN_ALIGN: Final = 4  # of columns where a request may begin: 16 bytes are read at once
SMALLEST_SCORE: Final = 2.0**-40  # of the whole mass: what is less is no reason to prefer a page


def select_pages(
    logits_HGX: Tensor,
    *,
    first_B: Tensor,
    num_full_B: Tensor,
    count_B: Tensor,
    sink_pages: int,
    recent_pages: int,
    max_pages: int,
    out_BHK: Tensor,
) -> None:
    """See ``kernels.select.select_pages``; sorts."""
    assert not (first_B % COLUMN_ALIGN).any() and (num_full_B <= max_pages).all()
    assert (first_B + num_full_B <= logits_HGX.shape[2]).all()
    plan = zip(first_B.tolist(), num_full_B.tolist(), count_B.tolist(), out_BHK, strict=True)
    out_BHK.fill_(-1)
    for first, num_full, count, out_HK in plan:
        count = min(max(count, 0), num_full, out_HK.shape[1])
        if count:
            scores_HP = page_scores(logits_HGX[..., first : first + num_full])
            scores_HP[:, :sink_pages] = float("inf")
            scores_HP[:, max(num_full - recent_pages, 0) :] = float("inf")
            order_HP = scores_HP.sort(dim=-1, descending=True, stable=True).indices
            out_HK[:, :count] = order_HP[:, :count].sort(dim=-1).values


def page_scores(logits_HGP: Tensor) -> Tensor:
    """Sums (H, P) of the softmax weights of the query heads, 0 below the smallest score.

    From float64, so that columns of the same logits have the same score wherever they lie.
    """
    weights_HGP = torch.softmax(logits_HGP.double(), dim=-1).nan_to_num(nan=0.0)
    scores_HP = weights_HGP.sum(dim=1).float()
    return scores_HP.masked_fill(scores_HP < SMALLEST_SCORE, 0.0)
