"""Brings requests back whole into the hot tier once there is room for everybody again.

A request whose pages are all hot, in order, may attend to them where they lie. One that has lost
some gets those back a slice a step, from the DRAM tier, so that no step takes much longer. Two marks
keep requests from going and coming: it begins where twice the watermark would stay free with
everybody whole, and stops where less than the watermark would.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sparsed.engine.kvcache.block_owners import BlockOwners
from sparsed.engine.kvcache.geometry import Geometry, num_frames
from sparsed.engine.kvcache.hbm import HotArena
from sparsed.engine.kvcache.row import Row
from sparsed.engine.kvcache.shares import Shares
from sparsed.engine.kvcache.spill import SpillPaths
from sparsed.engine.kvcache.tables import PageTables

SLICE_BYTES: Final = 64 << 20  # of a step: one to three milliseconds of a link


class Regrowth:
    """One request at a time. Call ``step`` between any two steps; one thread, the steps' stream.

    While it goes on every lane of the request has slots for all pages, so that no step takes one
    away from a page that is in its place already.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        arena: HotArena,
        tables: PageTables,
        shares: Shares,
        blocks: BlockOwners,
        paths: SpillPaths,
    ) -> None:
        self._geometry = geometry
        self._arena = arena
        self._tables = tables
        self._shares = shares
        self._blocks = blocks
        self._paths = paths
        self._slice_blocks = max(1, SLICE_BYTES // geometry.frame_bytes)
        self._row: Row | None = None

    def is_at(self, row: Row) -> bool:
        """Whether ``row`` is on its way back: its lanes must stay equal."""
        return self._row is row

    def forget(self, row: Row) -> None:
        """``row`` loses its blocks, or is gone."""
        if self._row is row:
            self._row = None

    def step(self, rows: Mapping[int, Row]) -> None:
        """Put one more slice of a request in its place."""
        if self._row is not None and not self._may_go_on(self._row):
            self._row = None
        if self._row is None and self._shares.spare() >= 2 * self._shares.watermark:
            self._row = next((row for row in rows.values() if self._begin(row)), None)
        if self._row is not None:
            self._place_slice(self._row)
            if self._row.complete:
                self._row = None

    def _may_go_on(self, row: Row) -> bool:
        """Not where a lane has lost blocks since, which puts ``num_placed`` back, or has too few."""
        has_slots = row.num_placed > 0 and self._shares.whole(row) <= row.blocks.least
        return has_slots and self._shares.spare() >= self._shares.watermark

    def _begin(self, row: Row) -> bool:
        """Whether ``row`` can be brought back, and has the blocks for it now. A prompt in progress
        goes on as it is."""
        if row.is_spilled or row.complete or not row.reads.decode_steps:
            return False
        whole = self._shares.whole(row)
        if whole < num_frames(row.num_tokens) or whole > self._shares.quota(row):
            return False
        row.num_placed = 0
        return self._blocks.make_whole(row)

    def _place_slice(self, row: Row) -> None:
        """The next blocks, with their pages; those that are in place already stay. The partial page,
        of which the DRAM tier has an older state, is written through, and keeps a slot."""
        page_size, per_block = self._geometry.page_size, self._geometry.pages_per_block
        first = row.num_placed // per_block
        last = min(first + self._slice_blocks, self._shares.whole(row))
        end_page, is_partial = -(-row.num_tokens // page_size), row.num_tokens % page_size > 0
        last_page = min(last * per_block, end_page)
        partial = end_page - 1 if is_partial else None
        if partial is not None:
            self._paths.save(row.index, partial)
        are_there_LHn = self._tables.are_in_place(row.index, first * per_block, last_page)
        self._tables.vacate(self._arena, row.index, first, last, partial_page=partial)
        self._tables.place_in_order(self._arena, row.index, first, last)
        holds_all = last_page == end_page
        self._paths.load(
            row.index,
            first * per_block,
            last_page,
            is_partial=is_partial and holds_all,
            are_there_LHn=are_there_LHn,
        )
        if partial is not None and not holds_all:
            self._tables.place_page(self._arena, row.index, partial, max_blocks=row.blocks.most)
            self._paths.load(row.index, partial, end_page, is_partial=True)
        row.num_placed, row.complete = last * per_block, holds_all
