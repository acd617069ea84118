"""Selection by the mean key of a page, kept in few bits of few dims of a learned basis.

Shape legend as in ``sparse.base``; L layers, N lanes (L * H), R kept dims, S rows of the store
(lanes of frames), Y bytes of such a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.sparse.base import SINK_PAGES, recent_pages
from sparsed.engine.sparse.basis import Basis
from sparsed.kernels.mean_keys import row_bytes, select_by_mean_keys
from sparsed.kernels.summarise import summarise_pages


class MeanKeySelector:
    """A page keeps the mean of its keys, less the mean key of its lane; a page's score is the
    product with the query. Layout as ``kernels.mean_keys`` reads it.

    ``frames_RF`` are the frames of all rows; whoever owns them keeps them up to date.
    ``store_SY`` holds the summaries.
    Source: the mean key is ShadowKV's summary, arXiv 2410.21465.
    """

    def __init__(
        self, basis: Basis, *, geometry: Geometry, frames_RF: Tensor, num_frames: int
    ) -> None:
        assert basis.keys_LHDR.shape == (
            geometry.num_layers, geometry.num_kv_heads, geometry.head_dim, geometry.kept_dims,
        )  # fmt: skip
        padding = (0, geometry.stored_dims - geometry.kept_dims)
        keys_LHDR, queries_LHDR = (F.pad(part, padding) for part in basis[:2])
        device = frames_RF.device
        self._geometry = geometry
        self._frames_RF = frames_RF
        self._keys_NDR = keys_LHDR.flatten(0, 1).contiguous().to(device)
        self._queries_LHDR = queries_LHDR.contiguous().to(device)
        self._centre_ND = basis.centre_LHD.flatten(0, 1).contiguous().to(device)
        num_rows = (num_frames + 1) * geometry.num_lanes
        size = (num_rows, row_bytes(geometry.pages_per_block, geometry.stored_dims))
        self.store_SY = torch.zeros(size, dtype=torch.uint8, device=device)

    @property
    def store_bytes(self) -> int:
        return self.store_SY.nbytes

    def summarise(self, pages_MTCD: Tensor, page_rows_M: Tensor) -> None:
        summarise_pages(
            pages_MTCD.contiguous(),
            page_rows_M,
            basis_NDR=self._keys_NDR,
            centre_ND=self._centre_ND,
            pages_per_frame=self._geometry.pages_per_block,
            store_SY=self.store_SY,
        )

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
        geometry = self._geometry
        select_by_mean_keys(
            q_BHGD,
            self.store_SY,
            basis_HDR=self._queries_LHDR[layer],
            rows_B=rows_B,
            frames_RF=self._frames_RF,
            num_full_B=num_full_B,
            count_B=count_B,
            layer=layer,
            num_layers=geometry.num_layers,
            pages_per_frame=geometry.pages_per_block,
            scale=geometry.head_dim**-0.5,
            sink_pages=SINK_PAGES,
            recent_pages=recent_pages(geometry.page_size),
            max_pages=max_pages,
            out_BHK=out_BHK,
        )
