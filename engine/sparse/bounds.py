"""Selection by an upper bound of q.k over a page: cuboid-mean (ArkVale) and Quest.

Both keep two vectors a page, ``upper`` and ``lower``, and score sum_d max(q_d * upper_d,
q_d * lower_d) = q+ . upper + q- . lower, where q+ and q- are the positive and negative parts of
the query. That is linear in (q+, q-), so the mean over the query heads of a group is taken first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsed.core import SparseMethod
from sparsed.engine.sparse.base import Selector
from sparsed.kernels.bounds import page_bounds
from sparsed.kernels.score import score_pages


class BoundSelector:
    """``minmax`` True: element-wise extremes of the keys (Quest, arXiv 2406.10774). False: the
    centre of the extremes plus and minus the mean distance to it (cuboid-mean, ArkVale)."""

    def __init__(self, *, minmax: bool) -> None:
        self._minmax = minmax

    def summarise(self, pages_MTCD: Tensor) -> Tensor:
        return page_bounds(pages_MTCD, minmax=self._minmax).flatten(1)

    def score(self, q_BHGD: Tensor, summaries_RPE: Tensor, *, rows_BHF: Tensor) -> Tensor:
        query_BHGE = torch.cat((q_BHGD.clamp(min=0), q_BHGD.clamp(max=0)), dim=-1)
        return score_pages(query_BHGE.mean(dim=2), summaries_RPE, rows_BHF=rows_BHF)


def make_selector(method: str) -> Selector | None:
    """The selector of a ``sparse_method``; None where nothing is ranked."""
    if method == SparseMethod.DENSE:
        return None
    return BoundSelector(minmax=method == SparseMethod.QUEST)
