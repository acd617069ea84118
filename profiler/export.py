"""Prometheus text. The names are a promise: ``tests/profiler/metric_names.txt`` holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from sparsed.core import (
    CopyTotal,
    EngineStats,
    HbmUse,
    HostGauges,
    LinkProbe,
    RefusalCount,
    Slo,
    Snapshot,
    WaitCount,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TPOT_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadMetrics:
    """The load as the live tuner sees it. ``regime_id``: of the one in force, None before the
    first; ``num_verified``: regimes with an incumbent; ``loss_frac``: of the goodput that was to be
    expected, None before anything is. ``num_reverts``: how often it took back what was in force;
    ``revert_s``: of all of these, from the decision until the engine had the values before."""

    regime_id: int | None = None
    num_regimes: int = 0
    num_verified: int = 0
    loss_frac: float | None = None
    has_drifted: bool = False
    num_reverts: int = 0
    revert_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Telemetry:
    """What a scrape shows. ``snapshot`` None: no report is fresh, so gauges are left out."""

    totals: EngineStats
    snapshot: Snapshot | None = None
    link: LinkProbe | None = None
    engine_restarts: int = 0
    requests_failed: int = 0
    store_lost_writes: int = 0
    labels: dict[str, str] = field(default_factory=dict)  # of sparsed_info
    load: LoadMetrics = field(default_factory=LoadMetrics)


class Exporter:
    """Metrics in a registry of its own. ``read`` is asked at every scrape; histograms are fed
    by ``observe_*``. The histograms have an edge at each target of ``slo``. Thread-safe as far
    as ``read`` is."""

    def __init__(self, read: Callable[[], Telemetry], *, slo: Slo | None = None) -> None:
        slo = slo or Slo()
        self._registry = CollectorRegistry()
        self._ttft = self._histogram(
            "sparsed_time_to_first_token_seconds",
            "Time from a request's arrival to its first token.",
            _with_edge(TTFT_BUCKETS_S, slo.ttft_s),
        )
        self._tpot = self._histogram(
            "sparsed_time_per_output_token_seconds",
            "Mean time of a finished request's tokens after the first.",
            _with_edge(TPOT_BUCKETS_S, slo.tpot_s),
        )
        self._step = self._histogram(
            "sparsed_step_seconds", "Duration of an engine step.", STEP_BUCKETS_S
        )
        self._registry.register(_TelemetryCollector(read))

    def observe_request(self, *, ttft_s: float, tpot_s: float | None) -> None:
        self._ttft.observe(ttft_s)
        if tpot_s is not None:
            self._tpot.observe(tpot_s)

    def observe_steps(self, step_s: Iterable[float]) -> None:
        for duration_s in step_s:
            self._step.observe(duration_s)

    def render(self) -> bytes:
        """The exposition text, of type ``CONTENT_TYPE``."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, buckets_s: Iterable[float]) -> Histogram:
        return Histogram(name, text, buckets=tuple(buckets_s), registry=self._registry)


class _TelemetryCollector:
    def __init__(self, read: Callable[[], Telemetry]) -> None:
        self._read = read

    def describe(self) -> Iterator[Metric]:
        return iter(())  # registering must not ask ``read`` before the daemon is up

    def collect(self) -> Iterator[Metric]:
        telemetry = self._read()
        yield _gauge("info", "What is running.", 1, telemetry.labels)
        yield from _counters(telemetry)
        yield from _load_metrics(telemetry.load)
        if telemetry.link is not None:
            yield _by_direction(
                "link_capacity_bytes_per_second",
                "Rate between the tiers, measured at start.",
                h2d=telemetry.link.h2d_bytes_per_s,
                d2h=telemetry.link.d2h_bytes_per_s,
            )
        if telemetry.snapshot is not None:
            yield from _engine_gauges(telemetry.snapshot)
            yield from _host_gauges(telemetry.snapshot.host)
            yield from _hbm_gauges(telemetry.snapshot.hbm)


