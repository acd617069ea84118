"""Selection by an upper bound of q.k over a page: cuboid-mean (ArkVale) and Quest.

Both keep two vectors a page, ``upper`` and ``lower``, and score sum_d max(q_d * upper_d,
q_d * lower_d) = q+ . upper + q- . lower, where q+ and q- are the positive and negative parts of
the query. That is linear in (q+, q-), so the mean over the query heads of a group is taken first.

Shape legend as in ``sparse.base``; E summary width (2 D), F frames of a row, P pages of F frames,
Z pages of a frame, S rows of the store (lanes of frames).
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.sparse.base import SINK_PAGES, recent_pages
from sparsed.kernels.bounds import page_bounds
from sparsed.kernels.reference_select import COLUMN_ALIGN
from sparsed.kernels.score import score_pages
from sparsed.kernels.select import select_pages

SPREAD: Final = 12.0  # of the logits: no page's softmax weight is too small to be told apart


class BoundSelector:
    """``minmax`` True: element-wise extremes of the keys (Quest, arXiv 2406.10774). False: the
    centre of the extremes plus and minus the mean distance to it (cuboid-mean, ArkVale)."""

    def __init__(
        self,
        *,
        minmax: bool,
        geometry: Geometry,
        frames_RF: Tensor,
        num_frames: int,
        dtype: torch.dtype,
    ) -> None:
        self._minmax = minmax
        self._geometry = geometry
        self._frames_RF = frames_RF
        rows, width = (num_frames + 1) * geometry.num_lanes, 2 * geometry.head_dim
        self._store_SZE = torch.zeros(
            (rows, geometry.pages_per_block, width), dtype=dtype, device=frames_RF.device
        )
        self._heads_H1 = torch.arange(geometry.num_kv_heads, device=frames_RF.device)[:, None]

    @property
    def store_bytes(self) -> int:
        return self._store_SZE.nbytes

    def summarise(self, pages_MTCD: Tensor, page_rows_M: Tensor) -> None:
        bounds = page_bounds(pages_MTCD.contiguous(), minmax=self._minmax).flatten(1)
        store_RE = self._store_SZE.view(-1, bounds.shape[1])
        store_RE[torch.where(page_rows_M < 0, len(store_RE) - 1, page_rows_M)] = bounds

    def select(
        self,
        q_BHGD: Tensor,
        *,
        layer: int,
        rows_B: Tensor,
        num_full_B: Tensor,
        count_B: Tensor,
        max_pages: int,
        out_BHK: Tensor,
    ) -> None:
        scores_BHP = self.score(q_BHGD, layer=layer, rows_B=rows_B, num_full_B=num_full_B)
        pages_P = torch.arange(scores_BHP.shape[-1], device=scores_BHP.device)
        spread_BHP = _spread(scores_BHP, pages_P < num_full_B[:, None, None])
        spread_BHP = F.pad(spread_BHP, (0, -spread_BHP.shape[-1] % COLUMN_ALIGN))
        select_pages(
            spread_BHP[:, :, None].contiguous(),
            num_full_B=num_full_B,
            count_B=count_B,
            sink_pages=SINK_PAGES,
            recent_pages=recent_pages(self._geometry.page_size),
            out_BHK=out_BHK,
        )

    def score(self, q_BHGD: Tensor, *, layer: int, rows_B: Tensor, num_full_B: Tensor) -> Tensor:
        """The bounds (B, H, P), float32, mean over the group; pages that do not exist score
        anything. A CPU looks at no more frames than the longest request has."""
        per_frame, lanes = self._geometry.pages_per_block, self._geometry.num_lanes
        frames_BF = self._frames_RF[rows_B.long()].long()
        if not rows_B.is_cuda:
            longest = int(num_full_B.max()) if len(num_full_B) else 0
            frames_BF = frames_BF[:, : -(-max(1, longest) // per_frame)]
        starts_F = torch.arange(frames_BF.shape[1], device=frames_BF.device) * per_frame
        there_B1F = (starts_F < num_full_B[:, None])[:, None]
        lanes_H1 = layer * self._geometry.num_kv_heads + self._heads_H1
        rows_BHF = torch.where(there_B1F, frames_BF[:, None] * lanes + lanes_H1, -1)
        parts_BHGE = torch.cat((q_BHGD.clamp(min=0), q_BHGD.clamp(max=0)), dim=-1)
        return score_pages(parts_BHGE.mean(dim=2), self._store_SZE, rows_BHF=rows_BHF)


def _spread(scores_BHP: Tensor, there_B1P: Tensor) -> Tensor:
    """The scores of each lane in the same order, the best 0 and the last -``SPREAD``: a bound may
    be far above the others, and the softmax over plain scores would leave nothing of these."""
    best_BH1 = scores_BHP.masked_fill(~there_B1P, float("-inf")).amax(-1, keepdim=True)
    least_BH1 = scores_BHP.masked_fill(~there_B1P, float("inf")).amin(-1, keepdim=True)
    range_BH1 = (best_BH1 - least_BH1).clamp(min=torch.finfo(torch.float32).tiny)
    return (scores_BHP - best_BH1) / range_BH1 * SPREAD
