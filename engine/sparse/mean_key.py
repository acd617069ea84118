"""Selection by the mean key of a page, kept in few bits of few dims of a learned basis.

Shape legend as in ``sparse.base``; L layers, N lanes (L * H), R kept dims, P pages of a frame,
S rows of the store (lanes of frames), Y bytes of such a row, W values of 16 bits of such a row.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.sparse.basis import Basis
from sparsed.kernels.estimate import estimate_pages, row_bytes
from sparsed.kernels.reference_estimate import pack_means

_PART_PAGES: Final = 1024  # summarised at once: each takes a copy of its lane's basis


class MeanKeySelector:
    """A page keeps the mean of its keys, less the mean key of its lane; a page's score is the
    product with the query. Layout as ``kernels.estimate`` reads it.

    ``frames_RF`` are the frames of all rows; whoever owns them keeps them up to date.
    Source: the mean key is ShadowKV's summary, arXiv 2410.21465.
    """

    def __init__(
        self, basis: Basis, *, geometry: Geometry, frames_RF: Tensor, num_frames: int
    ) -> None:
        layers, heads, head_dim, num_dims = basis.keys_LHDR.shape
        assert (layers, heads, head_dim) == (
            geometry.num_layers, geometry.num_kv_heads, geometry.head_dim,
        )  # fmt: skip
        device = frames_RF.device
        self._geometry = geometry
        self._frames_RF = frames_RF
        self._keys_NDR = basis.keys_LHDR.flatten(0, 1).contiguous().to(device)
        self._queries_LHDR = basis.queries_LHDR.contiguous().to(device)
        self._centre_ND = basis.centre_LHD.flatten(0, 1).contiguous().to(device)
        num_rows = (num_frames + 1) * geometry.num_lanes
        size = (num_rows, row_bytes(geometry.pages_per_block, num_dims))
        self._store_SY = torch.zeros(size, dtype=torch.uint8, device=device)
        self._first_scale = num_dims // 4 * geometry.pages_per_block  # in values of 16 bits
        self._code_row_R = torch.arange(num_dims // 2, device=device) * geometry.pages_per_block

    @property
    def store_bytes(self) -> int:
        return self._store_SY.nbytes

    def num_scores(self, group: int) -> int:
        return group

    def summarise(self, pages_MTCD: Tensor, page_rows_M: Tensor) -> None:
        parts = zip(pages_MTCD.split(_PART_PAGES), page_rows_M.split(_PART_PAGES), strict=True)
        for pages, page_rows in parts:
            self._summarise(pages, page_rows)

    def estimate(
        self,
        q_BHGD: Tensor,
        *,
        layer: int,
        rows_B: Tensor,
        num_full_B: Tensor,
        first_B: Tensor,
        out_HVX: Tensor,
    ) -> None:
        estimate_pages(
            q_BHGD,
            self._store_SY,
            basis_HDR=self._queries_LHDR[layer],
            rows_B=rows_B,
            frames_RF=self._frames_RF,
            num_full_B=num_full_B,
            first_B=first_B,
            layer=layer,
            num_layers=self._geometry.num_layers,
            pages_per_frame=self._geometry.pages_per_block,
            scale=self._geometry.head_dim**-0.5,
            out_HGX=out_HVX,
        )

    def _summarise(self, pages_MTCD: Tensor, page_rows_M: Tensor) -> None:
        per_frame = self._geometry.pages_per_block
        rows_M, places_M = page_rows_M // per_frame, page_rows_M % per_frame
        lanes_M = rows_M % self._geometry.num_lanes
        means_MD = pages_MTCD[:, :, 0].mean(1, dtype=torch.float32) - self._centre_ND[lanes_M]
        kept_MR = torch.bmm(means_MD[:, None], self._keys_NDR[lanes_M])[:, 0]
        codes, scales_M = pack_means(kept_MR)
        self._store_SY[rows_M[:, None], self._code_row_R + places_M[:, None]] = codes
        store_SW = self._store_SY.view(torch.float16)
        store_SW[rows_M, self._first_scale + places_M] = scales_M