def _counters(telemetry: Telemetry) -> Iterator[Metric]:
    totals = telemetry.totals
    for name, text, value in (
        ("engine_steps", "Engine steps.", totals.steps),
        ("prompt_tokens", "Prompt tokens computed.", totals.prompt_tokens),
        ("generation_tokens", "Tokens generated.", totals.generated_tokens),
        ("requests_finished", "Requests that ended.", totals.requests_finished),
        ("requests_failed", "Requests that ended with an error.", telemetry.requests_failed),
        ("kv_hot_hits", "Selected pages found in the hot tier.", totals.hot_hits),
        ("kv_hot_misses", "Selected pages fetched from the DRAM tier.", totals.hot_misses),
        ("kv_foreseen_pages", "Pages fetched a layer ahead.", totals.foreseen_pages),
        ("kv_wasted_pages", "Of these, pages that were not selected.", totals.wasted_pages),
        ("kv_exposed_seconds", "Waits for pages in timed steps.", totals.exposed_s),
        ("kv_timed_steps", "Steps whose waits for pages were timed.", totals.timed_steps),
        (
            "kv_evicted_pages",
            "Pages of running requests dropped from the hot tier.",
            totals.evicted_pages,
        ),
        ("kv_overflow_pages", "Selected pages attended in passes.", totals.overflow_pages),
        ("h2d_bytes", "Bytes copied into the hot tier.", totals.h2d_bytes),
        (
            "h2d_seconds",
            "Seconds copies into the hot tier were under way, those in CUDA graphs from a sample.",
            totals.h2d_s,
        ),
        ("d2h_bytes", "Bytes copied into the DRAM tier.", totals.d2h_bytes),
        (
            "d2h_seconds",
            "Seconds copies into the DRAM tier were under way, CUDA graphs not counted.",
            totals.d2h_s,
        ),
        ("kv_verified_pages", "Pages hashed again after a copy.", totals.verify_checked_pages),
        ("kv_verify_mismatches", "Pages that differed after a copy.", totals.verify_mismatches),
        ("spills", "Running requests that gave up their hot pages.", totals.spills),
        ("restores", "Requests that came back after that.", totals.restores),
        ("quality_raises", "Token budgets raised for low recall.", totals.quality_raises),
        ("quality_dense", "Requests made dense for low recall.", totals.quality_dense),
        ("engine_restarts", "Engine processes started again.", telemetry.engine_restarts),
        ("store_lost_writes", "Rows the store could not keep.", telemetry.store_lost_writes),
    ):
        yield CounterMetricFamily(f"sparsed_{name}", text, value=value)
    yield from _copies(totals.copies)
    yield _by_reason("waits", "Requests that began to wait, by reason.", totals.waits)
    yield _by_reason("refusals", "Requests ended without a token.", totals.refusals)


def _by_reason(name: str, text: str, counts: Iterable[WaitCount | RefusalCount]) -> Metric:
    family = CounterMetricFamily(f"sparsed_request_{name}", text, labels=["reason"])
    for item in counts:
        family.add_metric([item.reason], item.count)
    return family


def _copies(copies: Iterable[CopyTotal]) -> Iterator[Metric]:
    labels = ["direction", "path"]
    num_bytes = CounterMetricFamily(
        "sparsed_copied_bytes",
        "Bytes copied between the tiers, by the way they took.",
        labels=labels,
    )
    seconds = CounterMetricFamily(
        "sparsed_copied_seconds",
        "Seconds such copies were under way; see h2d_seconds and d2h_seconds.",
        labels=labels,
    )
    for item in copies:
        num_bytes.add_metric([item.direction, item.path], item.num_bytes)
        seconds.add_metric([item.direction, item.path], item.seconds)
    yield from (num_bytes, seconds)


def _engine_gauges(snapshot: Snapshot) -> Iterator[Metric]:
    for name, text, value in (
        ("requests_running", "Requests in the batch.", snapshot.num_running),
        ("requests_waiting", "Requests in the queue.", snapshot.num_waiting),
        ("kv_hot_usage_ratio", "Share of the hot tier in use.", snapshot.hot_used_frac),
        ("host_cache_usage_ratio", "Share of the DRAM tier in use.", snapshot.dram_used_frac),
        ("kv_working_set_pages", "Pages used in the newest 12 steps.", snapshot.working_set_pages),
        ("kv_working_set_bytes", "Bytes of these pages.", snapshot.working_set_bytes),
        ("kv_metadata_bytes", "Summaries of pages in use.", snapshot.metadata_bytes),
        ("kv_misses_per_step", "Mean pages fetched in a step.", snapshot.misses_per_step),
        ("attention_recall", "Attention mass on the tokens read.", snapshot.attention_recall),
        ("last_report_timestamp_seconds", "Time of the engine's last report.", snapshot.ended_at),
    ):
        yield _gauge(name, text, value)
    knobs = snapshot.knobs.as_dict() if snapshot.knobs else {}
    family = GaugeMetricFamily("sparsed_knob", "Knob values that are numbers.", labels=["knob"])
    for knob, setting in knobs.items():
        if isinstance(setting, int | float):
            family.add_metric([knob], setting)
    yield family


