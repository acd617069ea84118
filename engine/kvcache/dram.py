"""The DRAM tier: one shared-memory pool of frames that holds every sealed page."""

from __future__ import annotations

import mmap
import os
import weakref
from typing import Any

import torch
from torch import Tensor

from sparsed.core import ExitCode, StartError
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.kvcache.pages import FreeList

REGISTER_BYTES = 32 << 30  # one registration of 512 GiB or more is refused by drivers


class DramPool:
    """Frames ``[layer][KV head][128][K|V][head_dim]`` in a memory file, addressed by page row.

    The file outlives this process when the caller keeps ``pool_fd``. On a CUDA device the memory
    is registered, so that kernels read and write it through unified addresses.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        num_frames: int,
        dtype: torch.dtype,
        device: torch.device,
        pool_fd: int | None,
    ) -> None:
        self.frames = FreeList(num_frames)
        self._geometry = geometry
        self._bytes = num_frames * geometry.frame_bytes
        self._map = _map_memory(self._bytes, pool_fd)
        elements = torch.frombuffer(self._map, dtype=dtype)
        self.pages_RX: Tensor = elements.view(num_frames * geometry.page_rows_per_frame, -1)
        self._registered: list[int] = []
        weakref.finalize(self, _unregister, self._registered)
        if device.type == "cuda":
            self._register()

    @property
    def used_bytes(self) -> int:
        return (self.frames.size - len(self.frames)) * self._geometry.frame_bytes

    @property
    def total_bytes(self) -> int:
        return self._bytes

    def _register(self) -> None:
        """Pin the pool in chunks that end on frame boundaries."""
        frame_bytes = self._geometry.frame_bytes
        chunk = max(REGISTER_BYTES // frame_bytes, 1) * frame_bytes
        start = self.pages_RX.data_ptr()
        for offset in range(0, self._bytes, chunk):
            size = min(chunk, self._bytes - offset)
            status = _cuda_runtime().cudaHostRegister(start + offset, size, 0)
            if int(status) != 0:
                raise StartError(
                    f"cannot pin {size / 2**30:.1f} GiB of the DRAM tier (CUDA error "
                    f"{int(status)}): raise the memlock limit (ulimit -l) or lower kv_dram_gib",
                    code=ExitCode.UNAVAILABLE,
                )
            self._registered.append(start + offset)


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's own


def _unregister(addresses: list[int]) -> None:
    """Unpin before the memory is unmapped: the driver remembers addresses."""
    while addresses:
        _cuda_runtime().cudaHostUnregister(addresses.pop())


def _map_memory(num_bytes: int, pool_fd: int | None) -> mmap.mmap:
    """Map ``pool_fd`` (grown to size), or a memory file of our own."""
    own = pool_fd is None
    fd = os.memfd_create("sparsed-kv") if pool_fd is None else pool_fd
    try:
        os.ftruncate(fd, num_bytes)
        return mmap.mmap(fd, num_bytes)
    except OSError as error:
        raise StartError(
            f"cannot map {num_bytes / 2**30:.1f} GiB for the DRAM tier ({error.strerror}): "
            "lower kv_dram_gib or free memory",
            code=ExitCode.UNAVAILABLE,
        ) from error
    finally:
        if own:
            os.close(fd)
