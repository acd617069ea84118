"""Attention of a decode step over both tiers, on the device from selection to result.

A layer ranks its pages, selects, finds out which of the selected pages are in the hot tier and
gives the others slots; they are fetched on a stream of their own while attention reads those that
are there. Nothing waits for the host, so that a CUDA graph can hold all of it.

Shape legend: B requests, padded, H KV heads, G query heads per KV head, V rows of logits per KV head, D head dim, K selected
pages of a lane, L layers, X columns (pages of all requests), M pages to move.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.streams import new_stream
from sparsed.engine.kvcache.totals import DeviceCounters
from sparsed.engine.sparse.base import SINK_PAGES, Selector, recent_pages
from sparsed.engine.sparse.replay import SelectionTrace
from sparsed.engine.step_input import COLUMN_ALIGN, StepInput
from sparsed.kernels.resolve import Resolved, resolve_pages
from sparsed.kernels.select import select_pages
from sparsed.kernels.selected import (
    Selected,
    attend_hits,
    attend_misses,
    make_partials,
    merge_selected,
)
from sparsed.kernels.store import store_tokens

FETCH_PRIORITY = -1  # before the attention it runs beside


class Buffers(NamedTuple):
    """What one layer hands on inside a step, for as many requests as there are rows; every layer
    uses the same. ``misses_L`` counts the pages that each layer of the step had to fetch."""

    logits_HVX: Tensor
    pages_BHK: Tensor
    slots_BHK: Tensor
    num_hits_BH: Tensor
    tail_slots_BH: Tensor
    miss_dst_M: Tensor
    miss_src_M: Tensor
    misses_L: Tensor


class Step(NamedTuple):
    """A step's inputs, and what all its layers make of them: pages that each request attends to,
    place of the token in its partial page, tokens of that page."""

    inputs: StepInput
    count_B: Tensor
    offsets_B: Tensor
    tail_tokens_B: Tensor


class Placed(NamedTuple):
    """Where the pages of a layer are, once ``fetched`` (None: now) is over."""

    selected: Selected
    fetched: torch.cuda.Event | None


class TieredAttention:
    """Call ``begin``, then ``place`` and ``attend`` for every layer in order, then ``finish``. What
    ``place`` gives holds until it is called again. One stream.

    ``max_count``: most full pages that a request selects. ``counters``: pages selected, missed,
    evicted, and those that found no slot, since the start.
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
        scale: float,
        trace: SelectionTrace | None,
    ) -> None:
        device, geometry = cache.arena.pages_NX.device, cache.geometry
        self._cache = cache
        self._selector = selector
        self._scale = scale
        self._trace = trace
        self._max_pages = max_pages
        self._lane_slots = cache.arena.blocks.size // geometry.num_lanes * geometry.pages_per_block
        self._stream = new_stream(device, priority=FETCH_PRIORITY)
        self.counters = DeviceCounters(4, device=device)
        self.window_RLH = torch.zeros_like(cache.tables.num_blocks_RLH)
        num_heads, num_layers = geometry.num_kv_heads, geometry.num_layers
        pool_pages = len(cache.pool.pages_RX) // geometry.num_lanes
        columns = min(pool_pages, max_rows * max_pages) + COLUMN_ALIGN * max_rows
        columns = -(-columns // COLUMN_ALIGN) * COLUMN_ALIGN
        lanes = (max_rows, num_heads)

        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._buffers = Buffers(
            logits_HVX=torch.zeros((num_heads, selector.num_scores(group), columns), device=device),
            pages_BHK=ints(*lanes, max_count),
            slots_BHK=ints(*lanes, max_count),
            num_hits_BH=ints(*lanes),
            tail_slots_BH=ints(*lanes),
            miss_dst_M=ints(max_rows * num_heads * max_count, dtype=torch.int64),
            miss_src_M=ints(max_rows * num_heads * max_count, dtype=torch.int64),
            misses_L=ints(num_layers),
        )

    @property
    def max_count(self) -> int:
        """Most full pages that a request may select here."""
        return self._buffers.pages_BHK.shape[2]

    def begin(self, inputs: StepInput) -> Step:
        """Start a step: forget what the last one had to fetch."""
        self._buffers.misses_L.zero_()
        if self._trace is not None:
            self._trace.begin(inputs.rows_B, inputs.positions_B)
        offsets_B = inputs.positions_B % self._cache.geometry.page_size
        return Step(
            inputs=inputs,
            count_B=torch.minimum(inputs.pages.count_B, inputs.pages.num_full_B),
            offsets_B=offsets_B,
            tail_tokens_B=offsets_B + 1,
        )

    def place(self, step: Step, layer: int, q_BHGD: Tensor, k_BHD: Tensor, v_BHD: Tensor) -> Placed:
        """Select the pages of a layer, give them slots, have those fetched that are missing, and
        store the token in its partial page."""
        resolved = self._resolve(layer, self._select(layer, q_BHGD, step.inputs), step.inputs)
        fetched = self._fetch(resolved)
        store_tokens(
            self._cache.arena.pages_NTCD,
            slots_BH=resolved.tail_slots_BH,
            offsets_B=step.offsets_B,
            k_BHD=k_BHD,
            v_BHD=v_BHD,
        )
        selected = Selected(
            slots_BHK=resolved.slots_BHK,
            num_hits_BH=resolved.num_hits_BH,
            count_B=step.count_B,
            tail_slots_BH=resolved.tail_slots_BH,
            tail_tokens_B=step.tail_tokens_B,
        )
        return Placed(selected, fetched)

    def attend(self, placed: Placed, q_BHGD: Tensor, *, out_BHGD: Tensor) -> Tensor:
        """Attend to the placed pages and to the partial one: into ``out``, for requests that
        select. Returns the logs of the softmax sums (B, H, G)."""
        cache, scale, selected = self._cache, self._scale, placed.selected
        arena_NTCD, page_size = cache.arena.pages_NTCD, cache.geometry.page_size
        partials = make_partials(selected, q_BHGD, page_size=page_size)
        attend_hits(q_BHGD, arena_NTCD, selected=selected, partials=partials, scale=scale)
        if placed.fetched is not None:
            torch.cuda.current_stream(q_BHGD.device).wait_event(placed.fetched)
        attend_misses(q_BHGD, arena_NTCD, selected=selected, partials=partials, scale=scale)
        lse_BHG = torch.empty(q_BHGD.shape[:3], device=q_BHGD.device)
        merge_selected(selected, partials, page_size=page_size, out_BHGD=out_BHGD, lse_BHG=lse_BHG)
        return lse_BHG

    def finish(self) -> None:
        """End a step: count what was fetched."""
        self._cache.transfer.count_fetched(self._buffers.misses_L.sum())

    def _select(self, layer: int, q_BHGD: Tensor, inputs: StepInput) -> Tensor:
        buffers, pages = self._buffers, inputs.pages
        self._selector.estimate(
            q_BHGD,
            layer=layer,
            rows_B=inputs.rows_B,
            num_full_B=pages.num_full_B,
            first_B=pages.first_B,
            out_HVX=buffers.logits_HVX,
        )
        pages_BHK = buffers.pages_BHK[: len(q_BHGD)]
        select_pages(
            buffers.logits_HVX,
            first_B=pages.first_B,
            num_full_B=pages.num_full_B,
            count_B=pages.count_B,
            sink_pages=SINK_PAGES,
            recent_pages=recent_pages(self._cache.geometry.page_size),
            max_pages=self._max_pages,
            out_BHK=pages_BHK,
        )
        if self._trace is not None:
            self._trace.overwrite(
                layer, pages_BHK, count_B=pages.count_B, num_full_B=pages.num_full_B
            )
        return pages_BHK

    def _resolve(self, layer: int, pages_BHK: Tensor, inputs: StepInput) -> Resolved:
        buffers, cache, size = self._buffers, self._cache, len(pages_BHK)
        resolved = Resolved(
            slots_BHK=buffers.slots_BHK[:size],
            num_hits_BH=buffers.num_hits_BH[:size],
            tail_slots_BH=buffers.tail_slots_BH[:size],
            miss_dst_M=buffers.miss_dst_M,
            miss_src_M=buffers.miss_src_M,
            num_misses_1=buffers.misses_L[layer : layer + 1],
            window_RLH=self.window_RLH,
            demand_RLH2=cache.tables.demand_RLH2,
            counters_4=self.counters.values_C,
        )
        resolve_pages(
            pages_BHK,
            rows_B=inputs.rows_B,
            positions_B=inputs.positions_B,
            layer=layer,
            tables=cache.tables.with_arena(cache.arena),
            step_1=inputs.step_1,
            page_size=cache.geometry.page_size,
            max_slots=self._lane_slots,
            out=resolved,
        )
        return resolved

    def _fetch(self, resolved: Resolved) -> torch.cuda.Event | None:
        """Fetch the missing pages, on the stream of fetches; what to wait for."""
        cache, stream = self._cache, self._stream
        fetch = partial(
            cache.transfer.fetch,
            cache.arena.pages_NX,
            cache.pool.pages_RX,
            dst_rows_M=resolved.miss_dst_M,
            src_rows_M=resolved.miss_src_M,
            count_1=resolved.num_misses_1,
        )
        if stream is None:
            fetch()
            return None
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            fetch()
            return stream.record_event()
