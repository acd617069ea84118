"""The DRAM tier: one shared-memory pool of frames that holds every sealed page."""

from __future__ import annotations

import mmap
import os
import weakref

import torch
from torch import Tensor

from sparsed.core import ExitCode, FailureCause, StartError
from sparsed.engine.cuda_driver import CudaDriver
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.kvcache.pages import FreeList
from sparsed.engine.kvcache.pinning import (
    Progress,
    Registrar,
    check_memory,
    cpus_near,
    frame_chunks,
    pin,
)


class DramPool:
    """Frames ``[layer][KV head][128][K|V][head_dim]`` in a memory file, addressed by page row.

    The file outlives this process when the caller keeps ``pool_fd``; what it holds stays. On a
    CUDA device the memory is touched from CPUs near the GPU and registered, so that kernels read
    and write it through unified addresses; ``on_progress`` is told how far that is, 0 to 1.
    Errors: StartError (69) naming the memory or the limit that is short.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        num_frames: int,
        dtype: torch.dtype,
        device: torch.device,
        pool_fd: int | None,
        on_progress: Progress = lambda _frac: None,
    ) -> None:
        self.frames = FreeList(num_frames)
        self._geometry = geometry
        self._bytes = num_frames * geometry.frame_bytes
        self._map, allocated_bytes = _map_memory(self._bytes, pool_fd)
        elements = torch.frombuffer(self._map, dtype=dtype)
        self.pages_RX: Tensor = elements.view(num_frames * geometry.page_rows_per_frame, -1)
        self._chunks = frame_chunks(self._bytes, frame_bytes=geometry.frame_bytes)
        if device.type == "cuda":
            check_memory(self._bytes, allocated_bytes=allocated_bytes)
            with torch.cuda.device(device):
                self._pin(on_progress)

    @property
    def used_bytes(self) -> int:
        return (self.frames.size - len(self.frames)) * self._geometry.frame_bytes

    @property
    def total_bytes(self) -> int:
        return self._bytes

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    @property
    def layers_RX(self) -> Tensor:
        """A view whose row ``frame * layers + layer`` is one layer of one frame, contiguous."""
        return self.pages_RX.view(self.frames.size * self._geometry.num_layers, -1)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a registration: no copy may touch two of them."""
        return self._chunks[0][1]

    def _pin(self, on_progress: Progress) -> None:
        torch.cuda.synchronize()  # makes the device's context current on this thread
        driver = CudaDriver()
        registered: list[int] = []
        finalizer = weakref.finalize(self, _unregister, driver, registered)
        finalizer.atexit = False  # a process that ends leaves it to the driver, which is faster
        pin(
            self.pages_RX.data_ptr(),
            self._chunks,
            registrar=driver,
            cpus=cpus_near(driver.pci_id(torch.cuda.current_device())),
            registered=registered,
            on_progress=on_progress,
        )


def _unregister(registrar: Registrar, addresses: list[int]) -> None:
    """Unpin before the memory is unmapped: the driver remembers addresses."""
    while addresses:
        registrar.unregister(addresses.pop())


def _map_memory(num_bytes: int, pool_fd: int | None) -> tuple[mmap.mmap, int]:
    """Map ``pool_fd`` (grown to size), or a memory file of our own; also how many of its bytes
    have memory already."""
    own = pool_fd is None
    fd = os.memfd_create("sparsed-kv") if pool_fd is None else pool_fd
    try:
        os.ftruncate(fd, num_bytes)
        return mmap.mmap(fd, num_bytes), os.fstat(fd).st_blocks * 512
    except OSError as error:
        raise StartError(
            f"cannot map {num_bytes / 2**30:.1f} GiB for the DRAM tier ({error.strerror}): "
            "lower kv_dram_gib or free memory",
            code=ExitCode.UNAVAILABLE,
            cause=FailureCause.HOST_MEMORY,
        ) from error
    finally:
        if own:
            os.close(fd)
