"""Who owns which arena blocks, and what moves when they change hands.

Shape legend: L lanes, N blocks of the lane that has the most, n some of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sparsed.engine.budgets import is_worth_it
from sparsed.engine.hit_curve import MissCurve
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.kvcache.hbm import HotArena
from sparsed.engine.kvcache.quotas import Demand, divide_blocks, level
from sparsed.engine.kvcache.row import Row
from sparsed.engine.kvcache.shares import Shares
from sparsed.engine.kvcache.tables import PageTables
from sparsed.engine.kvcache.upload import upload


class BlockOwners:
    """Gives rows blocks of the arena and takes them back, and has the tables follow. Counts are
    per lane. One thread, between steps."""

    def __init__(
        self, geometry: Geometry, *, arena: HotArena, tables: PageTables, shares: Shares
    ) -> None:
        self._geometry = geometry
        self._arena = arena
        self._tables = tables
        self._shares = shares
        self._device = arena.pages_NX.device
        self._due: list[Row] = []

    def rebalance(self, row: Row, demand: Demand) -> None:
        """Move blocks from lanes that gain little of them to lanes that gain more, in a row that
        is not complete."""
        geometry = self._geometry
        assert not row.complete
        counts_L = row.blocks.counts_L.copy()
        selecting = slice(self._shares.knobs.dense_layers * geometry.num_kv_heads, None)
        counts_L[selecting] = divide_blocks(
            demand.of(selecting),
            counts_L[selecting],
            pages_per_block=geometry.pages_per_block,
            selected_pages=row.selected_pages(geometry.page_size),
            least=self._shares.mandatory_of(row),
            most=self._shares.most(row),
        )
        if (counts_L != row.blocks.counts_L).any():
            self._divide(row, counts_L)

    @property
    def reclaimable(self) -> int:
        return self._shares.reclaimable() * self._geometry.num_lanes

    def give_mandatory(self, row: Row) -> None:
        """Blocks a row without any cannot go without."""
        self.forget()
        mandatory = self._shares.mandatory_of(row)
        self._reclaim(mandatory * self._geometry.num_lanes)
        self.resize(row, mandatory)

    def forget(self) -> None:
        """Rows have come or gone: even shares until the next division, and nothing is due."""
        self._shares.forget()
        self._due.clear()

    def _reclaim(self, wanted: int) -> None:
        """Shrink the largest rows to their shares until ``wanted`` blocks are free."""
        rows = self._shares.hot_rows
        for row in sorted(rows, key=lambda row: -row.num_blocks):
            if len(self._arena.blocks) >= wanted:
                return
            floor = self._shares.floor(row, num_rows=len(rows))
            if row.num_blocks > floor:
                self.resize(row, floor)

    def grow(self, row: Row, wanted_blocks: int) -> None:
        """Take blocks up to ``wanted_blocks`` per lane, as far as quota and arena allow."""
        room = len(self._arena.blocks) // self._geometry.num_lanes
        target = min(
            wanted_blocks, self._shares.quota(row), row.num_blocks + room, self._shares.most(row)
        )
        if target > row.num_blocks:
            self.resize(row, target)

    def resize(self, row: Row, num_blocks: int) -> None:
        """Bring ``row`` to so many blocks per lane; unequal lanes lose and gain alike."""
        least = min(self._shares.mandatory_of(row), num_blocks)
        total = num_blocks * self._geometry.num_lanes
        counts_L = row.blocks.counts_L
        self._divide(row, level(counts_L, total, least=least, most=self._shares.most(row)))

    def _divide(self, row: Row, counts_L: npt.NDArray[np.int64]) -> None:
        """Give each lane so many blocks. Lanes lose their last ones: where a row is complete,
        pages of the last block placed may be yet to begin, and they leave with it."""
        blocks, kept_L = row.blocks, np.minimum(row.blocks.counts_L, counts_L)
        first = int(kept_L.min())
        leaving_Ln = blocks.drop(kept_L)
        self._arena.blocks.give(leaving_Ln[leaving_Ln >= 0])
        blocks.add(self._arena.blocks.take(int((counts_L - kept_L).sum())), counts_L - kept_L)
        self._tables.set_blocks(
            row.index,
            first,
            upload(blocks.ids_LN[:, first:], device=self._device),
            upload(counts_L, device=self._device),
        )
        if leaving_Ln.size:
            leaving = upload(leaving_Ln, device=self._device)
            self._tables.release(self._arena, row.index, leaving, max_blocks=blocks.most)
        if row.num_placed > blocks.least * self._geometry.pages_per_block:
            row.complete = False

    def rebudget(self, curve_of: Callable[[Row], MissCurve]) -> None:
        """Say how many blocks each row is worth by its misses; ``settle`` has them move."""
        self._shares.divide(curve_of)
        rows = [row for row in self._shares.hot_rows if row.share is not None]
        self._due = sorted(rows, key=lambda row: row.num_blocks - self._shares.quota(row))

    def settle(self) -> None:
        """Resize the next row that is due, those first that lose blocks to the others; one at a
        time, so that no step takes long."""
        while self._due:
            row = self._due.pop()
            if row.share is not None and self._resize_to(row, self._shares.quota(row)):
                return

    def _resize_to(self, row: Row, quota: int) -> bool:
        """Whether the row has changed. A complete row grows with its tokens."""
        before = row.num_blocks
        if row.is_spilled or not is_worth_it(before, quota):
            return False
        if quota < before:
            self.resize(row, quota)
        elif not row.complete:
            self.grow(row, quota)
        return row.num_blocks != before
