"""What both tiers tell of themselves, read without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

from sparsed.core import CopyTotal, Direction, EngineStats
from sparsed.engine.decode import DecodeCounts
from sparsed.engine.fetch_times import FetchTimes
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.totals import DeviceCounters, read_together
from sparsed.engine.kvcache.working_set import WorkingSet
from sparsed.engine.step_selection import NUM_COUNTERS
from sparsed.engine.tiered import TieredAttention


class TierStats:
    """The share of the tiers in ``EngineStats``: of eager steps, which count in ``counts``, and of
    queued ones. One thread."""

    def __init__(self, kv: KVCache, *, counts: DecodeCounts, fetch_times: FetchTimes) -> None:
        self._kv = kv
        self._counts = counts
        self._fetch_times = fetch_times
        self._working_set = WorkingSet(kv.tables)
        self._nothing = DeviceCounters(NUM_COUNTERS, device=kv.arena.pages_NX.device)

    def read(self, queued: TieredAttention | None) -> EngineStats:
        """``queued``: what queued steps select with, if anything. On a busy device device counters
        are those of the call before."""
        self._fetch_times.collect()
        kv, counts = self._kv, self._counts
        own, (displaced,), now, ahead = read_together(
            counts.resolved,
            kv.tables.displaced,
            queued.now.counters if queued else self._nothing,
            queued.ahead.counters if queued and queued.ahead else self._nothing,
        )
        copies = kv.transfer.copies
        h2d_bytes, h2d_s = _sum(copies, Direction.H2D)
        d2h_bytes, d2h_s = _sum(copies, Direction.D2H)
        window_pages, verified = self._working_set.num_pages(), kv.transfer.verified
        return EngineStats(
            hot_hits=own[0] + now[0] - own[1] - now[1],
            hot_misses=own[1] + now[1],
            foreseen_pages=ahead[1] - ahead[3],  # not those that found no slot
            wasted_pages=ahead[4],
            evicted_pages=own[2] + displaced + now[2] + ahead[2],
            overflow_pages=own[3] + now[3],
            h2d_bytes=h2d_bytes,
            h2d_s=h2d_s,
            d2h_bytes=d2h_bytes,
            d2h_s=d2h_s,
            exposed_s=self._fetch_times.exposed_s,
            timed_steps=self._fetch_times.steps,
            recall_sum=counts.recall_sum,
            recall_samples=counts.recall_samples,
            verify_checked_pages=verified.checked_pages,
            verify_mismatches=verified.mismatches,
            hot_used_bytes=kv.arena.used_bytes,
            hot_total_bytes=kv.arena.total_bytes,
            dram_used_bytes=kv.pool.used_bytes,
            dram_total_bytes=kv.pool.total_bytes,
            working_set_pages=window_pages,
            working_set_bytes=window_pages * kv.geometry.page_bytes,
            metadata_bytes=kv.metadata_bytes,
            copies=copies,
        )


def _sum(copies: Sequence[CopyTotal], direction: Direction) -> tuple[int, float]:
    """Bytes and seconds of all copies one way."""
    found = [item for item in copies if item.direction is direction]
    return sum(item.num_bytes for item in found), sum(item.seconds for item in found)
