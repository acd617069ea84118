"""Copies of pages between the tiers, with the bytes and seconds they took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsed.core import LinkProbe
from sparsed.kernels.copy import copy_pages

PROBE_BYTES = 64 << 20
PROBE_REPEATS = 3


@dataclass(slots=True)
class _Direction:
    """Totals of one direction. Page counts stay on the device, event pairs wait to be read."""

    pages: Tensor
    seconds: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def collect(self) -> float:
        """Seconds so far; finished event pairs are folded in."""
        while self.events and self.events[0][1].query():  # type: ignore[no-untyped-call]  # torch's
            start, end = self.events.pop(0)
            self.seconds += start.elapsed_time(end) / 1e3
        return self.seconds


class Transfer:
    """Moves page rows. ``load`` is H2D (DRAM tier to device), ``save`` is D2H.

    Rows with a negative source are skipped. Both calls return when the copy is queued on the
    current stream (CUDA) or done (CPU).
    """

    def __init__(self, *, page_bytes: int, device: torch.device) -> None:
        self._page_bytes = page_bytes
        self._device = device
        self._h2d = _Direction(pages=torch.zeros((), dtype=torch.int64, device=device))
        self._d2h = _Direction(pages=torch.zeros((), dtype=torch.int64, device=device))

    def load(self, dst_RX: Tensor, src_RX: Tensor, *, dst_rows: Tensor, src_rows: Tensor) -> None:
        self._move(self._h2d, dst_RX, src_RX, dst_rows, src_rows)

    def save(self, dst_RX: Tensor, src_RX: Tensor, *, dst_rows: Tensor, src_rows: Tensor) -> None:
        self._move(self._d2h, dst_RX, src_RX, dst_rows, src_rows)

    @property
    def h2d(self) -> tuple[int, float]:
        """Bytes and seconds of all loads so far."""
        return int(self._h2d.pages) * self._page_bytes, self._h2d.collect()

    @property
    def d2h(self) -> tuple[int, float]:
        """Bytes and seconds of all saves so far."""
        return int(self._d2h.pages) * self._page_bytes, self._d2h.collect()

    def _move(
        self, total: _Direction, dst: Tensor, src: Tensor, dst_rows: Tensor, src_rows: Tensor
    ) -> None:
        total.pages += (src_rows >= 0).sum()
        with self._timed(total):
            copy_pages(
                dst,
                src,
                dst_rows_M=dst_rows.flatten().contiguous(),
                src_rows_M=src_rows.flatten().contiguous(),
            )

    @contextmanager
    def _timed(self, total: _Direction) -> Iterator[None]:
        if self._device.type == "cpu":
            start = time.perf_counter()
            yield
            total.seconds += time.perf_counter() - start
            return
        first, last = timer(), timer()
        first.record()
        yield
        last.record()
        total.events.append((first, last))
        total.collect()


def timer() -> torch.cuda.Event:
    """An event that can be timed."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own


def probe_link(dram_RX: Tensor, hot_NX: Tensor) -> LinkProbe:
    """Best of three copies of up to 64 MiB of pages each way. Call before use: it overwrites both
    tiers."""
    row_bytes = dram_RX.shape[1] * dram_RX.element_size()
    count = max(1, min(PROBE_BYTES // row_bytes, len(dram_RX), len(hot_NX)))
    rows = torch.arange(count, device=hot_NX.device)
    num_bytes = count * row_bytes
    return LinkProbe(
        h2d_bytes_per_s=num_bytes / _best_seconds(hot_NX, dram_RX, rows),
        d2h_bytes_per_s=num_bytes / _best_seconds(dram_RX, hot_NX, rows),
    )


def _best_seconds(dst_RX: Tensor, src_RX: Tensor, rows: Tensor) -> float:
    best = float("inf")
    for _ in range(PROBE_REPEATS):
        _synchronize(rows.device)
        start = time.perf_counter()
        copy_pages(dst_RX, src_RX, dst_rows_M=rows, src_rows_M=rows)
        _synchronize(rows.device)
        best = min(best, time.perf_counter() - start)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
