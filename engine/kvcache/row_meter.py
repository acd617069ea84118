"""What every running request was seen to use and miss, read without waiting for the device.

Shape legend: R rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import torch

from sparsed.engine.kvcache.row import Row, Use
from sparsed.engine.kvcache.tables import PageTables
from sparsed.engine.readback import PendingNumbers

EVERY_STEPS: Final = 4
BASE_STEPS: Final = 32  # so many steps count what was known of a row before


class _Seen(NamedTuple):
    """A row when its counts were copied. ``num_steps`` that select, since demand was cleared;
    ``window_at``: its decode steps, None where they do not fill a window."""

    row: Row
    num_steps: int
    window_at: int | None


class _Pending(NamedTuple):
    sums_R3: PendingNumbers
    seen: tuple[_Seen, ...]


class RowMeter:
    """Fills ``Row.use`` from the counts of ``tables``. Call ``observe`` between steps. One thread."""

    def __init__(self, tables: PageTables) -> None:
        self._tables = tables
        self._pending: _Pending | None = None
        self._turn = 0

    def observe(self, rows: Mapping[int, Row]) -> None:
        """Take what has arrived; every few calls have the counts of now copied to the host."""
        if self._pending is not None and self._pending.sums_R3.has_arrived:
            self._take(self._pending, rows)
            self._pending = None
        if self._pending is None and self._turn % EVERY_STEPS == 0:
            self._pending = self._begin(rows)
        self._turn += 1

    def _begin(self, rows: Mapping[int, Row]) -> _Pending | None:
        seen = tuple(_seen(row) for row in rows.values() if row.reads.sparse_steps)
        if not seen:
            return None
        tables = self._tables
        window_R = tables.window_RLH.sum((1, 2))
        demand_R2 = tables.demand_RLH2.sum((1, 2))
        sums_R3 = torch.cat((window_R[:, None], demand_R2), dim=1)
        return _Pending(PendingNumbers(sums_R3), seen)

    def _take(self, pending: _Pending, rows: Mapping[int, Row]) -> None:
        sums_R3 = pending.sums_R3.read()
        for seen in pending.seen:
            row = seen.row
            if rows.get(row.index) is row and not row.is_spilled:
                row.use = _updated(seen, *sums_R3[row.index])


def _seen(row: Row) -> _Seen:
    window_at = row.reads.decode_steps if row.has_window else None
    return _Seen(row, row.reads.sparse_steps - row.steps_measured, window_at)


def _updated(seen: _Seen, window: int, misses: int, returns: int) -> Use:
    """These counts, and what was known of the row before their steps began."""
    use, num_steps = seen.row.use, seen.num_steps
    if num_steps < use.num_steps:  # demand was cleared since
        use = use._replace(
            base_misses=use.misses_per_step,
            base_returns=use.returns_per_step,
            base_steps=BASE_STEPS,
        )
    if seen.window_at is not None:
        use = use._replace(window_pages=window, window_at=seen.window_at)
    steps = max(num_steps + use.base_steps, 1)
    return use._replace(
        num_steps=num_steps,
        misses_per_step=(misses + use.base_steps * use.base_misses) / steps,
        returns_per_step=(returns + use.base_steps * use.base_returns) / steps,
    )
