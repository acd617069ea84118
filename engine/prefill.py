"""Attention of prompt chunks: dense and exact, token by token into both tiers.

Shape legend: L layers, H KV heads, G query heads per KV head, D head dim, T tokens of a page,
n tokens of the chunk, P pages the chunk touches, F frames it touches, C = 2 (key, value).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsed.core import BLOCK_TOKENS
from sparsed.engine.batch import PromptChunk
from sparsed.engine.cold_context import ColdContext
from sparsed.engine.dense import DenseAttention
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.geometry import Geometry, num_frames
from sparsed.engine.kvcache.order import Saved
from sparsed.engine.kvcache.row import Row
from sparsed.engine.kvcache.upload import upload
from sparsed.kernels.merge import merge_states
from sparsed.kernels.store import store_tokens


class WholeFrames(NamedTuple):
    """Frames that a chunk fills from end to end: their ids, and the first one's place in the
    layer buffer."""

    frames: tuple[int, ...]
    first: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkPlan:
    """Where one chunk reads and writes. Its tokens are ``start`` .. ``start + num_tokens - 1``;
    the first ``num_sealed`` of its P pages are full when it is done. ``buffer_NX`` holds one layer
    of the chunk as the DRAM tier will: frame by frame, (F, H, pages of a block)."""

    row: Row
    start: int
    num_tokens: int
    num_sealed: int
    buffer_NX: Tensor
    offsets_n: Tensor  # int32, place of each token in its page
    slots_LnH: Tensor  # int32, its page in the hot tier, -1 where it has none
    buffer_slots_nH: Tensor  # int32, its page in the layer buffer
    first_slots_LH: Tensor  # int64, the hot slot of the first page
    sealed_rows_LHP: Tensor  # of full pages, in the DRAM tier
    sealed_slots_HP: Tensor  # of the same pages, in the layer buffer
    whole: WholeFrames
    loose_P: Tensor  # places among the full pages of those outside of whole frames
    saves: list[Saved] = field(default_factory=list)  # that still read the buffer


class PrefillAttention:
    """Runs chunks layer by layer. ``staging_NX`` holds earlier pages on their way to attention."""

    def __init__(self, cache: KVCache, *, staging_NX: Tensor, scale: float) -> None:
        self._cache = cache
        self._staging_NX = staging_NX
        self._cold = ColdContext(cache, staging_NX=staging_NX)
        self._attend = DenseAttention(scale=scale)

    def warm_up(self, chunk_tokens: int, *, max_tokens: int, group: int) -> None:
        """Have the backends measured for whole chunks and the pieces of context they meet, and
        every merge compiled; strides are those of real chunks, for plans depend on them."""
        pages_NX, geometry = self._cache.arena.pages_NX, self._cache.geometry
        heads, dim = geometry.num_kv_heads, geometry.head_dim
        piece = len(self._staging_NX) // heads * geometry.page_size
        starts = range(chunk_tokens, max_tokens, chunk_tokens)
        pieces = {
            num_keys
            for most in (piece, self._cold.piece_tokens)
            for start in starts
            for num_keys in (start % most or most, min(most, start))
        }
        qkv = pages_NX.new_empty((chunk_tokens, heads * (group + 2), dim)).normal_()
        q, k, v = qkv[:, : heads * group], qkv[:, -2 * heads : -heads], qkv[:, -heads:]
        q_HGnD, o_HGnD = (_by_head(x, heads) for x in (q, torch.empty_like(q).contiguous()))
        state = self._attend(q_HGnD, k.transpose(0, 1), v.transpose(0, 1), causal=True)
        for num_keys in sorted(pieces):
            kv = pages_NX.new_empty((heads, num_keys, 2, dim)).normal_()
            other = self._attend(q_HGnD, kv[:, :, 0], kv[:, :, 1], causal=False)
            merged = merge_states(*state, *other)
            for first in (state, merged):
                merge_states(*first, *other)
                merge_states(*first, *other, out=o_HGnD)

    def plan(self, chunk: PromptChunk, *, step: int) -> ChunkPlan:
        cache, geometry = self._cache, self._cache.geometry
        page_size = geometry.page_size
        first, last = chunk.start // page_size, -(-chunk.end // page_size)
        num_sealed = chunk.end // page_size - first
        whole = _whole_frames(chunk, cache.rows[chunk.row])
        cache.open_chunk(chunk.row, chunk.start, chunk.end, step=step)
        slots_LHP = cache.tables.slots_of(chunk.row, first, last)
        device = slots_LHP.device
        num_touched = num_frames(chunk.end) - chunk.start // BLOCK_TOKENS
        num_blocks = num_touched * geometry.num_kv_heads if num_sealed else 0
        positions_n = torch.arange(chunk.start, chunk.end, device=device)
        pages_n = positions_n // page_size
        in_buffer_HP = _buffer_slots(first, last, cache=cache, device=device)
        return ChunkPlan(
            row=cache.rows[chunk.row],
            start=chunk.start,
            num_tokens=len(chunk.tokens),
            num_sealed=num_sealed,
            buffer_NX=cache.arena.pages_NX.new_empty(
                (num_blocks * geometry.pages_per_block, cache.arena.pages_NX.shape[1])
            ),
            offsets_n=(positions_n % page_size).int(),
            slots_LnH=slots_LHP[:, :, pages_n - first].transpose(1, 2).contiguous(),
            buffer_slots_nH=in_buffer_HP[:, pages_n - first].t().int().contiguous(),
            first_slots_LH=slots_LHP[:, :, 0].long(),
            sealed_rows_LHP=cache.tables.page_rows(chunk.row, first, first + num_sealed),
            sealed_slots_HP=in_buffer_HP[:, :num_sealed],
            whole=whole,
            loose_P=upload(_loose_pages(chunk, whole, geometry), device=device),
        )

    def run(self, plan: ChunkPlan, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend and store. Shapes: q (n, H * G, D); k, v (n, H, D); returns (n, H * G, D)."""
        o = torch.empty_like(q, memory_format=torch.contiguous_format)
        q_HGnD, o_HGnD = _by_head(q, k.shape[1]), _by_head(o, k.shape[1])
        state = self._attend(q_HGnD, k.transpose(0, 1), v.transpose(0, 1), causal=True)
        if plan.start == 0:
            o_HGnD.copy_(state[0])
        done = 0
        for kv_HMCD in self._context(plan, layer):
            done += kv_HMCD.shape[1]
            other = self._attend(q_HGnD, kv_HMCD[:, :, 0], kv_HMCD[:, :, 1], causal=False)
            state = merge_states(*state, *other, out=o_HGnD if done == plan.start else None)
        self._store(plan, layer, k, v)
        return o

    def foresee(self, plan: ChunkPlan, layer: int) -> None:
        """``layer`` of this chunk is the next thing that needs the staging area."""
        if plan.start and not plan.row.complete and layer < self._cache.geometry.num_layers:
            num_full = plan.start // self._cache.geometry.page_size
            self._cold.foresee(plan.row.index, layer, num_pages=num_full)

    def _context(self, plan: ChunkPlan, layer: int) -> Iterator[Tensor]:
        """K and V of the tokens before the chunk, (H, M, 2, D), in pieces of the staging; each is
        valid until the next one is asked for."""
        read = self._resident_context if plan.row.complete else self._cold_context
        return read(plan, layer) if plan.start else iter(())

    def _resident_context(self, plan: ChunkPlan, layer: int) -> Iterator[Tensor]:
        """Block by block, the last one perhaps in part."""
        cache, geometry = self._cache, self._cache.geometry
        heads = geometry.num_kv_heads
        arena_BX = cache.arena.pages_NX.view(-1, geometry.block_elements)
        staging_BX = self._staging_NX.view(-1, geometry.block_elements)
        piece = len(staging_BX) // heads
        last = num_frames(plan.start)
        blocks_Hb = cache.tables.lane_blocks_RLHN[plan.row.index, layer, :, :last]
        for begin in range(0, last, piece):
            end = min(begin + piece, last)
            kv_BX = staging_BX[: heads * (end - begin)]
            torch.index_select(arena_BX, 0, blocks_Hb[:, begin:end].flatten(), out=kv_BX)
            kv_HMCD = kv_BX.view(heads, -1, 2, geometry.head_dim)
            yield kv_HMCD[:, : plan.start - begin * BLOCK_TOKENS]

    def _cold_context(self, plan: ChunkPlan, layer: int) -> Iterator[Tensor]:
        """Full pages from the DRAM tier, and the open page from the hot one."""
        page_size = self._cache.geometry.page_size
        num_full, num_open = divmod(plan.start, page_size)
        yield from self._cold.pieces(plan.row.index, layer, num_pages=num_full)
        if num_open:
            pages_NTCD = self._cache.arena.pages_NTCD
            yield pages_NTCD[plan.first_slots_LH[layer], :num_open]

    def _store(self, plan: ChunkPlan, layer: int, k: Tensor, v: Tensor) -> None:
        """Write tokens whose page has a slot to the hot tier, and full pages to the DRAM tier."""
        arena_NTCD = self._cache.arena.pages_NTCD
        slots_nH = plan.slots_LnH[layer]
        store_tokens(arena_NTCD, slots_BH=slots_nH, offsets_B=plan.offsets_n, k_BHD=k, v_BHD=v)
        if plan.num_sealed:
            self._fill_buffer(plan, layer, k, v)
            self._save(plan, layer)

    def _fill_buffer(self, plan: ChunkPlan, layer: int, k: Tensor, v: Tensor) -> None:
        while plan.saves:
            plan.saves.pop().wait()
        arena_NTCD = self._cache.arena.pages_NTCD
        buffer_NTCD = plan.buffer_NX.view(-1, *arena_NTCD.shape[1:])
        slots_nH = plan.buffer_slots_nH
        store_tokens(buffer_NTCD, slots_BH=slots_nH, offsets_B=plan.offsets_n, k_BHD=k, v_BHD=v)
        num_open = plan.start % self._cache.geometry.page_size
        if num_open:  # the tokens that the first page held already
            opened_HTCD = arena_NTCD[plan.first_slots_LH[layer], :num_open]
            buffer_NTCD[plan.sealed_slots_HP[:, 0], :num_open] = opened_HTCD

    def _save(self, plan: ChunkPlan, layer: int) -> None:
        """Whole frames are one large piece each; other full pages go page by page."""
        cache, (frames, first) = self._cache, plan.whole
        if frames:
            buffer_FX = plan.buffer_NX.view(-1, cache.pool.layers_RX.shape[1])
            source_FX = buffer_FX[first : first + len(frames)]
            saved = cache.transfer.save_blocks(cache.pool, source_FX, frames=frames, layer=layer)
            plan.saves.append(saved)
        rows_HP, slots_HP = plan.sealed_rows_LHP[layer], plan.sealed_slots_HP
        if len(plan.loose_P):
            saved = cache.transfer.save(
                cache.pool.pages_RX,
                plan.buffer_NX,
                dst_rows=rows_HP[:, plan.loose_P],
                src_rows=slots_HP[:, plan.loose_P],
                background=True,
            )
            plan.saves.append(saved)
        if cache.selector is not None:
            pages_NTCD = plan.buffer_NX.view(-1, *cache.arena.pages_NTCD.shape[1:])
            cache.summarise(pages_NTCD[slots_HP.flatten()], rows_HP.flatten())


