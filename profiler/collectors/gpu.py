"""NVML's view of one GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from sparsed.core import HostGauges
from sparsed.profiler.collectors.nvml import MEMORY, NvmlSession
from sparsed.profiler.collectors.pcie import choose_pcie

HANDLE = "nvmlDeviceGetHandleByIndex"


class GpuCollector:
    """Memory, utilisation, PCIe rates, link state and slowdown of GPU ``index`` (the driver's count).

    ``read_pids`` names our processes, to tell their memory from that of others. Use it inside the
    ``open_nvml`` block that gave the session. What the driver does not answer is None, and typed
    where it concerns memory or the link; nothing raises.
    """

    def __init__(
        self,
        nvml: NvmlSession,
        *,
        index: int,
        clock: Callable[[], float],
        read_pids: Callable[[], Iterable[int]],
    ) -> None:
        self._nvml = nvml
        self._read_pids = read_pids
        self._handle = nvml.call(HANDLE, index)
        self._pcie = choose_pcie(nvml, self._handle, clock=clock)

    def fill(self, gauges: HostGauges) -> HostGauges:
        memory = self._nvml.memory(self._handle)
        busy = self._nvml.call("nvmlDeviceGetUtilizationRates", self._handle)
        rates = self._pcie.read()
        shares = self._nvml.process_memory(self._handle, own_pids=self._read_pids())
        return replace(
            gauges,
            gpu_used_bytes=memory.used_bytes if memory else None,
            gpu_total_bytes=memory.total_bytes if memory else None,
            gpu_util_frac=busy.gpu / 100 if busy is not None else None,
            pcie_h2d_bytes_per_s=rates.h2d_bytes_per_s if rates else None,
            pcie_d2h_bytes_per_s=rates.d2h_bytes_per_s if rates else None,
            pcie_interval_s=rates.interval_s if rates else None,
            pcie_counter=self._pcie.counter,
            pcie_fault=None if rates else self._pcie.fault,
            gpu_fault=None if memory else self._nvml.fault(HANDLE, MEMORY),
            gpu_slowdown=self._nvml.slowdown(self._handle),
            pcie_generation=self._nvml.call("nvmlDeviceGetCurrPcieLinkGeneration", self._handle),
            pcie_width=self._nvml.call("nvmlDeviceGetCurrPcieLinkWidth", self._handle),
            gpu_own_bytes=shares.own_bytes if shares else None,
            gpu_others_bytes=shares.others_bytes if shares else None,
        )
