"""Hot pages of a request given up between two steps, and what of them must be there again.

Full pages are in the DRAM tier already; only the partial page is not, and is saved for the time.

Shape legend: L layers, H KV heads, n pages.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from sparsed.engine.kvcache.dram import DramPool
from sparsed.engine.kvcache.hbm import LOCKED_STEP, HotArena
from sparsed.engine.kvcache.tables import PageTables
from sparsed.engine.kvcache.transfer import Transfer

RESTORED_STEP: Final = 0  # older than any page that a step has used since


class SpillPaths:
    """Copies pages of a row between its slots and its frames. One thread, the steps' stream."""

    def __init__(
        self, arena: HotArena, pool: DramPool, tables: PageTables, transfer: Transfer
    ) -> None:
        self._arena = arena
        self._pool = pool
        self._tables = tables
        self._transfer = transfer

    def save(self, row: int, page: int) -> None:
        """Write a partial page through to its frame, what is not yet written of it included."""
        rows_LH1, slots_LH1 = self._places(row, page, page + 1)
        self._transfer.save(
            self._pool.pages_RX, self._arena.pages_NX, dst_rows=rows_LH1, src_rows=slots_LH1
        )

    def load(
        self,
        row: int,
        first_page: int,
        last_page: int,
        *,
        is_partial: bool,
        are_there_LHn: Tensor | None = None,
    ) -> None:
        """Fill the slots of pages first_page .. last_page - 1, but for those that are there;
        ``is_partial``: the last one, which is locked."""
        rows_LHn, slots_LHn = self._places(row, first_page, last_page)
        wanted_LHn = rows_LHn
        if are_there_LHn is not None:
            wanted_LHn = rows_LHn.masked_fill(are_there_LHn, -1)
        self._transfer.load(
            self._arena.pages_NX, self._pool.pages_RX, dst_rows=slots_LHn, src_rows=wanted_LHn
        )
        steps_N = self._arena.slot_step_N
        steps_N.index_fill_(0, slots_LHn.flatten(), RESTORED_STEP)
        if is_partial:
            steps_N.index_fill_(0, slots_LHn[..., -1].flatten(), LOCKED_STEP)

    def _places(self, row: int, first_page: int, last_page: int) -> tuple[Tensor, Tensor]:
        """Page rows and slots, (L, H, n) int64."""
        rows_LHn = self._tables.page_rows(row, first_page, last_page)
        return rows_LHn, self._tables.page_slot_X[rows_LHn].long()
