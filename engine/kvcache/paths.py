"""Every way rows that the host knows can be copied between the tiers."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparsed.core import CopyPath
from sparsed.engine.cuda_driver import CudaDriver
from sparsed.engine.kvcache.link_policy import CopyChoice
from sparsed.engine.kvcache.runs import Rows, Side, addresses, merge_runs
from sparsed.kernels import reference
from sparsed.kernels.copy import copy_pages


@dataclass(frozen=True, kw_only=True, slots=True)
class RowCopy:
    """Rows ``src_rows`` of one store, to be copied to ``dst_rows`` of another; no row of dst
    twice. ``host_chunk``: rows of a registration of the store in host memory, which a single copy
    must not cross."""

    dst_RX: Tensor
    src_RX: Tensor
    dst_rows: Rows
    src_rows: Rows
    host_chunk: int | None = None

    @property
    def row_bytes(self) -> int:
        return self.dst_RX.shape[1] * self.dst_RX.element_size()

    @property
    def sides(self) -> tuple[Side, Side]:
        """Target and source."""
        dst, src = (
            Side(x.data_ptr(), self.row_bytes, None if x.is_cuda else self.host_chunk)
            for x in (self.dst_RX, self.src_RX)
        )
        return dst, src


class CopyPaths:
    """Queues copies on the current stream of ``device``. One thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._staging: Tensor | None = None
        self._scatter: Future[None] | None = None

    def run(self, copy: RowCopy, choice: CopyChoice) -> Future[None] | None:
        """Begin the copy. A future is given where CPU threads have work left after the stream's:
        what the host side holds is not valid before."""
        match choice.path:
            case CopyPath.MEMCPY:
                reference.copy_pages(copy.dst_RX, copy.src_RX, **self._index(copy))
            case CopyPath.KERNEL:
                copy_pages(
                    copy.dst_RX,
                    copy.src_RX,
                    **self._index(copy),
                    programs=choice.programs,
                    tile_bytes=choice.tile_bytes,
                )
            case CopyPath.COPY_ENGINE | CopyPath.BATCHED:
                self._copy_runs(copy, choice.path)
            case CopyPath.STAGED:
                if copy.src_RX.is_cuda:
                    return self._save_staged(copy)
                self._load_staged(copy)
        return None

    def _index(self, copy: RowCopy) -> dict[str, Tensor]:
        return {
            "dst_rows_M": torch.from_numpy(copy.dst_rows).to(self._device, non_blocking=True),
            "src_rows_M": torch.from_numpy(copy.src_rows).to(self._device, non_blocking=True),
        }

    def _copy_runs(self, copy: RowCopy, path: CopyPath) -> None:
        dst, src = copy.sides
        runs = merge_runs(
            copy.dst_rows, copy.src_rows, dst_chunk=dst.chunk_rows, src_chunk=src.chunk_rows
        )
        batched = path is CopyPath.BATCHED
        submit = self._driver.copy_batch if batched else self._driver.copy_each
        stream = torch.cuda.current_stream(self._device).cuda_stream
        submit(*addresses(runs, dst=dst, src=src), stream=stream)

    def _save_staged(self, copy: RowCopy) -> Future[None]:
        """One DMA to a pinned buffer; a thread scatters from there."""
        self._finish_scatter()
        staging = self._staging_like(copy)
        source = copy.src_RX.index_select(0, torch.from_numpy(copy.src_rows).to(self._device))
        staging.copy_(source, non_blocking=True)
        staged = torch.cuda.current_stream(self._device).record_event()
        target, rows = copy.dst_RX, torch.from_numpy(copy.dst_rows)

        def scatter() -> None:
            staged.synchronize()
            target.index_copy_(0, rows, staging)

        self._scatter = self._thread.submit(scatter)
        return self._scatter

    def _load_staged(self, copy: RowCopy) -> None:
        """CPU threads gather into a pinned buffer, and one DMA takes it over: the caller waits for
        the gathering."""
        self._finish_scatter()
        torch.cuda.current_stream(self._device).synchronize()  # the buffer may be on its way
        staging = self._staging_like(copy)
        torch.index_select(copy.src_RX, 0, torch.from_numpy(copy.src_rows), out=staging)
        rows = torch.from_numpy(copy.dst_rows).to(self._device)
        copy.dst_RX.index_copy_(0, rows, staging.to(self._device, non_blocking=True))

    def _finish_scatter(self) -> None:
        if self._scatter is not None:
            self._scatter.result()

    def _staging_like(self, copy: RowCopy) -> Tensor:
        """A pinned buffer of as many rows as are copied."""
        shape, dtype = (len(copy.src_rows), copy.src_RX.shape[1]), copy.src_RX.dtype
        num_elements = shape[0] * shape[1]
        buffer = self._staging
        if buffer is None or buffer.numel() < num_elements or buffer.dtype != dtype:
            pinned = self._device.type == "cuda"
            self._staging = buffer = torch.empty(num_elements, dtype=dtype, pin_memory=pinned)
        return buffer[:num_elements].view(shape)

    @cached_property
    def _driver(self) -> CudaDriver:
        return CudaDriver()

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="scatter")
