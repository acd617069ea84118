"""The hot tier: one arena of blocks, cut into slots, with the age and owner of every slot."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsed.core import MemoryPlan
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.kvcache.pages import FreeList

FREE_STEP = -1  # no page, or one without a token yet: older than any other
LOCKED_STEP = 2**31 - 1  # a slot that no victim search may take


class HotArena:
    """Slots ``[token][K|V][head_dim]`` of one page each, over all requests, layers and heads.

    Block 0 belongs to nobody: its first slot takes the writes of lanes that have nothing to
    write, so that device code needs no branches. Room that was never written holds anything, and
    readers mask it. ``slot_page`` is the page in a slot (-1: none), ``slot_step`` the last step
    that used it, ``FREE_STEP`` or ``LOCKED_STEP``, as ``kernels.tables.PageTables`` says.
    """

    def __init__(
        self, geometry: Geometry, plan: MemoryPlan, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        pages_per_block = geometry.pages_per_block
        num_slots = plan.num_blocks * pages_per_block
        shape = (num_slots, geometry.page_size, 2, geometry.head_dim)
        self.blocks = FreeList(plan.num_blocks - 1, first=1)
        self.pages_NTCD = torch.empty(shape, dtype=dtype, device=device)
        self.pages_NX = self.pages_NTCD.view(num_slots, -1)
        self.slot_page_N = torch.full((num_slots,), -1, dtype=torch.int32, device=device)
        self.slot_step_N = torch.full((num_slots,), FREE_STEP, dtype=torch.int32, device=device)
        self._block_bytes = geometry.block_bytes

    @property
    def used_bytes(self) -> int:
        return (self.blocks.size - len(self.blocks)) * self._block_bytes

    @property
    def total_bytes(self) -> int:
        return self.blocks.size * self._block_bytes


def slots_of_blocks(blocks: Tensor, *, pages_per_block: int) -> Tensor:
    """Slot ids of blocks: shape (..., n) becomes (..., n * pages_per_block)."""
    offsets = torch.arange(pages_per_block, dtype=blocks.dtype, device=blocks.device)
    return (blocks[..., None] * pages_per_block + offsets).flatten(-2)
