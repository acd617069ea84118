"""The sizes of a sparse decode step whose kernels are measured.

Legend: B requests.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from sparsed.core import BLOCK_TOKENS
from sparsed.engine.kvcache.geometry import Geometry, num_frames
from sparsed.engine.measure.attention_cases import BUDGET_TOKENS
from sparsed.engine.measure.cases import Setting

LEAST_CONTEXT: Final = 2 * BLOCK_TOKENS  # so that there is a full page to select


class SparseStep(NamedTuple):
    """``batch`` requests that decode the last token of the longest context."""

    setting: Setting
    batch: int

    @property
    def context(self) -> int:
        """Tokens of each request."""
        return max(*self.setting.contexts, LEAST_CONTEXT)

    @property
    def frames(self) -> int:
        """Frames of each request."""
        return num_frames(self.context)

    @property
    def geometry(self) -> Geometry:
        shape = self.setting.shape
        return Geometry(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            page_size=self.setting.page_size,
            element_bytes=self.setting.dtype.itemsize,
        )

    @property
    def num_lanes(self) -> int:
        """Lanes of one layer."""
        return self.batch * self.setting.shape.num_kv_heads

    @property
    def num_full(self) -> int:
        """Full pages of a request, before the page of its token."""
        return (self.context - 1) // self.setting.page_size

    @property
    def num_selected(self) -> int:
        """Full pages that a lane selects: with the partial one, the budget."""
        return min(BUDGET_TOKENS // self.setting.page_size - 1, self.num_full)

    def numbers(self) -> Tensor:
        """0, 1, ..., (B,) int32."""
        return torch.arange(self.batch, device=self.setting.device, dtype=torch.int32)

    def same(self, value: int) -> Tensor:
        """``value`` of all requests, (B,) int32."""
        return torch.full((self.batch,), value, device=self.setting.device, dtype=torch.int32)