def _by_head(x: Tensor, num_kv_heads: int) -> Tensor:
    """A view (H, G, n, D) of (n, H * G, D)."""
    return x.view(len(x), num_kv_heads, -1, x.shape[2]).permute(1, 2, 0, 3)


def _whole_frames(chunk: PromptChunk, row: Row) -> WholeFrames:
    first, last = num_frames(chunk.start), chunk.end // BLOCK_TOKENS
    frames = tuple(row.frames[first:last].tolist())
    return WholeFrames(frames, first - chunk.start // BLOCK_TOKENS)


def _loose_pages(
    chunk: PromptChunk, whole: WholeFrames, geometry: Geometry
) -> npt.NDArray[np.int64]:
    """Full pages of the chunk, counted from its first page, that lie in no whole frame."""
    first, last = chunk.start // geometry.page_size, chunk.end // geometry.page_size
    pages_P = np.arange(first, last)
    begin = (chunk.start // BLOCK_TOKENS + whole.first) * geometry.pages_per_block
    end = begin + len(whole.frames) * geometry.pages_per_block
    return pages_P[(pages_P < begin) | (pages_P >= end)] - first


def _buffer_slots(first: int, last: int, *, cache: KVCache, device: torch.device) -> Tensor:
    """Slots (H, P) of pages first .. last - 1 in a layer buffer whose first frame holds ``first``."""
    geometry = cache.geometry
    per_block, heads = geometry.pages_per_block, geometry.num_kv_heads
    pages_P = torch.arange(first, last, device=device)
    frames_P = pages_P // per_block - first // per_block
    heads_H1 = torch.arange(heads, device=device)[:, None]
    return (frames_P * heads + heads_H1) * per_block + pages_P % per_block
