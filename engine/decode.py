"""Attention of decode tokens: in place where a request is wholly hot, over a selection else.

Shape legend: L layers, B requests of a group, H KV heads, G query heads per KV head, D head dim,
K pages attended to, T tokens of a page, V rows of logits per KV head, X columns (pages of all
requests, one request after the other).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from sparsed.engine.batch import DecodeRow
from sparsed.engine.decode_batch import (
    Batch,
    is_sparse,
    make_batch,
    one_row,
    similar_lengths,
)
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.residency import Residency
from sparsed.engine.kvcache.row import Row
from sparsed.engine.kvcache.totals import DeviceCounters
from sparsed.engine.kvcache.upload import upload
from sparsed.engine.sparse.replay import SelectionTrace
from sparsed.engine.step_input import Pages
from sparsed.kernels.attend import attend_pages
from sparsed.kernels.merge import merge_states

GOLDEN_RATIO = 0.618


@dataclass(slots=True)
class DecodeCounts:
    """Totals since the start. ``resolved``: the counters of ``kernels.resolve.Resolved``."""

    resolved: DeviceCounters
    recall_sum: float = 0.0
    recall_samples: int = 0


class Group(Protocol):
    batch: Batch

    def run(self, layer: int, q_BHGD: Tensor) -> Tensor:
        """Attention output (B, H, G, D), float32."""
        ...


class Tiers:
    """What every group works with: the cache, the staging area, the scale, the totals, and the
    trace that replaces selections, if any."""

    def __init__(
        self,
        cache: KVCache,
        *,
        staging_NX: Tensor,
        scale: float,
        recall_stride: int,
        trace: SelectionTrace | None,
    ) -> None:
        self.cache = cache
        self.staging_NX = staging_NX
        self.scale = scale
        self.recall_stride = recall_stride  # steps between two measurements of attention recall
        self.trace = trace
        self.residency = Residency(cache)
        self.counts = DecodeCounts(self.residency.counters)

    def attend(self, batch: Batch, q_BHGD: Tensor, slots_BHK: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to pages in the hot tier; the last column is the partial page."""
        return attend_pages(
            q_BHGD,
            self.cache.arena.pages_NTCD,
            slots_BHK=slots_BHK,
            tail_tokens_B=batch.tail_tokens_B,
            scale=self.scale,
        )

    def attend_in_passes(
        self, batch: Batch, layer: int, q: Tensor, pages_BHK: Tensor, slots_BHK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend to the pages that have a slot, then to the others through the staging area,
        as many at a time as it holds, one request after the other."""
        tail_BH1 = batch.tail_slots_LBH[layer][..., None]
        o, lse = self.attend(batch, q, torch.cat((slots_BHK, tail_BH1), dim=-1))
        for b, row in enumerate(batch.rows):
            absent_HK = slots_BHK[b] < 0
            num_absent = int(absent_HK.sum(-1).max())
            if num_absent == 0:
                continue
            order_Hn = absent_HK.byte().topk(num_absent, dim=-1).indices
            pages_Hn = torch.where(
                absent_HK.gather(-1, order_Hn), pages_BHK[b].gather(-1, order_Hn), -1
            )
            state = (o[b : b + 1], lse[b : b + 1])
            for pages in torch.split(pages_Hn, len(self.staging_NX) // len(pages_Hn), dim=-1):
                state = merge_states(*state, *self._attend_staged(row, layer, q[b : b + 1], pages))
            o[b], lse[b] = state[0][0], state[1][0]
        return o, lse

    def _attend_staged(
        self, row: Row, layer: int, q_1HGD: Tensor, pages_Hn: Tensor
    ) -> tuple[Tensor, Tensor]:
        cache, device = self.cache, pages_Hn.device
        rows_B = torch.full((1,), row.index, device=device)  # copied from the host it would wait
        page_rows = cache.tables.selected_page_rows(rows_B, layer, pages_Hn.clamp(min=0)[None])
        slots_Hn = torch.arange(pages_Hn.numel(), device=device).view_as(pages_Hn)
        cache.transfer.load(
            self.staging_NX,
            cache.pool.pages_RX,
            dst_rows=slots_Hn,
            src_rows=torch.where(pages_Hn >= 0, page_rows[0], -1),
        )
        page_size = cache.geometry.page_size
        return attend_pages(
            q_1HGD,
            self.staging_NX.view(-1, *cache.arena.pages_NTCD.shape[1:]),
            slots_BHK=torch.where(pages_Hn >= 0, slots_Hn, -1).int()[None],
            tail_tokens_B=torch.full((1,), page_size, dtype=torch.int32, device=device),
            scale=self.scale,
        )


class InPlaceGroup:
    """Dense: every page is in the hot tier and is read where it lies."""

    def __init__(self, tiers: Tiers, batch: Batch) -> None:
        self.batch = batch
        self._tiers = tiers
        self._ragged = len(set(batch.num_full)) > 1

    def run(self, layer: int, q_BHGD: Tensor) -> Tensor:
        batch, tables = self.batch, self._tiers.cache.tables
        columns = max(batch.num_full) + 1
        slots_BHK = tables.slots_in_order(batch.rows_B, layer, columns)
        if self._ragged:
            columns_K = torch.arange(columns, device=slots_BHK.device)
            full_BK = columns_K < batch.num_full_B[:, None]
            tail_BH1 = batch.tail_slots_LBH[layer][..., None]
            slots_BHK = torch.where(full_BK[:, None], slots_BHK, -1)
            slots_BHK = torch.cat((slots_BHK[..., :-1], tail_BH1), dim=-1)
        return self._tiers.attend(batch, q_BHGD, slots_BHK)[0]


class StreamedGroup:
    """Dense, one request whose pages are not all hot: the others pass through the staging."""

    def __init__(self, tiers: Tiers, batch: Batch) -> None:
        self.batch = batch
        self._tiers = tiers

    def run(self, layer: int, q_BHGD: Tensor) -> Tensor:
        return attend_all(self._tiers, self.batch, layer, q_BHGD)[0]


class SparseGroup:
    """The ``count`` best pages of every lane, made resident, and the partial page."""

    def __init__(
        self, tiers: Tiers, batch: Batch, *, positions: Sequence[int], count: int, step: int
    ) -> None:
        cache = tiers.cache
        self.batch = batch
        self._tiers = tiers
        self._rows_B = batch.rows_B.int()
        num_full_B = batch.num_full_B.int()
        self._pages = Pages(num_full_B, torch.full_like(num_full_B, count))
        self._keeps_B = self._begin_keeping(positions) if cache.kept.is_on else None
        self._count = count
        self._max_blocks = max(row.blocks.most for row in batch.rows)
        self._fits = all(
            row.blocks.least * cache.geometry.pages_per_block > count for row in batch.rows
        )
        self._positions_B = num_full_B * cache.geometry.page_size + batch.tail_tokens_B - 1
        self._trace = self._begin_trace()
        turn = sampled_turn(step, tiers.recall_stride)
        num_layers = cache.geometry.num_layers
        self._sampled_layer = -1 if turn is None else sampled_layer(turn, num_layers)

    def run(self, layer: int, q_BHGD: Tensor) -> Tensor:
        tiers, batch = self._tiers, self.batch
        pages_BHK = self._select(layer, q_BHGD.contiguous())
        resolved = tiers.residency.bring_in(
            pages_BHK,
            layer=layer,
            rows_B=self._rows_B,
            positions_B=self._positions_B,
            max_blocks=self._max_blocks,
        )
        if self._fits:
            tail_BH1 = resolved.tail_slots_BH[..., None]
            slots_BHK = torch.cat((resolved.slots_BHK, tail_BH1), dim=-1)
            o, lse = tiers.attend(batch, q_BHGD, slots_BHK)
        else:
            # Pages without a slot pass through the staging: which, the table knows.
            slots_BHK = tiers.cache.tables.selected_slots(batch.rows_B, layer, pages_BHK)
            o, lse = tiers.attend_in_passes(batch, layer, q_BHGD, pages_BHK, slots_BHK)
        if layer == self._sampled_layer:
            self._measure_recall(layer, q_BHGD, lse)
        return o

    def _select(self, layer: int, q_BHGD: Tensor) -> Tensor:
        cache = self._tiers.cache
        assert cache.selector is not None
        pages, keeps_B = self._pages, self._keeps_B
        ranked = pages if keeps_B is None else pages.to_rank(keeps_B)
        pages_BHK = self._rows_B.new_empty((*q_BHGD.shape[:2], self._count))
        cache.selector.select(
            q_BHGD,
            layer=layer,
            rows_B=self._rows_B,
            num_full_B=ranked.num_full_B,
            count_B=ranked.count_B,
            max_pages=cache.tables.frames_RF.shape[1] * cache.geometry.pages_per_block,
            out_BHK=pages_BHK,
        )
        if keeps_B is not None:
            cache.kept.exchange(
                layer, pages_BHK, rows_B=self._rows_B, count_B=pages.count_B, keeps_B=keeps_B
            )
        if self._trace is not None:
            self._trace.overwrite(layer, pages_BHK)
        return pages_BHK

    def _begin_keeping(self, positions: Sequence[int]) -> Tensor:
        """Which requests (B,) attend to what they ranked before; the others' rankings are noted."""
        kept = self._tiers.cache.kept
        keeps = []
        for row, position in zip(self.batch.rows, positions, strict=True):
            keeps.append(kept.serves(row, position))
            if not keeps[-1]:
                kept.note(row, position)
        return upload(keeps, device=self._rows_B.device).int()

    def _begin_trace(self) -> SelectionTrace | None:
        """What replaces the selections of these requests in this step: groups of one step run side
        by side, and each needs a trace of its own."""
        if self._tiers.trace is None:
            return None
        trace = copy(self._tiers.trace)
        trace.begin(
            self._rows_B,
            positions_B=self._positions_B,
            pages=self._pages,
            width=self._count,
        )
        return trace

    def _measure_recall(self, layer: int, q_BHGD: Tensor, lse_BHG: Tensor) -> None:
        counts = self._tiers.counts
        for b, row in enumerate(self.batch.rows):
            alone, own = one_row(self.batch, b), slice(b, b + 1)
            recall = float(attention_recall(self._tiers, alone, layer, q_BHGD[own], lse_BHG[own]))
            row.recalls.append(recall)
            counts.recall_sum += recall
            counts.recall_samples += 1


def sampled_turn(step: int, stride: int) -> int | None:
    """Which measurement ``step`` makes, if any: one in every ``stride`` steps, at a place that is
    drawn, the same in every run. In even steps a request would always be seen at one place of its
    pages, where a selection that it keeps is always as old."""
    turn, place = divmod(step, stride)
    return turn if place == _drawn_place(turn, stride) else None


@lru_cache(maxsize=64)
def _drawn_place(turn: int, stride: int) -> int:
    return random.Random(turn).randrange(stride)


def sampled_layer(turn: int, num_layers: int) -> int:
    """The layer of the ``turn``-th measurement: all in turn, in steps of the golden ratio, so that
    few measurements are already spread over the depth. Recall differs most between layers."""
    steps = (step for step in range(1, num_layers + 1) if math.gcd(step, num_layers) == 1)
    step = min(steps, key=lambda step: abs(step - GOLDEN_RATIO * num_layers))
    return turn * step % num_layers


def attend_all(tiers: Tiers, batch: Batch, layer: int, q_1HGD: Tensor) -> tuple[Tensor, Tensor]:
    """Dense attention of one request over hot and cold pages."""
    tables, device = tiers.cache.tables, q_1HGD.device
    (num_full,) = batch.num_full
    pages_1HK = torch.arange(num_full, device=device).expand(1, q_1HGD.shape[1], -1)
    slots_1HK = tables.slots_in_order(batch.rows_B, layer, num_full)
    return tiers.attend_in_passes(batch, layer, q_1HGD, pages_1HK, slots_1HK)


def attention_recall(
    tiers: Tiers, batch: Batch, layer: int, q_1HGD: Tensor, lse_1HG: Tensor
) -> Tensor:
    """Share of the dense softmax mass on what one request has attended to, whose softmax sums have
    the logs ``lse``: mean over query heads, a scalar on the device."""
    _, dense_1HG = attend_all(tiers, batch, layer, q_1HGD)
    return torch.exp(lse_1HG - dense_1HG).mean()


def make_groups(
    tiers: Tiers, decodes: Sequence[DecodeRow], *, dense: bool, step: int
) -> tuple[Group, ...]:
    """Split the decode rows of a step by how they are attended to; ``dense`` takes no selection
    for anybody (the first layers)."""
    cache, page_size = tiers.cache, tiers.cache.geometry.page_size
    tiers.residency.begin(step)
    sparse: dict[int, list[int]] = {}
    in_place: list[int] = []
    groups: list[Group] = []
    for i, decode in enumerate(decodes):
        row = cache.rows[decode.row]
        count = row.selected_pages(page_size)
        if not dense and is_sparse(row, decode.position, page_size):
            sparse.setdefault(count, []).append(i)
        elif row.complete:
            in_place.append(i)
        else:
            groups.append(StreamedGroup(tiers, make_batch(cache, decodes, [i])))
    for index in similar_lengths(decodes, in_place):
        groups.append(InPlaceGroup(tiers, make_batch(cache, decodes, index)))
    for count, index in sparse.items():
        batch, positions = make_batch(cache, decodes, index), [decodes[i].position for i in index]
        groups.append(SparseGroup(tiers, batch, positions=positions, count=count, step=step))
    return tuple(groups)
