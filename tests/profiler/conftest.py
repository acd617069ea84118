"""A driver's library without a driver."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

GIB = 1 << 30
NOT_SUPPORTED, FUNCTION_NOT_FOUND, GPU_LOST = 3, 13, 15


class FakeNvmlError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value


class _Metric(ctypes.Structure):
    _fields_ = (
        ("metricId", ctypes.c_uint),
        ("nvmlReturn", ctypes.c_uint),
        ("value", ctypes.c_double),
    )


class _MetricsGet(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint), ("numMetrics", ctypes.c_uint), ("metrics", _Metric * 4))


class FakeNvml:
    """One GPU. ``failing`` maps a call's name to the error it gives; ``calls`` counts them.

    ``received`` and ``sent`` are the GPU's byte counters; with ``gpm`` they are MiB/s figures.
    """

    NVMLError = FakeNvmlError
    NVML_ERROR_NOT_SUPPORTED = NOT_SUPPORTED
    NVML_ERROR_NO_PERMISSION = 4
    NVML_ERROR_FUNCTION_NOT_FOUND = FUNCTION_NOT_FOUND
    NVML_ERROR_ARGUMENT_VERSION_MISMATCH = 25
    NVML_ERROR_GPU_IS_LOST = GPU_LOST
    NVML_FI_DEV_PCIE_COUNT_TX_BYTES = 197
    NVML_FI_DEV_PCIE_COUNT_RX_BYTES = 198
    NVML_PCIE_UTIL_TX_BYTES = 0
    NVML_PCIE_UTIL_RX_BYTES = 1
    NVML_VALUE_TYPE_UNSIGNED_INT = 1
    NVML_GPM_METRICS_GET_VERSION = 1
    NVML_GPM_METRIC_PCIE_TX_PER_SEC = 20
    NVML_GPM_METRIC_PCIE_RX_PER_SEC = 21
    nvmlMemory_v2 = 2
    c_nvmlGpmMetricsGet_t = _MetricsGet

    def __init__(self, *, gpm: bool = False, failing: dict[str, int] | None = None) -> None:
        self.gpm = gpm
        self.failing = failing or {}
        self.calls: dict[str, int] = {}
        self.open = False
        self.received = 0
        self.clock_events = 0x04  # the power cap
        self.sent = 0
        self.processes: dict[int, int | None] = {}  # device memory by pid

    def __getattribute__(self, name: str) -> Any:
        attribute = object.__getattribute__(self, name)
        return self._counted(name, attribute) if name.startswith("nvml") else attribute

    def _counted(self, name: str, function: Any) -> Any:
        if not callable(function):
            return function

        def call(*arguments: object) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            if name in self.failing:
                raise FakeNvmlError(self.failing[name])
            return function(*arguments)

        return call

    def nvmlInit(self) -> None:
        self.open = True

    def nvmlShutdown(self) -> None:
        self.open = False

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"gpu{index}"

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "Fake H100"

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return "GPU-1234"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int | None = None) -> SimpleNamespace:
        reserved = 0 if version is None else GIB
        return SimpleNamespace(total=80 * GIB, used=10 * GIB - reserved, free=70 * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=n) for pid, n in self.processes.items()]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        return self.nvmlDeviceGetComputeRunningProcesses(handle)[:1]  # one draws as well

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(gpu=50, memory=1)

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: str) -> int:
        return 5

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: str) -> int:
        return 16

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: str) -> int:
        return 5

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: str) -> int:
        return 16

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self.clock_events

    def nvmlGpmQueryDeviceSupport(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(isSupportedDevice=int(self.gpm))

    def nvmlGpmSampleAlloc(self) -> SimpleNamespace:
        return SimpleNamespace(received=0, sent=0)

    def nvmlGpmSampleGet(self, handle: str, sample: SimpleNamespace) -> SimpleNamespace:
        sample.received, sample.sent = self.received, self.sent
        return sample

    def nvmlGpmMetricsGet(self, query: Any) -> Any:
        for metric in query.metrics[: query.numMetrics]:
            name = {20: "sent", 21: "received"}[metric.metricId]
            metric.value = getattr(query.sample2, name) - getattr(query.sample1, name)
        return query

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list[int]) -> list[SimpleNamespace]:
        counts = {197: self.sent, 198: self.received}
        return [
            SimpleNamespace(
                nvmlReturn=0, valueType=3, value=SimpleNamespace(ullVal=counts[field], uiVal=0)
            )
            for field in fields
        ]

    def nvmlDeviceGetPcieThroughput(self, handle: str, counter: int) -> int:
        return self.received if counter == self.NVML_PCIE_UTIL_RX_BYTES else self.sent


@pytest.fixture
def make_nvml() -> Callable[..., FakeNvml]:
    return FakeNvml
