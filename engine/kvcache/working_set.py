"""How many pages the running requests have lately used, read without waiting for the device."""

from __future__ import annotations

from sparsed.engine.kvcache.tables import PageTables
from sparsed.engine.kvcache.totals import DeviceCounters


class WorkingSet:
    """Sums what ``tables`` knows of every lane."""

    def __init__(self, tables: PageTables) -> None:
        self._tables = tables
        self._sum = DeviceCounters(1, device=tables.window_RLH.device)

    def num_pages(self) -> int:
        """Pages of all lanes used in the newest 12 steps of each; on a device with work queued the
        number of an earlier call."""
        self._sum.values_C.copy_(self._tables.window_RLH.sum().view(1))
        return self._sum.read()[0]
