"""Attention over the two tiers: plan on the host once a step, run once a layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsed.core import RECALL_STRIDE
from sparsed.engine.batch import DecodeRow, StepPlan
from sparsed.engine.decode import DecodeCounts, Group, Tiers, make_groups
from sparsed.engine.decode_batch import is_sparse, make_batch
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.row import Reads
from sparsed.engine.prefill import ChunkPlan, PrefillAttention
from sparsed.engine.sparse.replay import SelectionTrace
from sparsed.kernels.store import store_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """Tokens come in order: all chunks, then one token per decode row."""

    chunks: tuple[ChunkPlan, ...]
    num_chunk_tokens: int
    tail_slots_LBH: Tensor | None  # of all decode rows
    offsets_B: Tensor | None
    dense_groups: tuple[Group, ...]  # for the first ``dense_layers`` layers
    groups: tuple[Group, ...]


class Attention:
    """Give ``run`` to the decoder as its attention, between ``plan`` and ``finish``."""

    def __init__(
        self,
        cache: KVCache,
        *,
        staging_NX: Tensor,
        dense_layers: int,
        scale: float,
        recall_stride: int = RECALL_STRIDE,
        trace: SelectionTrace | None = None,
    ) -> None:
        self._cache = cache
        self._dense_layers = dense_layers
        self._prefill = PrefillAttention(cache, staging_NX=staging_NX, scale=scale)
        self._tiers = Tiers(
            cache,
            staging_NX=staging_NX,
            scale=scale,
            recall_stride=recall_stride,
            trace=trace,
        )

    @property
    def tiers(self) -> Tiers:
        return self._tiers

    @property
    def counts(self) -> DecodeCounts:
        return self._tiers.counts

    def warm_up(self, chunk_tokens: int, *, max_tokens: int, group: int) -> None:
        """Have the backends measured that whole chunks of prompts up to ``max_tokens`` need."""
        self._prefill.warm_up(chunk_tokens, max_tokens=max_tokens, group=group)

    def plan(self, plan: StepPlan, *, step: int) -> AttentionPlan:
        """Plan a step; the pages of its decode tokens must be open."""
        cache, decodes = self._cache, plan.decodes
        chunks = tuple(self._prefill.plan(chunk, step=step) for chunk in plan.chunks)
        batch = make_batch(cache, decodes, range(len(decodes))) if decodes else None
        return AttentionPlan(
            chunks=chunks,
            num_chunk_tokens=sum(chunk.num_tokens for chunk in chunks),
            tail_slots_LBH=batch.tail_slots_LBH if batch else None,
            offsets_B=batch.tail_tokens_B - 1 if batch else None,
            dense_groups=self._groups(decodes, dense=True, step=step),
            groups=self._groups(decodes, dense=False, step=step),
        )

    def run(self, plan: AttentionPlan, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Shapes: q (N, H * G, D), k and v (N, H, D); returns (N, H * G, D) in q's dtype."""
        o = torch.empty_like(q, memory_format=torch.contiguous_format)
        first = 0
        for chunk in plan.chunks:
            part = slice(first, first + chunk.num_tokens)
            o[part] = self._prefill.run(chunk, layer, q[part], k[part], v[part])
            first = part.stop
        if plan.tail_slots_LBH is not None:
            part = slice(plan.num_chunk_tokens, None)
            self._decode(plan, layer, q[part], k[part], v[part], out=o[part])
        if plan.chunks:
            self._prefill.foresee(plan.chunks[0], layer + 1)
        return o

    def finish(self, decodes: Sequence[DecodeRow], *, step: int) -> None:
        """Seal the pages that the tokens of a step filled."""
        page_size = self._cache.geometry.page_size
        sealed = [
            (decode.row, decode.position // page_size)
            for decode in decodes
            if (decode.position + 1) % page_size == 0
        ]
        self._cache.seal(sealed, step=step)

    def count(self, decodes: Sequence[DecodeRow], *, in_place: Collection[int] = ()) -> None:
        """Count what the tokens of a step read; those of the rows ``in_place`` read everything."""
        for decode in decodes:
            self._count(decode.row, decode.position, in_place=decode.row in in_place)

    def _groups(self, decodes: Sequence[DecodeRow], *, dense: bool, step: int) -> tuple[Group, ...]:
        if dense and self._dense_layers == 0:
            return ()
        return make_groups(self._tiers, decodes, dense=dense, step=step)

    def _decode(
        self, plan: AttentionPlan, layer: int, q: Tensor, k: Tensor, v: Tensor, *, out: Tensor
    ) -> None:
        assert plan.tail_slots_LBH is not None and plan.offsets_B is not None
        store_tokens(
            self._cache.arena.pages_NTCD,
            slots_BH=plan.tail_slots_LBH[layer],
            offsets_B=plan.offsets_B,
            k_BHD=k,
            v_BHD=v,
        )
        num_rows, num_heads, head_dim = k.shape
        q_BHGD = q.reshape(num_rows, num_heads, -1, head_dim)
        groups = plan.dense_groups if layer < self._dense_layers else plan.groups
        for group in groups:
            o_BHGD = group.run(layer, q_BHGD[group.batch.index_B])
            out[group.batch.index_B] = o_BHGD.flatten(1, 2).to(out.dtype)

    def _count(self, index: int, position: int, *, in_place: bool) -> None:
        """Tokens the row's lanes read in this step, averaged over the layers."""
        cache, trace = self._cache, self._tiers.trace
        row, page_size = cache.rows[index], cache.geometry.page_size
        dense = position + 1
        read = dense
        sparse = not in_place and is_sparse(row, position, page_size)
        replayed = False
        if sparse:
            num_selected, num_full = row.selected_pages(page_size), position // page_size
            replayed = trace is not None and trace.replays(num_selected, num_full=num_full)
            selected = num_selected * page_size + position % page_size + 1
            num_layers, dense_layers = cache.geometry.num_layers, self._dense_layers
            read = (dense_layers * dense + (num_layers - dense_layers) * selected) // num_layers
        elif row.steps_in_row:
            cache.tables.forget_window(index)
        row.steps_in_row = row.steps_in_row + 1 if sparse else 0
        row.reads_before = row.reads
        row.reads = Reads(
            decode_steps=row.reads.decode_steps + 1,
            sparse_steps=row.reads.sparse_steps + sparse,
            replayed_steps=row.reads.replayed_steps + replayed,
            tokens_read=row.reads.tokens_read + read,
            tokens_dense=row.reads.tokens_dense + dense,
        )
