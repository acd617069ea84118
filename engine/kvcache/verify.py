"""Verification of copies: a page that was saved is remembered by its checksum, and looked at again
where it arrived, in the DRAM tier after the save and in the hot tier after every load."""

from __future__ import annotations

import logging
from enum import IntEnum
from typing import Final, NamedTuple

import torch
from torch import Tensor

from sparsed.core import VerifyMode
from sparsed.engine.kvcache.totals import DeviceCounters
from sparsed.kernels.checksum import page_checksums

SAMPLE_STRIDE: Final = 64
_SCATTER: Final = 0x9E3779B1  # neighbours are not sampled together: they share layer and head

logger = logging.getLogger(__name__)


class Where(IntEnum):
    """Who counts: streams that run side by side must not add to the same counter."""

    LOAD = 0
    SAVE = 1
    BACKGROUND = 2


class Verified(NamedTuple):
    """Since the start."""

    checked_pages: int
    mismatches: int


class Verifier:
    """Remembers 8 bytes for every page row of the DRAM tier, on the device. Works on the current
    stream and never waits for it. One thread.

    A page that nobody saved since the start is not checked. ``OFF`` costs nothing.
    """

    def __init__(self, mode: VerifyMode, *, num_page_rows: int, device: torch.device) -> None:
        self.mode = mode
        self._logged = False
        rows = num_page_rows if mode is not VerifyMode.OFF else 0
        # The row beyond the last takes what is not wanted.
        self._sums_R = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self._counters = DeviceCounters(2 * len(Where), device=device)
        self._checked = self._counters.values_C[: len(Where)].unbind()
        self._wrong = self._counters.values_C[len(Where) :].unbind()

    def remember(
        self,
        source_RX: Tensor,
        *,
        source_rows: Tensor,
        page_rows: Tensor,
        count: Tensor | None = None,
    ) -> None:
        """Note the checksums of pages about to be saved from ``source`` to ``page_rows``. Shapes,
        and which rows are skipped, as in ``copy_pages``."""
        if self.mode is VerifyMode.OFF:
            return
        wanted = self._wanted(source_rows, page_rows, count)
        sums = page_checksums(source_RX, rows_M=torch.where(wanted, source_rows, -1))
        self._sums_R[torch.where(wanted, page_rows, len(self._sums_R) - 1)] = sums

    def check(
        self,
        store_RX: Tensor,
        *,
        store_rows: Tensor,
        page_rows: Tensor,
        where: Where,
        count: Tensor | None = None,
    ) -> None:
        """Compare pages of either tier with what was remembered of their ``page_rows``; rows
        negative on either side are skipped."""
        if self.mode is VerifyMode.OFF:
            return
        wanted = self._wanted(store_rows, page_rows, count)
        known = self._sums_R[torch.where(wanted, page_rows, len(self._sums_R) - 1)]
        wanted &= known != 0
        found = page_checksums(store_RX, rows_M=torch.where(wanted, store_rows, -1))
        self._checked[where].add_(wanted.sum())
        self._wrong[where].add_((wanted & (found != known)).sum())

    def read(self) -> Verified:
        """Counts of now, or on a busy device those of the last call; the first mismatch that is
        seen is logged."""
        if self.mode is VerifyMode.OFF:
            return Verified(0, 0)
        counts = self._counters.read()
        verified = Verified(sum(counts[: len(Where)]), sum(counts[len(Where) :]))
        if verified.mismatches and not self._logged:
            self._logged = True
            logger.error(
                "KV PAGES DIFFER between the tiers: %d of %d checked are not what was saved; "
                "answers since then may be wrong. Please report this, with the versions of the "
                "driver, torch and triton",
                verified.mismatches,
                verified.checked_pages,
            )
        return verified

    def _wanted(self, rows: Tensor, page_rows: Tensor, count: Tensor | None) -> Tensor:
        wanted = (rows >= 0) & (page_rows >= 0)
        if count is not None:
            wanted &= torch.arange(len(rows), device=rows.device) < count
        if self.mode is VerifyMode.SAMPLE:
            wanted &= (page_rows * _SCATTER >> 16) % SAMPLE_STRIDE == 0
        return wanted
