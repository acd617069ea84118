"""All sources of host and GPU gauges, read together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from sparsed.core import HostGauges
from sparsed.profiler.collectors.gpu import GpuCollector
from sparsed.profiler.collectors.host import HostCollector
from sparsed.profiler.collectors.nvml import NvmlLibrary, open_nvml


class Collector(Protocol):
    """One source of truth. Not thread-safe."""

    def fill(self, gauges: HostGauges) -> HostGauges:
        """``gauges`` with this source's fields of now; a field it cannot read stays None."""
        ...


@contextmanager
def open_gauges(
    read_pids: Callable[[], Iterable[int]],
    *,
    gpu_index: int | None,
    clock: Callable[[], float],
    library: NvmlLibrary | None = None,
) -> Iterator[Callable[[], HostGauges]]:
    """A reader of all gauges, for the length of the block.

    ``read_pids`` names our processes, ``gpu_index`` None leaves the GPU out, ``library`` None
    takes the driver's. Call the reader about once a second, always from the same thread and not
    from an event loop: the slowest PCIe counter blocks for 40 ms.
    """
    collectors: list[Collector] = [HostCollector(read_pids)]
    with open_nvml(library) as nvml:
        if nvml is not None and gpu_index is not None:
            collectors.append(GpuCollector(nvml, index=gpu_index, clock=clock, read_pids=read_pids))
        yield lambda: _collect(collectors)


def _collect(collectors: Iterable[Collector]) -> HostGauges:
    gauges = HostGauges()
    for collector in collectors:
        gauges = collector.fill(gauges)
    return gauges
