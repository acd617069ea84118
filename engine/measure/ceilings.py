"""What a device can do at most, measured: every other figure of a run is compared with these."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from sparsed.engine.measure.clock import Clock

COPY_BYTES: Final = 1 << 30
CPU_COPY_BYTES: Final = 128 << 20
HALF_BYTES: Final = 256 << 20  # of a buffer: five times the cache of an H100
MATMUL_SIZE: Final = 8192
CPU_MATMUL_SIZE: Final = 1024


def copy_bytes_per_s(clock: Clock) -> float:
    """A large copy in the memory of the device: bytes read and written. Takes 2 GiB of it (on a
    CPU an eighth) for the while."""
    rate = _copy_bytes_per_s(clock)
    give_back_memory(clock.device)
    return rate


def copy_bytes_per_s_within(buffer_NX: Tensor, clock: Clock) -> float:
    """As ``copy_bytes_per_s``, between two parts of a buffer (N, X) of two rows or more, whose
    contents are lost: takes no memory. Where the buffer fits the device's cache it is the rate of
    that."""
    count = max(1, min(len(buffer_NX) // 2, HALF_BYTES // buffer_NX[0].nbytes))
    return _rate_of_copy(buffer_NX[:count], target=buffer_NX[count : 2 * count], clock=clock)


def matmul_flop_per_s(clock: Clock, *, dtype: torch.dtype) -> float:
    """A product of two large random square matrices."""
    size = CPU_MATMUL_SIZE if clock.device.type == "cpu" else MATMUL_SIZE
    a, b, out = (torch.randn((size, size), device=clock.device, dtype=dtype) for _ in range(3))
    return float(2 * size**3 / clock.median_s(lambda: torch.mm(a, b, out=out)))


def give_back_memory(device: torch.device) -> None:
    """What is free in torch's pool, to whoever allocates next."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _copy_bytes_per_s(clock: Clock) -> float:
    num_bytes = CPU_COPY_BYTES if clock.device.type == "cpu" else COPY_BYTES
    source = torch.randint(0, 100, (num_bytes // 4,), dtype=torch.int32, device=clock.device)
    return _rate_of_copy(source, target=torch.empty_like(source), clock=clock)


def _rate_of_copy(source: Tensor, *, target: Tensor, clock: Clock) -> float:
    return 2 * source.nbytes / clock.median_s(lambda: target.copy_(source))
