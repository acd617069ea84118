"""How much of a GPU's memory is in use, all its users together. Never loads torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sparsed.profiler.collectors.nvml import NvmlLibrary, open_nvml


@contextmanager
def open_device_memory(
    gpu_index: int | None, *, library: NvmlLibrary | None = None
) -> Iterator[Callable[[], float | None]]:
    """A reader of the share in use, for the length of the block; it does not block.

    ``gpu_index`` counts as the driver does; None: there is no GPU. ``library`` None takes the
    driver's. The reader gives None where there is no GPU, no driver, or no answer.
    """
    with open_nvml(library) as nvml:
        if nvml is None or gpu_index is None:
            yield lambda: None
            return
        handle = nvml.call("nvmlDeviceGetHandleByIndex", gpu_index)

        def read() -> float | None:
            memory = nvml.memory(handle) if handle is not None else None
            if memory is None or not memory.total_bytes:
                return None
            return memory.used_bytes / memory.total_bytes

        yield read