def _load_metrics(load: LoadMetrics) -> Iterator[Metric]:
    for name, text, total in (
        ("tuner_reverts", "Changes of the live tuner that were undone.", load.num_reverts),
        ("tuner_revert_seconds", "From these decisions until it was done.", load.revert_s),
    ):
        yield CounterMetricFamily(f"sparsed_{name}", text, value=total)
    for name, text, value in (
        ("tuner_regime", "Number of the regime in force.", load.regime_id),
        ("tuner_regimes", "Regimes that are known.", load.num_regimes),
        ("tuner_regimes_verified", "Of these, with an incumbent.", load.num_verified),
        ("tuner_loss_ratio", "Goodput lost against what was expected.", load.loss_frac),
        ("tuner_drift", "1 if measurements no longer hold.", int(load.has_drifted)),
    ):
        yield _gauge(name, text, value)


def _host_gauges(host: HostGauges) -> Iterator[Metric]:
    for name, text, value in (
        ("process_resident_bytes", "Memory of controller and engine.", host.process_rss_bytes),
        ("process_cpu_ratio", "Cores busy in controller and engine.", host.process_cpu_frac),
        ("host_cpu_ratio", "Share of the host's cores busy.", host.host_cpu_frac),
        ("host_free_bytes", "Memory free on the host.", host.host_free_bytes),
        ("gpu_used_bytes", "GPU memory in use, all processes.", host.gpu_used_bytes),
        ("gpu_total_bytes", "GPU memory.", host.gpu_total_bytes),
        ("gpu_utilisation_ratio", "Share of time the GPU was busy.", host.gpu_util_frac),
        ("pcie_generation", "Generation the link runs at.", host.pcie_generation),
        ("pcie_width", "Lanes the link runs at.", host.pcie_width),
    ):
        yield _gauge(name, text, value)
    yield _by_direction(
        "pcie_bytes_per_second",
        "The GPU's own PCIe counters, all processes.",
        h2d=host.pcie_h2d_bytes_per_s,
        d2h=host.pcie_d2h_bytes_per_s,
    )


def _hbm_gauges(use: HbmUse | None) -> Iterator[Metric]:
    family = GaugeMetricFamily(
        "sparsed_hbm_bytes",
        "Device memory by owner; those of the hot tier as planned.",
        labels=["owner"],
    )
    for item in fields(HbmUse):
        is_owner = item.name != "peak_bytes"
        if is_owner and use is not None and (value := getattr(use, item.name)) is not None:
            family.add_metric([item.name.removesuffix("_bytes").replace("_", "-")], value)
    yield family
    yield _gauge(
        "hbm_peak_bytes",
        "Most device memory that the engine has had.",
        use.peak_bytes if use is not None else None,
    )


def _gauge(
    name: str, text: str, value: float | None, labels: dict[str, str] | None = None
) -> Metric:
    """A family without a sample where there is no value; zero is a value."""
    labels = labels or {}
    family = GaugeMetricFamily(f"sparsed_{name}", text, labels=list(labels))
    if value is not None:
        family.add_metric(list(labels.values()), value)
    return family


def _by_direction(name: str, text: str, *, h2d: float | None, d2h: float | None) -> Metric:
    family = GaugeMetricFamily(f"sparsed_{name}", text, labels=["direction"])
    for direction, value in (("h2d", h2d), ("d2h", d2h)):
        if value is not None:
            family.add_metric([direction], value)
    return family


def _with_edge(buckets_s: tuple[float, ...], edge_s: float | None) -> tuple[float, ...]:
    return tuple(sorted({*buckets_s, *([edge_s] if edge_s else [])}))
