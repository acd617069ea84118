"""PCIe rates by the best counter the GPU offers.

Directions are ours: h2d is what the GPU receives (RX), d2h what it sends (TX). These counters see
other tenants of the link too; the engine's own copies stay the truth about sparsed. A rate over
more than ``STALE_S`` (the reader hung, or was switched off) tells nothing of now and is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from sparsed.core import NvmlFault, PcieCounter
from sparsed.profiler.collectors.nvml import NvmlSession
from sparsed.profiler.window import STALE_S

MIN_INTERVAL_S = 0.02  # two samples closer than this say nothing
THROUGHPUT_S = 0.02  # the driver's own window of its last resort
MIB = 1 << 20
WRAP_BYTES = 1 << 32


class PcieRates(NamedTuple):
    """Bytes per second, means of the last ``interval_s``."""

    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    interval_s: float


class PcieSource(Protocol):
    @property
    def counter(self) -> PcieCounter | None: ...

    def read(self) -> PcieRates | None:
        """Rates since the call before; None: no figure (first call, reset, too soon, too late)."""
        ...

    @property
    def fault(self) -> NvmlFault | None:
        """Why the driver gave none the last time; None: it did answer."""
        ...


class NoPcie:
    """A GPU that counts nothing; ``fault`` is why."""

    counter: PcieCounter | None = None

    def __init__(self, fault: NvmlFault | None) -> None:
        self.fault = fault

    def read(self) -> PcieRates | None:
        return None


class GpmPcie:
    """GPM metrics 20 (TX) and 21 (RX), Hopper and later: two samples, MiB per second."""

    counter = PcieCounter.GPM

    def __init__(self, nvml: NvmlSession, handle: object, *, clock: Callable[[], float]) -> None:
        self._nvml = nvml
        self._handle = handle
        self._clock = clock
        self._older = nvml.call("nvmlGpmSampleAlloc")
        self._newer = nvml.call("nvmlGpmSampleAlloc")
        self._sampled_s: float | None = None
        self._bad_metric: NvmlFault | None = None

    def read(self) -> PcieRates | None:
        now_s, before_s = self._clock(), self._sampled_s
        if before_s is not None and now_s - before_s < MIN_INTERVAL_S:
            return None
        self._sampled_s = now_s if self._take_sample() else None
        if self._sampled_s is None or before_s is None or now_s - before_s > STALE_S:
            return None
        return self._rates(now_s - before_s)

    @property
    def fault(self) -> NvmlFault | None:
        return self._bad_metric or self._nvml.fault(
            "nvmlGpmSampleAlloc", "nvmlGpmSampleGet", "nvmlGpmMetricsGet"
        )

    @property
    def works(self) -> bool:
        """Whether the last reading could be taken."""
        return self._sampled_s is not None

    def _take_sample(self) -> bool:
        self._older, self._newer = self._newer, self._older
        if self._older is None or self._newer is None:
            return False
        return self._nvml.call("nvmlGpmSampleGet", self._handle, self._newer) is not None

    def _rates(self, interval_s: float) -> PcieRates | None:
        library = self._nvml.library
        query = library.c_nvmlGpmMetricsGet_t()
        query.version = library.NVML_GPM_METRICS_GET_VERSION
        query.numMetrics = 2
        query.sample1, query.sample2 = self._older, self._newer
        query.metrics[0].metricId = library.NVML_GPM_METRIC_PCIE_RX_PER_SEC
        query.metrics[1].metricId = library.NVML_GPM_METRIC_PCIE_TX_PER_SEC
        self._bad_metric = None
        answer = self._nvml.call("nvmlGpmMetricsGet", query)
        if answer is None:
            return None
        if code := answer.metrics[0].nvmlReturn or answer.metrics[1].nvmlReturn:
            self._bad_metric = self._nvml.typed(code)
            return None
        received, sent = (answer.metrics[index].value * MIB for index in range(2))
        return PcieRates(received, sent, interval_s)


class FieldPcie:
    """Fields 198 (RX) and 197 (TX): cumulative bytes, rates from two stamped readings.

    Their width is not documented. One that goes back from under 2**32 is taken to have wrapped
    once, so a 32-bit counter on a link busy beyond 4.3 GB a reading reads low; one that goes
    back from above 2**32 was reset, which gives no figure.
    """

    counter = PcieCounter.FIELDS

    def __init__(self, nvml: NvmlSession, handle: object, *, clock: Callable[[], float]) -> None:
        self._nvml = nvml
        self._handle = handle
        self._clock = clock
        self._before: tuple[float, int, int] | None = None
        self._bad_field: NvmlFault | None = None

    def read(self) -> PcieRates | None:
        now_s, counts, before = self._clock(), self.counts(), self._before
        if before is not None and now_s - before[0] < MIN_INTERVAL_S:
            return None
        self._before = (now_s, *counts) if counts else None
        if before is None or counts is None or now_s - before[0] > STALE_S:
            return None
        h2d_bytes, d2h_bytes = _growth(before[1], counts[0]), _growth(before[2], counts[1])
        if h2d_bytes is None or d2h_bytes is None:
            return None
        interval_s = now_s - before[0]
        return PcieRates(h2d_bytes / interval_s, d2h_bytes / interval_s, interval_s)

    @property
    def fault(self) -> NvmlFault | None:
        return self._bad_field or self._nvml.fault("nvmlDeviceGetFieldValues")

    def counts(self) -> tuple[int, int] | None:
        """Bytes received and sent since some moment in the past; None: not offered."""
        library = self._nvml.library
        fields = [library.NVML_FI_DEV_PCIE_COUNT_RX_BYTES, library.NVML_FI_DEV_PCIE_COUNT_TX_BYTES]
        self._bad_field = None
        values = self._nvml.call("nvmlDeviceGetFieldValues", self._handle, fields)
        if values is None:
            return None
        if codes := [value.nvmlReturn for value in values if value.nvmlReturn]:
            self._bad_field = self._nvml.typed(codes[0])
            return None
        received, sent = (_integer(library, value) for value in values)
        return received, sent


class ThroughputPcie:
    """The last resort: KB per second over 20 ms, one blocking call a direction; misses bursts."""

    counter = PcieCounter.THROUGHPUT

    def __init__(self, nvml: NvmlSession, handle: object) -> None:
        self._nvml = nvml
        self._handle = handle

    def read(self) -> PcieRates | None:
        library = self._nvml.library
        name = "nvmlDeviceGetPcieThroughput"
        received = self._nvml.call(name, self._handle, library.NVML_PCIE_UTIL_RX_BYTES)
        sent = self._nvml.call(name, self._handle, library.NVML_PCIE_UTIL_TX_BYTES)
        if received is None or sent is None:
            return None
        return PcieRates(received * 1000.0, sent * 1000.0, THROUGHPUT_S)

    @property
    def fault(self) -> NvmlFault | None:
        return self._nvml.fault("nvmlDeviceGetPcieThroughput")


def choose_pcie(nvml: NvmlSession, handle: object, *, clock: Callable[[], float]) -> PcieSource:
    """The best source that answers on this GPU; each is probed once."""
    support = nvml.call("nvmlGpmQueryDeviceSupport", handle)
    if support is not None and support.isSupportedDevice:
        gpm = GpmPcie(nvml, handle, clock=clock)
        gpm.read()
        if gpm.works:  # a container may be denied the samples of a GPU that has them
            return gpm
    fields = FieldPcie(nvml, handle, clock=clock)
    if fields.counts() is not None:
        return fields
    throughput = ThroughputPcie(nvml, handle)
    return throughput if throughput.read() is not None else NoPcie(throughput.fault)


def _growth(before: int, now: int) -> int | None:
    if now >= before:
        return now - before
    return now - before + WRAP_BYTES if before < WRAP_BYTES else None


def _integer(library: Any, field: Any) -> int:
    if field.valueType == library.NVML_VALUE_TYPE_UNSIGNED_INT:
        return int(field.value.uiVal)
    return int(field.value.ullVal)
