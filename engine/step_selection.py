"""The pages of a layer: ranked, selected, and given slots in the hot tier, on the device.

Shape legend: B requests, padded, H KV heads, G query heads per KV head, D head dim, K selected
pages of a lane, L layers, X anything, M pages to fetch.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.totals import DeviceCounters
from sparsed.engine.sparse.base import Selector
from sparsed.engine.step_input import Pages, StepInput
from sparsed.kernels.resolve import MAX_SLOTS, Resolved, resolve_pages
from sparsed.kernels.wasted import count_wasted

NUM_COUNTERS: Final = 5


class LayerSelection:
    """Room for one layer of as many requests as there are rows; all layers use it in turn.
    Selections are as wide as each step asks for, at most ``max_count`` pages.

    ``counters``: pages selected, missed, evicted, those that found no slot, and those that
    ``count_wasted`` found, since the start. ``misses_L``: pages that each layer of the step has to
    fetch. ``keeps_lists``: which pages these were is known until the step ends. One stream.
    """

    def __init__(
        self,
        cache: KVCache,
        selector: Selector,
        *,
        max_rows: int,
        max_count: int,
        max_pages: int,
        keeps_lists: bool = False,
    ) -> None:
        device, geometry = cache.arena.pages_NX.device, cache.geometry
        self._cache = cache
        self._selector = selector
        self._max_pages = max_pages
        lane_slots = cache.arena.blocks.size // geometry.num_lanes * geometry.pages_per_block
        self._lane_slots = min(lane_slots, max_pages, MAX_SLOTS)  # that one request can own
        num_heads = geometry.num_kv_heads

        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.max_count = max_count
        lanes, num_pages = (max_rows, num_heads), max_rows * num_heads * max_count
        self._pages_X, self._slots_X = ints(num_pages), ints(num_pages)
        self._num_hits_BH, self._tail_slots_BH = ints(*lanes), ints(*lanes)
        self._miss_dst_M = ints(num_pages, dtype=torch.int64)
        num_lists = geometry.num_layers if keeps_lists else 1
        self._miss_src_LM = ints(num_lists, num_pages, dtype=torch.int64)
        self.misses_L = ints(geometry.num_layers)
        self.counters = DeviceCounters(NUM_COUNTERS, device=device)

    def select(
        self, layer: int, q_BHGD: Tensor, inputs: StepInput, *, ranked: Pages, width: int
    ) -> Tensor:
        """Pages (B, H, K) that these queries select of ``ranked``, K being ``width``; valid until
        the next call."""
        shape = (len(q_BHGD), q_BHGD.shape[1], width)
        pages_BHK = self._pages_X[: math.prod(shape)].view(shape)
        self._selector.select(
            q_BHGD,
            layer=layer,
            rows_B=inputs.rows_B,
            num_full_B=ranked.num_full_B,
            count_B=ranked.count_B,
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
            miss_src_M=self._miss_src_LM[layer % len(self._miss_src_LM)],
            num_misses_1=self.misses_L[layer : layer + 1],
            window_RLH=cache.tables.window_RLH,
            demand_RLH2=cache.tables.demand_RLH2,
            counters_4=self.counters.values_C[:4],
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

    def count_wasted(self, inputs: StepInput) -> None:
        """Count the pages listed in this step that no selection of the step used; after the last
        layer, where lists are kept."""
        cache = self._cache
        count_wasted(
            self._miss_src_LM,
            counts_L=self.misses_L,
            tables=cache.tables.with_arena(cache.arena),
            step_1=inputs.step_1,
            out_1=self.counters.values_C[4:],
        )
