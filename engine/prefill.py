"""Attention of prompt chunks: dense and exact, page by page into both tiers.

Shape legend: L layers, H KV heads, G query heads per KV head, D head dim, T tokens of a page,
n tokens of the chunk, P pages the chunk touches, C = 2 (key, value).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from sparsed.engine.batch import PromptChunk
from sparsed.engine.kvcache.cache import KVCache, Row
from sparsed.kernels.copy import copy_pages
from sparsed.kernels.dense import attend_dense
from sparsed.kernels.merge import merge_states


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkPlan:
    """Where one chunk reads and writes. ``num_head`` tokens of its first page are there already;
    ``num_context`` full pages lie before that page; ``num_sealed`` pages fill in this chunk."""

    row: Row
    num_tokens: int
    num_head: int
    num_context: int
    num_sealed: int
    slots_LHP: Tensor
    page_rows_LHP: Tensor


class PrefillAttention:
    """Runs chunks layer by layer. ``staging_NX`` holds pages on their way from the DRAM tier."""

    def __init__(self, cache: KVCache, *, staging_NX: Tensor, scale: float) -> None:
        self._cache = cache
        self._staging_NX = staging_NX
        self._scale = scale

    def plan(self, chunk: PromptChunk, *, step: int) -> ChunkPlan:
        page_size = self._cache.geometry.page_size
        first, last = chunk.start // page_size, -(-chunk.end // page_size)
        self._cache.open_chunk(chunk.row, chunk.start, chunk.end, step=step)
        return ChunkPlan(
            row=self._cache.rows[chunk.row],
            num_tokens=len(chunk.tokens),
            num_head=chunk.start % page_size,
            num_context=first,
            num_sealed=chunk.end // page_size - first,
            slots_LHP=self._cache.tables.slots_of(chunk.row, first, last).clone(),
            page_rows_LHP=self._cache.tables.page_rows(chunk.row, first, last),
        )

    def run(self, plan: ChunkPlan, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend and store. Shapes: q (n, H * G, D); k, v (n, H, D); returns (n, H * G, D)."""
        num_tokens, num_heads, head_dim = k.shape
        q_HGnD = q.view(num_tokens, num_heads, -1, head_dim).permute(1, 2, 0, 3)
        pages_HPTCD = self._fill_pages(plan, layer, k, v)
        tokens_HMCD = pages_HPTCD.flatten(1, 2)
        begin, end = plan.num_head, plan.num_head + num_tokens
        state = attend_dense(q_HGnD, tokens_HMCD[:, begin:end], causal=True, scale=self._scale)
        head = [tokens_HMCD[:, :begin]] if begin else []
        for kv_HMCD in chain(head, self._context(plan, layer)):
            other = attend_dense(q_HGnD, kv_HMCD, causal=False, scale=self._scale)
            state = merge_states(*state, *other)
        self._store(plan, layer, pages_HPTCD)
        return state[0].to(q.dtype).permute(2, 0, 1, 3).reshape(q.shape)

    def _fill_pages(self, plan: ChunkPlan, layer: int, k: Tensor, v: Tensor) -> Tensor:
        """The pages the chunk touches (H, P, T, 2, D): their earlier tokens, the chunk, zeros."""
        cache, num_pages = self._cache, plan.slots_LHP.shape[-1]
        page_size = cache.geometry.page_size
        num_tokens, num_heads, head_dim = k.shape
        pages_HMCD = k.new_zeros((num_heads, num_pages * page_size, 2, head_dim))
        if plan.num_head:
            first_H = plan.slots_LHP[layer, :, 0].long()
            pages_HMCD[:, : plan.num_head] = cache.arena.pages_NTCD[first_H, : plan.num_head]
        window = pages_HMCD[:, plan.num_head : plan.num_head + num_tokens]
        window[:, :, 0] = k.transpose(0, 1)
        window[:, :, 1] = v.transpose(0, 1)
        return pages_HMCD.view(num_heads, num_pages, page_size, 2, head_dim)

    def _context(self, plan: ChunkPlan, layer: int) -> Iterator[Tensor]:
        """K and V of the full pages before the chunk, (H, M, 2, D), in pieces of the staging; each
        is valid until the next one is asked for."""
        cache = self._cache
        num_heads = cache.geometry.num_kv_heads
        piece = len(self._staging_NX) // num_heads
        for first in range(0, plan.num_context, piece):
            last = min(first + piece, plan.num_context)
            if plan.row.complete:
                slots_HP = cache.tables.slots_of(plan.row.index, first, last)[layer]
                pages = cache.arena.pages_NX.index_select(0, slots_HP.flatten())
            else:
                rows_HP = cache.tables.page_rows(plan.row.index, first, last)[layer].flatten()
                pages = self._staging_NX[: len(rows_HP)]
                target = torch.arange(len(rows_HP), device=rows_HP.device)
                cache.transfer.load(pages, cache.pool.pages_RX, dst_rows=target, src_rows=rows_HP)
            yield pages.view(num_heads, -1, 2, cache.geometry.head_dim)

    def _store(self, plan: ChunkPlan, layer: int, pages_HPTCD: Tensor) -> None:
        """Write pages with a slot to the hot tier, full pages to the DRAM tier and summarise."""
        cache = self._cache
        pages_NX = pages_HPTCD.flatten(0, 1).flatten(1)
        index_HP = torch.arange(len(pages_NX), device=pages_NX.device).view(
            plan.slots_LHP.shape[1:]
        )
        slots_HP = plan.slots_LHP[layer].long()
        copy_pages(
            cache.arena.pages_NX,
            pages_NX,
            dst_rows_M=slots_HP.clamp(min=0).flatten().contiguous(),
            src_rows_M=torch.where(slots_HP >= 0, index_HP, -1).flatten().contiguous(),
        )
        sealed = slice(0, plan.num_sealed)
        rows_M = plan.page_rows_LHP[layer, :, sealed].flatten()
        if len(rows_M):
            index_M = index_HP[:, sealed].flatten()
            cache.transfer.save(cache.pool.pages_RX, pages_NX, dst_rows=rows_M, src_rows=index_M)
            cache.summarise(pages_HPTCD[:, sealed].flatten(0, 1), rows_M)
