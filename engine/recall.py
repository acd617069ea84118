"""Attention recall of queued steps: measured now and then, and read when it has arrived.

Shape legend: B requests of a step, padded, H KV heads, G query heads per KV head, D head dim,
K pages.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sparsed.engine.batch import DecodeRow
from sparsed.engine.decode import Tiers, attention_recall, sampled_layer, sampled_turn
from sparsed.engine.decode_batch import make_batch
from sparsed.engine.kvcache.row import Row
from sparsed.engine.readback import PendingValue
from sparsed.engine.step_decoder import Trail
from sparsed.engine.step_input import StepRow


class _Pending(NamedTuple):
    row: Row
    recall: PendingValue


class RecallSampler:
    """After one in ``recall_stride`` steps it attends densely for one request in one layer.

    A sample reads all pages of the request in that layer, those that are not hot through the
    staging area, and waits once for the device: to know how many these are. What it gives is read
    by a later ``collect``, into the counts of ``tiers`` and the row's own list; a request that has
    ended by then no longer tells it. One thread, one stream.
    """

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._pending: deque[_Pending] = deque()

    @torch.inference_mode()
    def sample(self, rows: Sequence[StepRow], trail: Trail, *, step: int) -> None:
        """Measure ``step`` if it is its turn. ``trail`` is what the step left, with queries
        (B, H, G, D) and logs of softmax sums (B, H, G) of ``rows`` in their order."""
        self.collect()
        turn = sampled_turn(step, self._tiers.recall_stride)
        sparse = [b for b, row in enumerate(rows) if 0 < row.num_selected < row.num_full]
        if turn is None or not sparse:
            return
        cache = self._tiers.cache
        b = sparse[sampled_place(turn, len(sparse))]
        layer = sampled_layer(turn, cache.geometry.num_layers)
        recall = attention_recall(
            self._tiers,
            make_batch(cache, [rows[b].decode], [0]),
            layer,
            trail.queries[layer][b : b + 1],
            trail.lses[layer][b : b + 1],
        )
        row = cache.rows[rows[b].decode.row]
        self._pending.append(_Pending(row, PendingValue(recall)))

    def collect(self) -> None:
        """Count what has arrived."""
        counts = self._tiers.counts
        while self._pending and self._pending[0].recall.has_arrived:
            row, pending = self._pending.popleft()
            recall = pending.read()
            row.recalls.append(recall)
            counts.recall_sum += recall
            counts.recall_samples += 1

    @torch.inference_mode()
    def warm_up(self, decode: DecodeRow, *, num_query_heads: int) -> None:
        """Compile what a sample launches, on a request whose full pages are saved: it reads them
        all through the staging area, and counts nothing but these loads."""
        cache, tiers = self._tiers.cache, self._tiers
        geometry, pages_NTCD = cache.geometry, cache.arena.pages_NTCD
        batch = make_batch(cache, [decode], [0])
        group = num_query_heads // geometry.num_kv_heads
        q_1HGD = pages_NTCD.new_zeros((1, geometry.num_kv_heads, group, geometry.head_dim))
        pages_1HK = torch.arange(batch.num_full[0], device=pages_NTCD.device)
        pages_1HK = pages_1HK.expand(1, geometry.num_kv_heads, -1)
        absent_1HK = torch.full_like(pages_1HK, -1, dtype=torch.int32)
        tiers.attend_in_passes(batch, 0, q_1HGD, pages_1HK, absent_1HK)


def sampled_place(turn: int, count: int) -> int:
    """Which of ``count`` requests the ``turn``-th measurement is of: drawn, the same in every run,
    so that no number of requests falls in step with the layers."""
    return random.Random(turn).randrange(count)
