"""Gives the lanes of a request unequal shares of its hot tier, by what they were seen to miss.

Shape legend: R rows, L layers, H KV heads.
"""

from __future__ import annotations

from typing import Final

import torch

from sparsed.core import SparseMethod
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.quotas import Demand
from sparsed.engine.kvcache.row import Row

ROUND_STEPS: Final = 64
MIN_STEPS: Final = ROUND_STEPS // 2  # that select, or a row has to wait for the next round


class Rebalancer:
    """Reads every 64 steps what lanes missed, and moves blocks between those of every row that is
    incomplete; each row in a step of its own, so that none takes long.

    Call ``step`` before anything of a step is queued. Nothing waits for the device. One thread.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._due: list[tuple[Row, int]] = []  # and the steps it was measured over
        demand_RLH2 = cache.tables.demand_RLH2
        self._seen_RLH2 = torch.empty_like(
            demand_RLH2, device="cpu", pin_memory=demand_RLH2.is_cuda
        )
        self._copied: torch.cuda.Event | None = None

    def step(self, step: int) -> None:
        """Do what is due in step ``step`` of the engine."""
        if step % ROUND_STEPS == 0:
            self._measure()
        elif self._due and (self._copied is None or self._copied.query()):  # type: ignore[no-untyped-call]  # torch's
            steps_left = ROUND_STEPS - step % ROUND_STEPS
            for _ in range(-(-len(self._due) // steps_left)):
                self._rebalance(*self._due.pop())

    def _measure(self) -> None:
        """Have the demand of all lanes copied to the host, and count anew."""
        self._due = []
        for row in self._cache.rows.values():
            num_steps = row.reads.sparse_steps - row.steps_measured
            row.steps_measured = row.reads.sparse_steps
            if num_steps >= MIN_STEPS and not row.complete and row.method != SparseMethod.DENSE:
                self._due.append((row, num_steps))
        demand_RLH2 = self._cache.tables.demand_RLH2
        if self._due:
            self._seen_RLH2.copy_(demand_RLH2, non_blocking=True)
            if demand_RLH2.is_cuda:
                self._copied = torch.cuda.current_stream(demand_RLH2.device).record_event()
        demand_RLH2.zero_()

    def _rebalance(self, row: Row, num_steps: int) -> None:
        if self._cache.rows.get(row.index) is not row:
            return  # its request is over
        misses_L, returns_L = self._seen_RLH2[row.index].view(-1, 2).T.long().numpy()
        self._cache.rebalance(row.index, Demand(misses_L, returns_L, num_steps))
