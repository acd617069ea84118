"""Copies of pages between the tiers: in which order, which way, and what they took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsed.core import CopyTotal, Direction, LinkCalibration, LinkProbe, VerifyMode
from sparsed.engine.kvcache.dram import DramPool
from sparsed.engine.kvcache.link_policy import CopyChoice
from sparsed.engine.kvcache.order import Saved, SaveOrder
from sparsed.engine.kvcache.paths import CopyPaths, RowCopy
from sparsed.engine.kvcache.streams import new_stream
from sparsed.engine.kvcache.totals import CopyTotals, Totals, Way
from sparsed.engine.kvcache.verify import Verified, Verifier, Where
from sparsed.engine.kvcache.ways import Ways
from sparsed.kernels.copy import copy_pages

PROBE_BYTES = 64 << 20
PROBE_REPEATS = 3
CopyRows = Callable[..., None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pages:
    """Pages on their way, as ``copy_pages`` takes them."""

    dst_RX: Tensor
    src_RX: Tensor
    dst_rows_M: Tensor
    src_rows_M: Tensor
    count: Tensor | None


class Transfer:
    """Moves page rows. ``load`` is H2D (DRAM tier to device), ``save`` is D2H.

    On a CUDA device copies are queued; on a CPU they are done when the call returns. Rows with a
    negative source are skipped. A load waits, on its stream, for every save before it. A save
    reads its source in the order of the current stream; frames that change hands need no more,
    as long as streams that load are joined to the one that saves before the frames are freed.

    Inside a CUDA graph copies time nothing and wait for nothing: call ``wait_for_saves`` before a
    replay that loads, and ``warm_up`` before a capture. ``ways`` says how copies are made, and can
    be changed at any time; a graph keeps what held at its capture. ``copy_rows`` moves page rows as
    ``kernels.copy.copy_pages`` does; one that waits for the device needs steps without graphs.
    One thread.
    """

    def __init__(
        self,
        *,
        page_bytes: int,
        device: torch.device,
        calibration: LinkCalibration | None = None,
        verifier: Verifier | None = None,
        copy_rows: CopyRows = copy_pages,
    ) -> None:
        self.copy_rows = copy_rows
        self.ways = Ways(page_bytes=page_bytes, device=device, calibration=calibration)
        self._page_bytes = page_bytes
        self._device = device
        self._totals = Totals(device=device)
        self._verifier = verifier or Verifier(VerifyMode.OFF, num_page_rows=0, device=device)
        self._order = SaveOrder(device)
        self._paths = CopyPaths(device)
        self._stream = new_stream(device)
        self._checks: list[Callable[[Where], None]] = []  # of saves that CPU threads finish

    def load(
        self,
        dst_RX: Tensor,
        src_RX: Tensor,
        *,
        dst_rows: Tensor,
        src_rows: Tensor,
        count: Tensor | None = None,
    ) -> None:
        """Copy rows of the DRAM tier to the device, on the current stream. ``count`` as in
        ``copy_pages``; the pairs before it must all be wanted."""
        pages = _pages(dst_RX, src_RX, dst_rows, src_rows, count)
        self.wait_for_saves()
        self._count(Direction.H2D, self.ways.load, pages)
        self._copy(Direction.H2D, self.ways.load, pages)
        self._verifier.check(
            dst_RX,
            store_rows=pages.dst_rows_M,
            page_rows=pages.src_rows_M,
            where=Where.LOAD,
            count=count,
        )

    def save(
        self,
        dst_RX: Tensor,
        src_RX: Tensor,
        *,
        dst_rows: Tensor,
        src_rows: Tensor,
        count: Tensor | None = None,
        background: bool = False,
    ) -> Saved:
        """Copy rows to the DRAM tier, on the current stream, or behind what it has queued on a
        stream of its own: then ``wait`` for the answer before the source is overwritten."""
        pages = _pages(dst_RX, src_RX, dst_rows, src_rows, count)
        self._count(Direction.D2H, self.ways.save, pages)
        if not background:
            return self._save(pages, Where.SAVE)
        self._keep(src_RX, pages.dst_rows_M, pages.src_rows_M, count)
        with self._behind():
            return self._save(pages, Where.BACKGROUND)

    def save_blocks(
        self, pool: DramPool, source_FX: Tensor, *, frames: Sequence[int], layer: int
    ) -> Saved:
        """Copy one layer of whole frames to the DRAM tier, behind what the current stream has
        queued, on a stream of its own. ``wait`` for the answer before the source is overwritten.

        Shapes: source (F, ...) contiguous, for each frame its ``[KV head][128][K|V][head_dim]``.
        """
        num_frames = len(source_FX)
        assert source_FX.is_contiguous() and len(frames) == num_frames
        layers = np.asarray(frames, dtype=np.int64) * pool.geometry.num_layers + layer
        copy = RowCopy(
            dst_RX=pool.layers_RX,
            src_RX=source_FX.view(num_frames, pool.layers_RX.shape[1]),
            dst_rows=layers,
            src_rows=np.arange(num_frames),
            host_chunk=pool.chunk_bytes // pool.geometry.layer_bytes,
        )
        choice = self.ways.save_blocks(copy.row_bytes)
        way = (Direction.D2H, choice.path)
        self._totals.add(way, num_frames, piece_bytes=copy.row_bytes)
        self._keep(source_FX)
        with self._behind():
            check = self._remember_blocks(pool, source_FX, layers)
            with self._totals.timed(way):
                scatter = self._paths.run(copy, choice)
            if scatter is None:
                check(Where.BACKGROUND)
            else:
                self._checks.append(check)
            return self._order.saved(scatter=scatter)

    def fetch(
        self,
        dst_RX: Tensor,
        src_RX: Tensor,
        *,
        dst_rows_M: Tensor,
        src_rows_M: Tensor,
        count_1: Tensor,
    ) -> None:
        """Copy the first ``count`` rows of a list to the device, on the current stream, as part of
        a step that has waited for all saves; ``count_fetched`` counts a whole step at once."""
        pages = _pages(dst_RX, src_RX, dst_rows_M, src_rows_M, count_1)
        self._copy(Direction.H2D, self.ways.load, pages)
        self._verifier.check(
            dst_RX, store_rows=dst_rows_M, page_rows=src_rows_M, where=Where.LOAD, count=count_1
        )

    def count_fetched(self, num_pages: Tensor) -> None:
        """Count what a step has fetched, a scalar on the device."""
        way = (Direction.H2D, self.ways.load.path)
        self._totals.add(way, num_pages, piece_bytes=self._page_bytes)

    def add_timed(self, num_pages: int, *, seconds: float) -> None:
        """So many pages of a step took so long: what graphs fetch is taken to be as fast."""
        way = (Direction.H2D, self.ways.load.path)
        self._totals.add_timed(way, num_pages * self._page_bytes, seconds=seconds)

    def wait_for_saves(self) -> None:
        """The current stream goes on once every save so far has arrived."""
        self._order.wait()
        while self._checks:
            self._checks.pop()(Where.SAVE)

    def warm_up(self, pool_RX: Tensor, hot_NX: Tensor) -> None:
        """Compile what loads and saves between these stores launch, before a CUDA graph captures
        them. Copies nothing."""
        none_M = torch.full((1,), -1, dtype=torch.int64, device=self._device)
        for kind in (None, torch.int32, torch.int64):
            count = None if kind is None else torch.zeros((), dtype=kind, device=self._device)
            for dst_RX, src_RX, choice in (
                (hot_NX, pool_RX, self.ways.load),
                (pool_RX, hot_NX, self.ways.save),
            ):
                copy_pages(
                    dst_RX,
                    src_RX,
                    dst_rows_M=none_M,
                    src_rows_M=none_M,
                    count=count,
                    programs=choice.programs,
                    tile_bytes=choice.tile_bytes,
                )
        for store_RX in (pool_RX, hot_NX):
            self._verifier.check(store_RX, store_rows=none_M, page_rows=none_M, where=Where.LOAD)

    # -- totals ------------------------------------------------------------------------------

    def totals(self) -> Mapping[Way, CopyTotals]:
        """Bytes and seconds by direction and path; a busy device answers with those of the call
        before."""
        return self._totals.read()

    @property
    def h2d(self) -> CopyTotals:
        """Bytes and seconds of all loads so far."""
        return self._sum(Direction.H2D)

    @property
    def d2h(self) -> CopyTotals:
        """Bytes and seconds of all saves so far."""
        return self._sum(Direction.D2H)

    @property
    def copies(self) -> tuple[CopyTotal, ...]:
        """The same by direction and path, of the ways that were taken."""
        return tuple(
            CopyTotal(direction=direction, path=path, num_bytes=num_bytes, seconds=seconds)
            for (direction, path), (num_bytes, seconds) in self.totals().items()
        )

    @property
    def verified(self) -> Verified:
        """Pages looked at again after their copy, and those found to differ."""
        return self._verifier.read()

    # -- inside ------------------------------------------------------------------------------

    def _save(self, pages: _Pages, where: Where) -> Saved:
        verifier, count = self._verifier, pages.count
        rows_M = pages.dst_rows_M
        if verifier.mode is not VerifyMode.OFF:
            rows_M = torch.where(pages.src_rows_M >= 0, rows_M, -1)
        verifier.remember(pages.src_RX, source_rows=pages.src_rows_M, page_rows=rows_M, count=count)
        self._copy(Direction.D2H, self.ways.save, pages)
        verifier.check(pages.dst_RX, store_rows=rows_M, page_rows=rows_M, where=where, count=count)
        return self._order.saved()

    def _remember_blocks(
        self, pool: DramPool, source_FX: Tensor, layers_F: npt.NDArray[np.int64]
    ) -> Callable[[Where], None]:
        """Note the checksums of the pages in ``source``; what checks them in the pool."""
        if self._verifier.mode is VerifyMode.OFF:
            return lambda _where: None
        pages_NX = source_FX.view(-1, pool.pages_RX.shape[1])
        per_layer = len(pool.pages_RX) // len(pool.layers_RX)
        first_F1 = torch.from_numpy(layers_F[:, None] * per_layer).to(self._device)
        rows_N = (first_F1 + torch.arange(per_layer, device=self._device)).flatten()
        source_N = torch.arange(len(pages_NX), device=self._device)
        self._verifier.remember(pages_NX, source_rows=source_N, page_rows=rows_N)
        return lambda where: self._verifier.check(
            pool.pages_RX, store_rows=rows_N, page_rows=rows_N, where=where
        )

    def _count(self, direction: Direction, choice: CopyChoice, pages: _Pages) -> None:
        """On the current stream: streams that run side by side must not count the same thing."""
        rows_M, count = pages.src_rows_M, pages.count
        moved = (rows_M >= 0).sum() if count is None else count.view(()).clamp(0, len(rows_M))
        self._totals.add((direction, choice.path), moved, piece_bytes=self._page_bytes)

    def _copy(self, direction: Direction, choice: CopyChoice, pages: _Pages) -> None:
        with self._totals.timed((direction, choice.path)):
            self.copy_rows(
                pages.dst_RX,
                pages.src_RX,
                dst_rows_M=pages.dst_rows_M,
                src_rows_M=pages.src_rows_M,
                count=pages.count,
                programs=choice.programs,
                tile_bytes=choice.tile_bytes,
            )

    @contextmanager
    def _behind(self) -> Iterator[None]:
        """On the stream of saves, after all that the current one has queued."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def _keep(self, *tensors: Tensor | None) -> None:
        """Their memory is not given away before the stream of saves is done with it."""
        for tensor in tensors:
            if self._stream is not None and tensor is not None and tensor.is_cuda:
                tensor.record_stream(self._stream)

    def _sum(self, direction: Direction) -> CopyTotals:
        found = [total for (way, _), total in self.totals().items() if way is direction]
        return CopyTotals(sum(t.num_bytes for t in found), sum(t.seconds for t in found))


