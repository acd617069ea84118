"""What the machine offers, read once at start. Never loads torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import NamedTuple

import psutil

from sparsed.core import MachineFacts
from sparsed.profiler.cgroup import read_memory_limit
from sparsed.profiler.collectors.nvml import NvmlSession, open_nvml


class _Gpu(NamedTuple):
    gpu_name: str | None
    gpu_uuid: str | None
    num_gpus: int
    hbm_total_bytes: int
    hbm_free_bytes: int
    driver_version: str | None
    pcie_generation: int | None = None
    pcie_width: int | None = None


def read_machine(
    *, gpu_index: int = 0, nvml: NvmlSession | None = None, root: Path = Path("/")
) -> MachineFacts:
    """Facts of this machine and of one of its GPUs.

    ``gpu_index`` counts as the driver does, whatever CUDA_VISIBLE_DEVICES says. ``nvml`` None
    opens the driver's library for the length of the call; without a driver there is no GPU.
    Units: bytes. DRAM is cut to the control group's limit. Errors: none.
    """
    if nvml is not None:
        gpu = _read_gpu(nvml, gpu_index)
    else:
        with open_nvml() as session:
            gpu = _read_gpu(session, gpu_index)
    dram = psutil.virtual_memory()
    limit = read_memory_limit(root)
    return MachineFacts(
        cpu_name=_read_cpu_name(root),
        num_cpus=len(os.sched_getaffinity(0)),
        dram_total_bytes=min(dram.total, limit.total_bytes) if limit else dram.total,
        dram_free_bytes=min(dram.available, limit.free_bytes) if limit else dram.available,
        **gpu._asdict(),
    )


def _read_cpu_name(root: Path) -> str:
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()  # ARM kernels name no model


def _read_gpu(nvml: NvmlSession | None, index: int) -> _Gpu:
    num_gpus = (nvml.call("nvmlDeviceGetCount") if nvml else None) or 0
    handle = nvml.call("nvmlDeviceGetHandleByIndex", index) if nvml and index < num_gpus else None
    if nvml is None or handle is None:
        return _Gpu(None, None, num_gpus, 0, 0, None)
    memory = nvml.memory(handle)
    return _Gpu(
        gpu_name=nvml.call("nvmlDeviceGetName", handle),
        gpu_uuid=nvml.call("nvmlDeviceGetUUID", handle),
        num_gpus=num_gpus,
        hbm_total_bytes=memory.total_bytes if memory else 0,
        hbm_free_bytes=memory.free_bytes if memory else 0,
        driver_version=nvml.call("nvmlSystemGetDriverVersion"),
        pcie_generation=nvml.call("nvmlDeviceGetMaxPcieLinkGeneration", handle),
        pcie_width=nvml.call("nvmlDeviceGetMaxPcieLinkWidth", handle),
    )
