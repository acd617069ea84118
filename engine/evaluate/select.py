"""Which pages a ranking leads to: the forced ones, then the best, as many as a lane may read.

Shape legend: n positions, H KV heads, P pages, K selected pages of the lane with most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsed.core import Choice


def select_pages(
    scores_nHP: Tensor, *, num_full_n: Tensor, counts_H: Tensor, choice: Choice
) -> Tensor:
    """The ``counts`` best full pages of each lane, best first and padded with -1: (n, H, K).

    The first ``sink_pages`` and the newest ``recent_pages`` of the ``num_full`` come before all
    others. A position with fewer full pages than ``counts`` gets them all.
    """
    pages_P = torch.arange(scores_nHP.shape[-1], device=scores_nHP.device)
    full_n1 = num_full_n[:, None]
    absent_nP = pages_P >= full_n1
    forced_nP = (pages_P < choice.sink_pages) | (pages_P >= full_n1 - choice.recent_pages)
    scores = scores_nHP.masked_fill(forced_nP[:, None], float("inf"))
    scores.masked_fill_(absent_nP[:, None], float("-inf"))
    best_nHK = scores.topk(int(counts_H.max()), dim=-1).indices
    ranks_K = torch.arange(best_nHK.shape[-1], device=scores.device)
    best_nHK.masked_fill_(ranks_K >= counts_H[:, None], -1)
    return best_nHK.masked_fill_(best_nHK >= full_n1[:, None], -1)


def attended_pages(pages_nHK: Tensor, *, num_pages: int) -> Tensor:
    """Which of ``num_pages`` are among ``pages``, -1 being none: (n, H, P), bool."""
    size = (*pages_nHK.shape[:2], num_pages + 1)
    found_nHP = torch.zeros(size, dtype=torch.bool, device=pages_nHK.device)
    return found_nHP.scatter_(-1, pages_nHK % (num_pages + 1), True)[..., :-1]
