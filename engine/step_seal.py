"""The end of a captured step: pages that it filled are summarised and written through.

Shape legend: B requests, padded, L layers, H KV heads, M pages to save.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.hbm import LOCKED_STEP
from sparsed.engine.step_input import StepInput
from sparsed.kernels.seal import Sealed, seal_pages


class StepSeal:
    """Partial pages are locked while they fill, and sealed when they are full."""

    def __init__(self, cache: KVCache, *, max_rows: int) -> None:
        device = cache.arena.pages_NX.device
        self._cache = cache
        num_pages = max_rows * cache.geometry.num_lanes
        self._sealed = Sealed(
            src_M=torch.zeros(num_pages, dtype=torch.int64, device=device),
            dst_M=torch.zeros(num_pages, dtype=torch.int64, device=device),
            num_seals_1=torch.zeros(1, dtype=torch.int32, device=device),
        )

    def lock(self, slots_LBH: Tensor) -> None:
        """Keep these slots, where there is one, from being taken by others."""
        step_N = self._cache.arena.slot_step_N
        step_N.index_fill_(0, slots_LBH.clamp(min=0).flatten().long(), LOCKED_STEP)

    def run(self, inputs: StepInput) -> None:
        """Seal what the tokens of this step filled, all on the current stream: nobody may take a
        slot before its page is safe."""
        cache, sealed = self._cache, self._sealed
        sealed.num_seals_1.zero_()
        seal_pages(
            inputs.rows_B,
            positions_B=inputs.positions_B,
            tables=cache.tables.with_arena(cache.arena),
            step_1=inputs.step_1,
            page_size=cache.geometry.page_size,
            out=sealed,
        )
        cache.transfer.save(
            cache.pool.pages_RX,
            cache.arena.pages_NX,
            dst_rows=sealed.dst_M,
            src_rows=sealed.src_M,
            count=sealed.num_seals_1,
        )
        if cache.selector is not None:
            self._summarise(inputs)

    def _summarise(self, inputs: StepInput) -> None:
        """Summarise the partial pages of all rows that are full now."""
        cache, page_size = self._cache, self._cache.geometry.page_size
        rows_B, pages_B = inputs.rows_B.long(), inputs.positions_B.long() // page_size
        slots_BLH = cache.tables.slots_at(rows_B, pages_B).transpose(0, 1)
        rows_BLH = cache.tables.page_rows_at(rows_B, pages_B)
        is_full_B = inputs.positions_B % page_size == page_size - 1
        is_full_BLH = is_full_B[:, None, None] & (slots_BLH >= 0)
        cache.summarise(
            cache.arena.pages_NTCD[slots_BLH.clamp(min=0).flatten().long()],
            torch.where(is_full_BLH, rows_BLH, -1).flatten(),
        )
