"""What unequal shares of the hot tier save a request, by recorded selections of pages.

Run from the root: ``PYTHONPATH=benchmarks python benchmarks/lane_quotas.py RECORDING ...``; a CPU
is enough, about a minute a recording. Each recording is replayed through the engine's own tables,
with lanes that stay equal and with lanes that are rebalanced as in serving, and through the
simulation of the same cache with equal slots and with slots divided by the hits of its first
half. Misses are those of the second half, as shares of the pages selected.

Shape legend: S steps, L lanes, K selected pages.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from report import environment

from sparsed.core import (
    BLOCK_TOKENS,
    GIB,
    WARMUP_STEPS,
    CachePolicy,
    MachineFacts,
    ModelShape,
    SparseMethod,
)
from sparsed.engine.evaluate.recording import Recording, read_recording
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.dram import DramPool
from sparsed.engine.kvcache.geometry import Geometry, num_frames
from sparsed.engine.kvcache.hbm import HotArena
from sparsed.engine.kvcache.rebalance import Rebalancer
from sparsed.engine.kvcache.residency import Residency
from sparsed.engine.kvcache.tables import PageTables
from sparsed.engine.kvcache.transfer import Transfer
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.sim.quotas import divide_slots, hit_curves
from sparsed.engine.sim.replay import replay
from sparsed.engine.sim.trace import Trace, trace_recording

RESIDENCIES: Final = (2, 3, 4)
DEVICE: Final = torch.device("cpu")
MACHINE: Final = MachineFacts(
    cpu_name="any", num_cpus=1, dram_total_bytes=64 * GIB, dram_free_bytes=64 * GIB
)


class Shares(NamedTuple):
    """Pages missed of those selected, in the second half."""

    equal: float
    rebalanced: float
    simulated_equal: float
    simulated_divided: float

    def __str__(self) -> str:
        return (
            f"equal {self.equal:6.2%}, rebalanced {self.rebalanced:6.2%} "
            f"({1 - self.rebalanced / self.equal:6.1%} fewer); simulated: "
            f"{self.simulated_equal:6.2%}, {self.simulated_divided:6.2%} "
            f"({1 - self.simulated_divided / self.simulated_equal:6.1%} fewer)"
        )


class Replay:
    """One request that selects what was recorded, in a cache of its own."""

    def __init__(self, recording: Recording, *, residency: int) -> None:
        header = recording.header
        self._page_size, self._budget = header.page_size, header.token_budget
        self._num_steps, num_lanes = recording.ranked_SLR.shape[:2]
        self._lanes = (num_lanes // header.num_kv_heads, header.num_kv_heads)
        self._start = header.context_tokens
        self.cache = self._make_cache(residency)
        pages_SLK = recording.selection(
            range(self._num_steps), page_size=self._page_size, token_budget=self._budget
        )
        self._pages_SLK = torch.from_numpy(pages_SLK).int()

    def _make_cache(self, residency: int) -> KVCache:
        num_layers, num_heads = self._lanes
        total = self._start + self._num_steps
        shape = ModelShape(
            num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_heads, head_dim=4,
            hidden_size=4, intermediate_size=4, vocab_size=4, max_position=total, num_parameters=1,
        )  # fmt: skip
        asked = {
            "page_size": self._page_size, "token_budget": self._budget, "max_num_seqs": 1,
            "max_model_len": total, "hbm_budget": residency * self._budget,
        }  # fmt: skip
        sizes: dict[str, Any] = {"shape": shape, "dtype": "float32"}
        knobs = resolve_knobs(asked, machine=MACHINE, device="cpu", **sizes)
        lane_blocks = num_frames(residency * self._budget)
        plan = replace(
            plan_memory(knobs, **sizes), num_blocks=1 + lane_blocks * num_layers * num_heads
        )
        geometry = Geometry.of(shape, dtype="float32", page_size=self._page_size)
        parts: dict[str, Any] = {"dtype": torch.float32, "device": DEVICE}
        frames = num_frames(total)
        return KVCache(
            geometry,
            arena=HotArena(geometry, plan, **parts),
            pool=DramPool(geometry, num_frames=frames, pool_fd=None, **parts),
            tables=PageTables(
                geometry, num_rows=1, max_model_len=total, pool_frames=frames, device=DEVICE
            ),
            selector=None,
            transfer=Transfer(page_bytes=geometry.page_bytes, device=DEVICE),
            knobs=knobs,
        )

    def missed_share(self, *, rebalances: bool) -> float:
        """Of the second half. To be called once."""
        cache, total = self.cache, self._start + self._num_steps
        residency, rebalancer = Residency(cache), Rebalancer(cache)
        index = cache.add(total, method=SparseMethod.QUEST, token_budget=None)
        cache.open_chunk(index, 0, self._start, step=1)
        row, first_4 = cache.rows[index], np.zeros(4)
        for number, pages_LK in enumerate(self._pages_SLK):
            step, position = number + 2, self._start + number
            if number == self._num_steps // 2:
                first_4 = residency.counters.values_C.numpy().copy()
            if rebalances:
                rebalancer.step(step)
            self._select(residency, index, position, pages_LK, step=step)
            row.reads = row.reads._replace(sparse_steps=row.reads.sparse_steps + 1)
        selected, missed, _, refused = residency.counters.values_C.numpy() - first_4
        cache.check_integrity()
        assert refused == 0
        return float(missed / selected)

    def _select(
        self, residency: Residency, index: int, position: int, pages_LK: torch.Tensor, *, step: int
    ) -> None:
        cache = self.cache
        cache.make_room(index, position)
        residency.begin(step)
        for layer, pages_HK in enumerate(pages_LK.view(*self._lanes, -1)):
            residency.bring_in(
                pages_HK[None].contiguous(),
                layer=layer,
                rows_B=torch.tensor([index], dtype=torch.int32),
                positions_B=torch.tensor([position], dtype=torch.int32),
                max_blocks=cache.rows[index].blocks.most,
            )
        if (position + 1) % self._page_size == 0:
            cache.seal([(index, position // self._page_size)], step=step)


def simulated(trace: Trace, *, num_slots: int, selected: int) -> tuple[float, float]:
    """With equal slots, and divided by the hits of the first half."""
    half = trace.num_steps // 2
    curves_LC = hit_curves(trace, range(WARMUP_STEPS, half))
    equal_L = np.full(trace.num_lanes, num_slots)
    divided_L = divide_slots(curves_LC, total=int(equal_L.sum()), least=selected)
    pages = sum(int(trace.count(step).sum()) for step in range(half, trace.num_steps))
    equal, divided = (
        replay(trace, CachePolicy.BUCKETED, capacity_L=slots_L).missed_S[half:].sum() / pages
        for slots_L in (equal_L, divided_L)
    )
    return float(equal), float(divided)


def compare(recording: Recording, residency: int) -> Shares:
    header = recording.header
    sizes = {"page_size": header.page_size, "token_budget": header.token_budget}
    blocks = num_frames(residency * header.token_budget)
    return Shares(
        Replay(recording, residency=residency).missed_share(rebalances=False),
        Replay(recording, residency=residency).missed_share(rebalances=True),
        *simulated(
            trace_recording(recording, **sizes),
            num_slots=blocks * BLOCK_TOKENS // header.page_size - 1,
            selected=header.token_budget // header.page_size - 1,
        ),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recordings", nargs="+", type=Path)
    parser.add_argument("--residencies", nargs="+", type=int, default=RESIDENCIES)
    parser.add_argument("--output", type=Path, help="write the shares as JSON")
    options = parser.parse_args(arguments)
    rows: list[dict[str, object]] = []
    for path in options.recordings:
        recording = read_recording(path)
        header = recording.header
        for residency in options.residencies:
            shares = compare(recording, residency)
            print(f"{header.text:16} {residency}x {shares}")
            row = {"model": header.model, "text": header.text, "residency": residency}
            rows.append({**row, **shares._asdict()})
    if options.output is not None:
        options.output.write_text(json.dumps({**environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
