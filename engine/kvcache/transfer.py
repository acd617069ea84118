"""Copies of pages between the tiers: which way, in which order, and what they took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from sparsed.core import CopyPath, Direction, LinkCalibration, LinkProbe
from sparsed.engine.kvcache.dram import DramPool
from sparsed.engine.kvcache.link_policy import CopyChoice, choose_copy
from sparsed.engine.kvcache.order import Saved, SaveOrder
from sparsed.engine.kvcache.paths import CopyPaths, RowCopy
from sparsed.engine.kvcache.totals import CopyTotals, Totals, Way
from sparsed.kernels.copy import DEFAULT_PROGRAMS, DEFAULT_TILE_BYTES, copy_pages

PROBE_BYTES = 64 << 20
PROBE_REPEATS = 3
BLOCK_PATHS = (CopyPath.KERNEL, CopyPath.COPY_ENGINE, CopyPath.BATCHED, CopyPath.STAGED)
_UNCALIBRATED = CopyChoice(CopyPath.KERNEL, DEFAULT_PROGRAMS, DEFAULT_TILE_BYTES)
_UNCALIBRATED_BLOCKS = CopyChoice(CopyPath.COPY_ENGINE, 0, 0)
_ON_CPU = CopyChoice(CopyPath.MEMCPY, 0, 0)


class Transfer:
    """Moves page rows. ``load`` is H2D (DRAM tier to device), ``save`` is D2H.

    On a CUDA device copies are queued; on a CPU they are done when the call returns. Rows with a
    negative source are skipped. A load waits, on its stream, for every save before it. A save
    reads its source in the order of the current stream; frames that change hands need no more,
    as long as streams that load are joined to the one that saves before the frames are freed.

    Inside a CUDA graph nothing is timed and nothing waits: call ``wait_for_saves`` before a
    replay that loads. One thread.
    """

    def __init__(
        self,
        *,
        page_bytes: int,
        device: torch.device,
        calibration: LinkCalibration | None = None,
    ) -> None:
        self._page_bytes = page_bytes
        self._device = device
        self._calibration = calibration
        self._programs: int | None = None
        self._totals = Totals(device=device)
        self._order = SaveOrder(device)
        self._paths = CopyPaths(device)
        self._block_choices: dict[int, CopyChoice] = {}
        self._stream = _new_stream(device)
        self._choose()

    # -- ways --------------------------------------------------------------------------------

    def calibrate(self, calibration: LinkCalibration) -> None:
        """Take the ways that ``calibration`` found best, from the next copy on."""
        self._calibration = calibration
        self._choose()

    def set_programs(self, programs: int | None) -> None:
        """Programs of the kernel that loads; None: the calibrated number."""
        self._programs = programs
        self._choose()

    @property
    def load_choice(self) -> CopyChoice:
        """How pages are loaded; a graph that was captured keeps what held then."""
        return self._load_choice

    @property
    def save_choice(self) -> CopyChoice:
        """How rows that only the device knows are saved."""
        return self._save_choice

    def block_choice(self, piece_bytes: int) -> CopyChoice:
        """How ``save_blocks`` copies pieces of that size."""
        if piece_bytes not in self._block_choices:
            self._block_choices[piece_bytes] = self._choice(
                Direction.D2H, piece_bytes, BLOCK_PATHS, otherwise=_UNCALIBRATED_BLOCKS
            )
        return self._block_choices[piece_bytes]

    # -- copies ------------------------------------------------------------------------------

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
        self._order.wait()
        self._copy(Direction.H2D, self._load_choice, dst_RX, src_RX, dst_rows, src_rows, count)

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
        if not background or self._stream is None:
            self._copy(Direction.D2H, self._save_choice, dst_RX, src_RX, dst_rows, src_rows, count)
            return self._order.saved()
        for tensor in (src_RX, dst_rows, src_rows):
            _keep(tensor, self._stream)
        with self._behind():
            self._copy(Direction.D2H, self._save_choice, dst_RX, src_RX, dst_rows, src_rows, count)
            return self._order.saved()

    def save_blocks(
        self, pool: DramPool, source_FX: Tensor, *, frames: Sequence[int], layer: int
    ) -> Saved:
        """Copy one layer of whole frames to the DRAM tier, behind what the current stream has
        queued, on a stream of its own. ``wait`` for the answer before the source is overwritten.

        Shapes: source (F, ...) contiguous, for each frame its ``[KV head][128][K|V][head_dim]``.
        """
        num_frames = len(source_FX)
        assert source_FX.is_contiguous() and len(frames) == num_frames
        copy = RowCopy(
            dst_RX=pool.layers_RX,
            src_RX=source_FX.view(num_frames, pool.layers_RX.shape[1]),
            dst_rows=np.asarray(frames, dtype=np.int64) * pool.geometry.num_layers + layer,
            src_rows=np.arange(num_frames),
            host_chunk=pool.chunk_bytes * pool.geometry.num_layers // pool.geometry.frame_bytes,
        )
        choice = self.block_choice(copy.row_bytes)
        way = (Direction.D2H, choice.path)
        _keep(source_FX, self._stream)
        with self._behind():
            self._totals.add(way, num_frames, piece_bytes=copy.row_bytes)
            with self._totals.timed(way):
                scatter = self._paths.run(copy, choice)
            return self._order.saved(scatter=scatter)

    def wait_for_saves(self) -> None:
        """The current stream goes on once every save so far has arrived."""
        self._order.wait()

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

    # -- inside ------------------------------------------------------------------------------

    def _choose(self) -> None:
        self._block_choices.clear()
        kernel, page_bytes = (CopyPath.KERNEL,), self._page_bytes
        load = self._choice(Direction.H2D, page_bytes, kernel, otherwise=_UNCALIBRATED)
        if self._programs is not None and load.path is CopyPath.KERNEL:
            load = load._replace(programs=self._programs)
        self._load_choice = load
        self._save_choice = self._choice(Direction.D2H, page_bytes, kernel, otherwise=_UNCALIBRATED)

    def _choice(
        self,
        direction: Direction,
        piece_bytes: int,
        paths: Sequence[CopyPath],
        *,
        otherwise: CopyChoice,
    ) -> CopyChoice:
        if self._device.type == "cpu":
            return _ON_CPU
        if self._calibration is None:
            return otherwise
        found = choose_copy(
            self._calibration, direction=direction, piece_bytes=piece_bytes, paths=paths
        )
        return found or otherwise

    def _copy(
        self,
        direction: Direction,
        choice: CopyChoice,
        dst_RX: Tensor,
        src_RX: Tensor,
        dst_rows: Tensor,
        src_rows: Tensor,
        count: Tensor | None,
    ) -> None:
        way = (direction, choice.path)
        moved = (src_rows >= 0).sum() if count is None else count.clamp(0, src_rows.numel())
        self._totals.add(way, moved, piece_bytes=self._page_bytes)
        with self._totals.timed(way):
            copy_pages(
                dst_RX,
                src_RX,
                dst_rows_M=dst_rows.flatten().contiguous(),
                src_rows_M=src_rows.flatten().contiguous(),
                count=count,
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

    def _sum(self, direction: Direction) -> CopyTotals:
        found = [total for (way, _), total in self.totals().items() if way is direction]
        return CopyTotals(sum(t.num_bytes for t in found), sum(t.seconds for t in found))


def _new_stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type == "cpu":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own


def _keep(tensor: Tensor, stream: torch.cuda.Stream | None) -> None:
    """The memory of ``tensor`` is not given away before ``stream`` is done with it."""
    if stream is not None and tensor.is_cuda:
        tensor.record_stream(stream)


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
