"""Memory of the host made ready for the GPU: touched near it, in parallel, and registered."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from sparsed.core import GIB, ExitCode, FailureCause, StartError
from sparsed.engine.cuda_driver import CudaError

MAX_CHUNK_BYTES: Final = 2 * GIB  # of one registration; drivers refuse very large ones
SLICE_BYTES: Final = 64 << 20  # touched by one thread at a time
MAX_THREADS: Final = 16
_PAGE_BYTES: Final = 4096
_MADV_HUGEPAGE: Final = 14  # linux/mman.h
_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14

Progress = Callable[[float], None]


class Registrar(Protocol):
    """What pins memory; ``CudaDriver`` is one."""

    def register(self, address: int, num_bytes: int) -> None: ...
    def unregister(self, address: int) -> None: ...


def pin(
    address: int,
    chunks: Sequence[tuple[int, int]],
    *,
    registrar: Registrar,
    cpus: frozenset[int],
    registered: list[int],
    on_progress: Progress,
) -> None:
    """Touch and register ``chunks``, pairs of offset and bytes from ``address``, one after the
    other; threads on ``cpus`` touch the next ones while one is registered. Contents stay.

    Fills ``registered`` with the addresses to unregister. Errors: StartError naming what is
    short. An exception from ``on_progress`` ends it, and passes through.
    """
    total = sum(size for _, size in chunks)
    done = 0
    _wish_for_huge_pages(address, total)
    with _touching(address, chunks, cpus=cpus) as touched:
        for (offset, size), slices in zip(chunks, touched, strict=True):
            for part in slices:
                part.result()
            _register(registrar, address + offset, size, pinned=done, total=total)
            registered.append(address + offset)
            done += size
            on_progress(done / total)


def frame_chunks(
    num_bytes: int, *, frame_bytes: int, max_bytes: int = MAX_CHUNK_BYTES
) -> tuple[tuple[int, int], ...]:
    """Offsets and bytes of registrations that end on frame boundaries: no copy of a piece of a
    frame may touch two of them."""
    step = max(max_bytes // frame_bytes, 1) * frame_bytes
    return tuple((offset, min(step, num_bytes - offset)) for offset in range(0, num_bytes, step))


def cpus_near(pci_id: str | None, *, root: Path = Path("/")) -> frozenset[int]:
    """CPUs this process may use on the node of a PCI device; all it may use where the machine
    names no node, or none of its CPUs is allowed."""
    allowed = frozenset(os.sched_getaffinity(0))
    if pci_id is None:
        return allowed
    try:
        node = int((root / f"sys/bus/pci/devices/{pci_id}/numa_node").read_text())
        text = (root / f"sys/devices/system/node/node{node}/cpulist").read_text()
    except (OSError, ValueError):  # no such device, or node -1
        return allowed
    return (allowed & _parse_cpus(text)) or allowed


def check_memory(num_bytes: int, *, allocated_bytes: int, root: Path = Path("/")) -> None:
    """StartError if the machine has less memory free than is still to be touched."""
    free = _free_bytes(root)
    if free is not None and num_bytes - allocated_bytes > free:
        raise StartError(
            f"the DRAM tier takes {num_bytes / GIB:.1f} GiB and {free / GIB:.1f} GiB of memory "
            "are free: lower kv_dram_gib or free memory",
            code=ExitCode.UNAVAILABLE,
            cause=FailureCause.HOST_MEMORY,
        )


def _register(registrar: Registrar, address: int, size: int, *, pinned: int, total: int) -> None:
    try:
        registrar.register(address, size)
    except CudaError as error:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        cause = "lower kv_dram_gib or free memory"
        if 0 <= limit < total:
            cause = (
                f"the memlock limit is {limit / GIB:.3g} GiB: raise it (ulimit -l unlimited, "
                "LimitMEMLOCK=infinity) or lower kv_dram_gib"
            )
        raise StartError(
            f"cannot pin the DRAM tier beyond {pinned / GIB:.1f} of {total / GIB:.1f} GiB "
            f"({error}): {cause}",
            code=ExitCode.UNAVAILABLE,
            cause=FailureCause.HOST_MEMORY,
        ) from error


@contextlib.contextmanager
def _touching(
    address: int, chunks: Sequence[tuple[int, int]], *, cpus: frozenset[int]
) -> Iterator[list[list[Future[None]]]]:
    """For every chunk the slices of it that threads are touching, in order."""
    threads = ThreadPoolExecutor(
        max_workers=min(len(cpus), MAX_THREADS),
        thread_name_prefix="touch",
        initializer=os.sched_setaffinity,  # of the calling thread
        initargs=(0, cpus),
    )
    try:
        yield [
            [
                threads.submit(touch, address + start, min(SLICE_BYTES, offset + size - start))
                for start in range(offset, offset + size, SLICE_BYTES)
            ]
            for offset, size in chunks
        ]
    finally:
        threads.shutdown(cancel_futures=True)


def _wish_for_huge_pages(address: int, num_bytes: int) -> None:
    """The kernel may not have them for this memory; it says so, and that is all right."""
    ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), _MADV_HUGEPAGE)


def touch(address: int, num_bytes: int) -> None:
    """Give the pages of a range their memory, near the CPU that runs this; contents stay."""
    first = address // _PAGE_BYTES * _PAGE_BYTES
    size = address + num_bytes - first
    libc = ctypes.CDLL(None)
    place = ctypes.c_void_p(first), ctypes.c_size_t(size)
    if libc.madvise(*place, _MADV_POPULATE_WRITE) != 0:  # an older kernel
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        pages = np.ctypeslib.as_array(memory)[::_PAGE_BYTES]
        np.bitwise_or(pages, 0, out=pages)


def _parse_cpus(text: str) -> frozenset[int]:
    """``0-3,8`` as numbers."""
    ranges = (part.partition("-") for part in text.strip().split(",") if part)
    return frozenset(
        cpu for low, _, high in ranges for cpu in range(int(low), int(high or low) + 1)
    )


def _free_bytes(root: Path) -> int | None:
    """Memory that can be had without swapping; None: not known. The control group's limit has
    been seen to where the pool was sized."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = (line.partition(":") for line in lines)
    kib = next((rest.split()[0] for name, _, rest in fields if name == "MemAvailable"), None)
    return None if kib is None else int(kib) << 10
