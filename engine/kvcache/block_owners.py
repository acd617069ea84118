"""Who owns which arena blocks, and what moves when they change hands.

Shape legend: L lanes, N blocks of the lane that has the most, n some of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
        mandatory, num_rows = self._shares.mandatory_of(row), len(self._shares.hot_rows)
        self._reclaim(mandatory, partial(self._shares.floor, num_rows=num_rows))
        self.resize(row, mandatory)

    def forget(self) -> None:
        """Rows have come or gone: even shares until the next division, and nothing is due."""
        self._shares.forget()
        self._due.clear()

    def _reclaim(self, wanted: int, floor: Callable[[Row], int]) -> None:
        """Take blocks above their ``floor`` from rows, the largest excess first, until ``wanted``
        are free or there are no more."""
        excess = {row.index: row.num_blocks - floor(row) for row in self._shares.hot_rows}
        for row in sorted(self._shares.hot_rows, key=lambda row: -excess[row.index]):
            short = wanted - self._room
            if short <= 0 or excess[row.index] <= 0:
                return
            self.resize(row, row.num_blocks - min(short, excess[row.index]))

    @property
    def _room(self) -> int:
        """Free blocks."""
        return len(self._arena.blocks) // self._geometry.num_lanes

    def grow(self, row: Row, wanted_blocks: int) -> None:
        """Take blocks up to ``wanted_blocks``: as far as ``row`` has a right to them from rows that
        hold more than they have, beyond that as far as blocks are free above the watermark."""
        if wanted_blocks <= row.num_blocks:
            return  # what most steps ask: a quota looks at all rows
        wanted = min(wanted_blocks, self._shares.quota(row))
        if wanted > row.num_blocks:
            rights = self._shares.rights
            self._reclaim(min(wanted, rights(row)) - row.num_blocks, rights)
            self.take_free(row, wanted)

    def take_free(self, row: Row, wanted_blocks: int) -> None:
        """As ``grow``, of free blocks alone: nobody loses any."""
        wanted = min(wanted_blocks, self._shares.quota(row), row.num_blocks + self._room)
        if wanted > row.num_blocks:
            self.resize(row, wanted)

    def make_whole(self, row: Row) -> bool:
        """Give every lane of an incomplete row blocks for all of its pages; whether there were
        enough. Others give up what they have no page for and need not have. What the row kept when
        it lost the first ones is where it was again."""
        assert not row.complete
        whole, shares = self._shares.whole(row), self._shares
        self._reclaim(
            whole - row.num_blocks,
            lambda other: max(shares.whole(other), shares.mandatory_of(other)),
        )
        if whole > row.num_blocks + self._room:
            return False
        counts_L = np.full_like(row.blocks.counts_L, whole)
        self._divide(row, counts_L)
        if row.num_lost:
            row.blocks.roll(row.num_lost)
            row.num_lost = 0
            self._set_blocks(row, 0, counts_L)
        return True

    def resize(self, row: Row, num_blocks: int) -> None:
        """Bring ``row`` to so many blocks per lane; unequal lanes lose and gain alike."""
        least = min(self._shares.mandatory_of(row), num_blocks)
        total = num_blocks * self._geometry.num_lanes
        counts_L = row.blocks.counts_L
        self._divide(row, level(counts_L, total, least=least, most=self._shares.most(row)))

    def _divide(self, row: Row, counts_L: npt.NDArray[np.int64]) -> None:
        """Give each lane so many blocks. Lanes lose their last ones; a row that is complete no
        longer loses its oldest pages."""
        blocks, kept_L = row.blocks, np.minimum(row.blocks.counts_L, counts_L)
        first = int(kept_L.min())
        num_placed = row.num_placed // self._geometry.pages_per_block
        if row.complete and num_placed > first:
            blocks.put_newest_first(first, num_placed=num_placed)
            row.num_lost = num_placed - 1 - first if first else 0
            row.complete, first = False, 0
        if not row.complete and (kept_L < blocks.counts_L).any():
            row.num_placed = 0  # from now on steps may take any slot
        leaving_Ln = blocks.drop(kept_L)
        self._arena.blocks.give(leaving_Ln[leaving_Ln >= 0])
        blocks.add(self._arena.blocks.take(int((counts_L - kept_L).sum())), counts_L - kept_L)
        self._set_blocks(row, first, counts_L)
        if leaving_Ln.size:
            leaving = upload(leaving_Ln, device=self._device)
            self._tables.release(self._arena, row.index, leaving, max_blocks=blocks.most)

    def _set_blocks(self, row: Row, first: int, counts_L: npt.NDArray[np.int64]) -> None:
        """Have the tables follow from the ``first``-th block of each lane on."""
        self._tables.set_blocks(
            row.index,
            first,
            upload(row.blocks.ids_LN[:, first:], device=self._device),
            upload(counts_L, device=self._device),
        )

    def rebudget(self, curve_of: Callable[[Row], MissCurve]) -> None:
        """Say how many blocks each row is worth by its misses; ``settle`` has them move."""
        self._shares.divide(curve_of)
        rows = [row for row in self._shares.hot_rows if row.share is not None]
        self._due = sorted(rows, key=lambda row: self._shares.rights(row) - row.num_blocks)

    def settle(self) -> None:
        """Let the next row that is due have what it has a right to; one at a time, so that no step
        takes long."""
        while self._due:
            row = self._due.pop()
            if row.share is not None and self._claim(row):
                return

    def _claim(self, row: Row) -> bool:
        """Whether the row has changed. A complete row grows with its tokens."""
        before, rights = row.num_blocks, self._shares.rights(row)
        if not (row.is_spilled or row.complete) and is_worth_it(before, rights):
            self.grow(row, rights)
        return row.num_blocks != before