def _pages(
    dst_RX: Tensor, src_RX: Tensor, dst_rows: Tensor, src_rows: Tensor, count: Tensor | None
) -> _Pages:
    return _Pages(
        dst_RX=dst_RX,
        src_RX=src_RX,
        dst_rows_M=dst_rows.flatten().contiguous(),
        src_rows_M=src_rows.flatten().contiguous(),
        count=count,
    )


def probe_link(dram_RX: Tensor, hot_NX: Tensor, *, ways: Ways) -> LinkProbe:
    """Best of three copies of up to 64 MiB of pages each way. Call before use: it overwrites the
    hot tier."""
    row_bytes = dram_RX.shape[1] * dram_RX.element_size()
    count = max(1, min(PROBE_BYTES // row_bytes, len(dram_RX), len(hot_NX)))
    rows = torch.arange(count, device=hot_NX.device)
    num_bytes = count * row_bytes
    return LinkProbe(
        h2d_bytes_per_s=num_bytes / _best_seconds(hot_NX, dram_RX, rows, ways.load),
        d2h_bytes_per_s=num_bytes / _best_seconds(dram_RX, hot_NX, rows, ways.save),
    )


def _best_seconds(dst_RX: Tensor, src_RX: Tensor, rows: Tensor, choice: CopyChoice) -> float:
    best = float("inf")
    for _ in range(PROBE_REPEATS):
        _synchronize(rows.device)
        start = time.perf_counter()
        copy_pages(
            dst_RX,
            src_RX,
            dst_rows_M=rows,
            src_rows_M=rows,
            programs=choice.programs,
            tile_bytes=choice.tile_bytes,
        )
        _synchronize(rows.device)
        best = min(best, time.perf_counter() - start)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
