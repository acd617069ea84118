"""The pages of a layer: ranked, selected, and given slots in the hot tier, on the device.

Shape legend: B requests, padded, H KV heads, G query heads per KV head, V rows of logits per KV
head, D head dim, K selected pages of a lane, L layers, X columns (pages of all requests) or
anything, M pages to fetch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.totals import DeviceCounters
from sparsed.engine.sparse.base import SINK_PAGES, Selector, recent_pages
from sparsed.engine.step_input import COLUMN_ALIGN, StepInput
from sparsed.kernels.resolve import MAX_SLOTS, Resolved, resolve_pages
from sparsed.kernels.select import select_pages


class LayerSelection:
    """Room for one layer of as many requests as there are rows; all layers use it in turn.
    Selections are as wide as each step asks for, at most ``max_count`` pages.

    ``counters``: pages selected, missed, evicted, and those that found no slot, since the start.
    ``misses_L``: pages that each layer of the step has to fetch. One stream.
    """

    def __init__(
        self,
        cache: KVCache,
        selector: Selector,
        *,
        max_rows: int,
        max_count: int,
        max_pages: int,
        group: int,
    ) -> None:
        device, geometry = cache.arena.pages_NX.device, cache.geometry
        self._cache = cache
        self._selector = selector
        self._max_pages = max_pages
        lane_slots = cache.arena.blocks.size // geometry.num_lanes * geometry.pages_per_block
        self._lane_slots = min(lane_slots, max_pages, MAX_SLOTS)  # that one request can own
        num_heads = geometry.num_kv_heads
        pool_pages = len(cache.pool.pages_RX) // geometry.num_lanes
        columns = min(pool_pages, max_rows * max_pages) + COLUMN_ALIGN * max_rows
        columns = -(-columns // COLUMN_ALIGN) * COLUMN_ALIGN
        self._logits_HVX = torch.zeros(
            (num_heads, selector.num_scores(group), columns), device=device
        )

        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.max_count = max_count
        lanes, num_pages = (max_rows, num_heads), max_rows * num_heads * max_count
        self._pages_X, self._slots_X = ints(num_pages), ints(num_pages)
        self._num_hits_BH, self._tail_slots_BH = ints(*lanes), ints(*lanes)
        self._miss_dst_M = ints(num_pages, dtype=torch.int64)
        self._miss_src_M = ints(num_pages, dtype=torch.int64)
        self.misses_L = ints(geometry.num_layers)
        self.counters = DeviceCounters(4, device=device)

    def select(self, layer: int, q_BHGD: Tensor, inputs: StepInput, *, width: int) -> Tensor:
        """Pages (B, H, K) that these queries select, K being ``width``; valid until the next
        call."""
        pages, page_size = inputs.pages, self._cache.geometry.page_size
        self._selector.estimate(
            q_BHGD,
            layer=layer,
            rows_B=inputs.rows_B,
            num_full_B=pages.num_full_B,
            first_B=pages.first_B,
            out_HVX=self._logits_HVX,
        )
        shape = (len(q_BHGD), q_BHGD.shape[1], width)
        pages_BHK = self._pages_X[: math.prod(shape)].view(shape)
        select_pages(
            self._logits_HVX,
            first_B=pages.first_B,
            num_full_B=pages.num_full_B,
            count_B=pages.count_B,
            sink_pages=SINK_PAGES,
            recent_pages=recent_pages(page_size),
            max_pages=self._max_pages,
            out_BHK=pages_BHK,
        )
        return pages_BHK

    def resolve(
        self, layer: int, pages_BHK: Tensor, inputs: StepInput, *, step_1: Tensor
    ) -> Resolved:
        """Slots for these pages, used in ``step``, and what has to be fetched; valid until the
        next call."""
        cache, size = self._cache, len(pages_BHK)
        resolved = Resolved(
            slots_BHK=self._slots_X[: pages_BHK.numel()].view(pages_BHK.shape),
            num_hits_BH=self._num_hits_BH[:size],
            tail_slots_BH=self._tail_slots_BH[:size],
            miss_dst_M=self._miss_dst_M,
            miss_src_M=self._miss_src_M,
            num_misses_1=self.misses_L[layer : layer + 1],
            window_RLH=cache.tables.window_RLH,
            demand_RLH2=cache.tables.demand_RLH2,
            counters_4=self.counters.values_C,
        )
        resolve_pages(
            pages_BHK,
            rows_B=inputs.rows_B,
            positions_B=inputs.positions_B,
            layer=layer,
            tables=cache.tables.with_arena(cache.arena),
            step_1=step_1,
            page_size=cache.geometry.page_size,
            max_slots=self._lane_slots,
            out=resolved,
        )
        return resolved
