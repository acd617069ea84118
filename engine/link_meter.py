"""Measures how fast pieces cross the link, alone and beside matrix products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

import torch
from torch import Tensor

from sparsed.core import CopyPath, Direction, LinkEntry, LinkProbe
from sparsed.engine.kvcache.link_policy import CopyChoice
from sparsed.engine.kvcache.paths import CopyPaths, RowCopy
from sparsed.engine.kvcache.streams import new_stream, timer
from sparsed.engine.link_plan import LinkPoint
from sparsed.kernels.copy import copy_pages

REPEATS: Final = 3
MAX_ROWS: Final = 1 << 21  # of host memory that random pieces are drawn from
TRIAL_BYTES: Final = 4 << 20
SLOW_S: Final = 0.03  # a way that takes longer for all bytes is measured on fewer
MATMUL_SIZE: Final = 8192
MATMULS_S: Final = 8e-3  # of products that a copy runs beside
BESIDE_FRAC: Final = 0.6  # of that time the copy would take alone

Work = Callable[[], Future[None] | None]


class LinkMeter:
    """Copies between ``host`` and ``hot``, flat memory of bytes on the two sides of the link
    (on a CPU, both in the same memory).

    Host memory keeps what it holds: pieces are loaded first, and saved back where they came
    from. ``hot`` does not. ``host_chunk_bytes``: of a registration of host memory. One thread.
    """

    def __init__(self, host: Tensor, hot: Tensor, *, host_chunk_bytes: int | None = None) -> None:
        assert host.dtype == hot.dtype == torch.uint8 and host.ndim == hot.ndim == 1
        self._host = host
        self._hot = hot
        self._host_chunk_bytes = host_chunk_bytes
        self._device = hot.device
        self._paths = CopyPaths(hot.device)
        self._main = new_stream(hot.device)
        # Loads are urgent: their programs go before those of the work beside them.
        self._sides = {
            Direction.H2D: new_stream(hot.device, priority=-1),
            Direction.D2H: new_stream(hot.device),
        }
        self._matmuls: _Matmuls | None = None
        self._has_matmuls = hot.device.type == "cuda"

    def contiguous(self) -> LinkProbe:
        """One copy of neighbouring bytes each way, as large as the two sides and a registration
        allow."""
        size = min(len(self._host), len(self._hot), self._host_chunk_bytes or len(self._host))
        host, hot = self._host[:size], self._hot[:size]
        h2d_s = self._median_s(lambda: _copy(hot, host))
        d2h_s = self._median_s(lambda: _copy(host, hot))
        return LinkProbe(h2d_bytes_per_s=size / h2d_s, d2h_bytes_per_s=size / d2h_s)

    def measure(self, point: LinkPoint) -> LinkEntry:
        """The rate of random pieces copied this way, and what it costs the work beside it."""
        bytes_per_s = self._bytes_per_s(point)
        slowdown = self._slowdown(point, bytes_per_s) if point.beside else None
        return LinkEntry(
            direction=point.direction,
            piece_bytes=point.piece_bytes,
            path=point.choice.path,
            programs=point.choice.programs,
            tile_bytes=point.choice.tile_bytes,
            bytes_per_s=bytes_per_s,
            slowdown=slowdown,
        )

    def _bytes_per_s(self, point: LinkPoint) -> float:
        most = min(len(self._hot), len(self._host))
        if point.choice.path is not CopyPath.KERNEL:
            work, num_bytes = self._work(point, TRIAL_BYTES)
            most = min(most, int(num_bytes / self._median_s(work) * SLOW_S))
        work, num_bytes = self._work(point, most)
        return num_bytes / self._median_s(work)

    def _slowdown(self, point: LinkPoint, bytes_per_s: float) -> float | None:
        matmuls = self._prepare_matmuls()
        if matmuls is None:
            return None
        work, _ = self._work(point, int(bytes_per_s * matmuls.seconds * BESIDE_FRAC))
        by_kernel = point.choice.path is CopyPath.KERNEL
        side = self._sides[point.direction]
        pair_s = self._median_s(lambda: self._pair(work, matmuls, side=side, first=by_kernel))
        return pair_s / matmuls.seconds

    def _pair(
        self, work: Work, matmuls: _Matmuls, *, side: torch.cuda.Stream | None, first: bool
    ) -> Future[None] | None:
        """Both at once; products do not wait while the host submits a copy piece by piece."""
        assert side is not None
        main = torch.cuda.current_stream(self._device)
        side.wait_stream(main)
        if not first:
            matmuls.run()
        with torch.cuda.stream(side):
            rest = work()
        if first:
            matmuls.run()
        main.wait_stream(side)
        return rest

    def _work(self, point: LinkPoint, num_bytes: int) -> tuple[Work, int]:
        """A copy of about ``num_bytes``, and how many it is. The pieces have been loaded."""
        size = point.piece_bytes
        host, hot = (x[: len(x) // size * size].view(-1, size) for x in (self._host, self._hot))
        count = max(1, min(num_bytes // size, len(host), len(hot)))
        host_rows = torch.randperm(min(len(host), MAX_ROWS), device=self._device)[:count]
        hot_rows = torch.arange(count, device=self._device)
        copy_pages(hot, host, dst_rows_M=hot_rows, src_rows_M=host_rows)
        loads = point.direction is Direction.H2D
        dst, src = (hot, host) if loads else (host, hot)
        rows = (hot_rows, host_rows) if loads else (host_rows, hot_rows)
        return self._queue(dst, src, rows, point.choice), count * size

    def _queue(
        self, dst: Tensor, src: Tensor, rows: tuple[Tensor, Tensor], choice: CopyChoice
    ) -> Work:
        if choice.path in (CopyPath.KERNEL, CopyPath.MEMCPY):

            def by_kernel() -> None:
                copy_pages(
                    dst,
                    src,
                    dst_rows_M=rows[0],
                    src_rows_M=rows[1],
                    programs=choice.programs,
                    tile_bytes=choice.tile_bytes,
                )

            return by_kernel
        size = dst.shape[1]
        chunk = self._host_chunk_bytes // size if self._host_chunk_bytes else None
        dst_rows, src_rows = (index.cpu().numpy() for index in rows)
        copy = RowCopy(
            dst_RX=dst, src_RX=src, dst_rows=dst_rows, src_rows=src_rows, host_chunk=chunk
        )
        return lambda: self._paths.run(copy, choice)

    def _median_s(self, work: Work) -> float:
        with torch.cuda.stream(self._main):  # None: no stream, as on a CPU
            self._once_s(work)  # compiles, and warms up
            return statistics.median(self._once_s(work) for _ in range(REPEATS))

    def _once_s(self, work: Work) -> float:
        """Seconds on the device, or until CPU threads are done with their part."""
        if self._device.type == "cpu":
            started_s = time.perf_counter()
            work()
            return time.perf_counter() - started_s
        torch.cuda.synchronize(self._device)
        begin, end = timer(), timer()
        started_s = time.perf_counter()
        begin.record()
        rest = work()
        end.record()
        end.synchronize()
        if rest is not None:
            rest.result()
            return time.perf_counter() - started_s
        return float(begin.elapsed_time(end)) / 1e3

    def _prepare_matmuls(self) -> _Matmuls | None:
        """None on a CPU, and where the device has no memory left for them."""
        if self._matmuls is None and self._has_matmuls:
            try:
                matmuls = _Matmuls(self._device)
            except torch.OutOfMemoryError:
                self._has_matmuls = False
                return None
            matmuls.count = max(2, round(MATMULS_S / self._median_s(matmuls.run)))
            matmuls.seconds = self._median_s(matmuls.run)
            self._matmuls = matmuls
        return self._matmuls


class _Matmuls:
    """Products of large matrices; ``seconds`` of all ``count`` of them, alone."""

    def __init__(self, device: torch.device) -> None:
        shape = (MATMUL_SIZE, MATMUL_SIZE)
        self._a, self._b, self._out = (
            torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3)
        )
        self.count = 1
        self.seconds = 0.0

    def run(self) -> None:
        for _ in range(self.count):
            torch.mm(self._a, self._b, out=self._out)


def _copy(dst: Tensor, src: Tensor) -> None:
    dst.copy_(src, non_blocking=True)
