"""The interface of page selection methods, and the choice every one of them shares."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Selector(Protocol):
    """Summarises full pages once and scores them against the queries of each step.

    Shape legend: M pages, T tokens of a page, C = 2 (key, value), D head dim, E summary width,
    B requests, H KV heads, G query heads per KV head, F frames, P = F * pages per frame.
    """

    def summarise(self, pages_MTCD: Tensor) -> Tensor:
        """Summaries (M, E) of full pages, in the pages' dtype."""
        ...

    def score(self, q_BHGD: Tensor, summaries_RPE: Tensor, *, rows_BHF: Tensor) -> Tensor:
        """Scores (B, H, P), float32, larger is better; pages that do not exist score anything.

        ``summaries_RPE`` (lanes of frames, pages per frame, E) holds the summaries, ``rows_BHF``
        the index of each lane's frames in it.
        """
        ...


def select_pages(
    scores_BHP: Tensor, *, num_full_B: Tensor, count: int, pages_BHP: Tensor | None = None
) -> Tensor:
    """The ``count`` best full pages of each lane, the first and the last full one always among
    them: page ids (B, H, count), int64, in no order.

    ``num_full_B`` is the number of full pages of each request, larger than ``count`` >= 2.
    ``pages_BHP`` are the ids of what was scored, None: all pages in order. With fewer than
    ``count`` full pages among them others make up the number.
    """
    if pages_BHP is None:
        ids = torch.arange(scores_BHP.shape[-1], device=scores_BHP.device)
    else:
        ids = pages_BHP
    last_B11 = num_full_B[:, None, None] - 1
    scores = scores_BHP.masked_fill((ids == 0) | (ids == last_B11), float("inf"))
    scores.masked_fill_(ids > last_B11, float("-inf"))
    chosen_BHK = scores.topk(count, dim=-1, sorted=False).indices
    return chosen_BHK if pages_BHP is None else pages_BHP.gather(-1, chosen_BHK)
