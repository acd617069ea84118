"""Brings selected pages into the hot tier: the bucketed LRU over a cache's tables, and the loads.

Shape legend: B requests, H KV heads, K selected pages; the rest as in ``kernels.tables``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsed.core import BLOCK_TOKENS
from sparsed.engine.fetch_times import UNTIMED
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.totals import DeviceCounters
from sparsed.kernels.resolve import MAX_SLOTS, Resolved, resolve_pages


class Residency:
    """``counters`` are those of ``kernels.resolve.Resolved``, since the start. ``times``: who times
    the loads of this step."""

    def __init__(self, cache: KVCache) -> None:
        device = cache.arena.pages_NX.device
        self._cache = cache
        self._tables = cache.tables.with_arena(cache.arena)
        self._step_1 = torch.zeros(1, dtype=torch.int32, device=device)
        self.counters = DeviceCounters(4, device=device)
        self.times = UNTIMED

    def begin(self, step: int) -> None:
        """Steps only rise."""
        self._step_1.fill_(step)

    def bring_in(
        self, pages_BHK: Tensor, *, layer: int, rows_B: Tensor, positions_B: Tensor, max_blocks: int
    ) -> Resolved:
        """Slots of selected pages, as ``kernels.resolve.resolve_pages`` says, and what they held
        before replaced. No lane owns more than ``max_blocks``."""
        cache, page_size = self._cache, self._cache.geometry.page_size
        resolved = self._empty(pages_BHK)
        resolve_pages(
            pages_BHK,
            rows_B=rows_B,
            positions_B=positions_B,
            layer=layer,
            tables=self._tables,
            step_1=self._step_1,
            page_size=page_size,
            max_slots=min(max_blocks * (BLOCK_TOKENS // page_size), MAX_SLOTS),
            out=resolved,
        )
        load = self.times.fetch()
        load.is_needed()
        load.starts()
        cache.transfer.load(
            cache.arena.pages_NX,
            cache.pool.pages_RX,
            dst_rows=resolved.miss_dst_M,
            src_rows=resolved.miss_src_M,
            count=resolved.num_misses_1,
        )
        load.ends(resolved.num_misses_1)
        return resolved

    def _empty(self, pages_BHK: Tensor) -> Resolved:
        heads_BH = pages_BHK[..., 0]
        return Resolved(
            slots_BHK=torch.empty_like(pages_BHK),
            num_hits_BH=torch.empty_like(heads_BH, memory_format=torch.contiguous_format),
            tail_slots_BH=torch.empty_like(heads_BH, memory_format=torch.contiguous_format),
            miss_dst_M=torch.empty(pages_BHK.numel(), dtype=torch.int64, device=heads_BH.device),
            miss_src_M=torch.empty(pages_BHK.numel(), dtype=torch.int64, device=heads_BH.device),
            num_misses_1=torch.zeros_like(self._step_1),
            window_RLH=self._cache.tables.window_RLH,
            demand_RLH2=self._cache.tables.demand_RLH2,
            counters_4=self.counters.values_C,
        )
