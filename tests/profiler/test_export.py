"""The Prometheus text: golden names, zeros shown, stale gauges left out, buckets at targets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sparsed.core import (
    CopyPath,
    CopyTotal,
    Direction,
    EngineStats,
    HostGauges,
    Knobs,
    LinkProbe,
    RefusalCount,
    RefusalReason,
    Slo,
    WaitCount,
    WaitReason,
)
from sparsed.profiler.export import Exporter, Telemetry
from sparsed.profiler.window import Window

GOLDEN = Path(__file__).parent / "metric_names.txt"
DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
KNOBS = Knobs(
    token_budget=1024,
    hbm_budget=None,
    max_num_active_seqs=4,
    prefill_chunk=512,
    page_size=32,
    sparse_method="cuboid-mean",
    dense_layers=0,
    max_num_seqs=8,
    kv_hbm_gib=0.5,
    kv_dram_gib=2.0,
    max_model_len=8192,
)


def telemetry(**changes: object) -> Telemetry:
    window = Window(clock=iter([0.0, 1.0, 1.5]).__next__)
    copy = {"direction": Direction.H2D, "path": CopyPath.KERNEL}
    stats = EngineStats(
        steps=7,
        hot_misses=14,
        wasted_pages=3,
        exposed_s=0.25,
        timed_steps=2,
        h2d_bytes=4096,
        copies=(CopyTotal(num_bytes=4096, seconds=0.5, **copy),),
        waits=(WaitCount(reason=WaitReason.LINK, count=3),),
        refusals=(RefusalCount(reason=RefusalReason.INVALID, count=2),),
        recall_sum=0.9,
        recall_samples=1,
        working_set_bytes=1 << 20,
        metadata_bytes=1 << 10,
        knobs=KNOBS,
    )
    host = HostGauges(process_rss_bytes=10, gpu_used_bytes=20, pcie_d2h_bytes_per_s=30.0)
    window.close(stats, ended_at=5.0, host=host)
    values: dict[str, object] = {
        "totals": window.totals,
        "snapshot": window.latest(),
        "link": LinkProbe(h2d_bytes_per_s=2.0, d2h_bytes_per_s=3.0),
        "labels": {"version": "0.1.0", "model": "m", "device": "cpu"},
    }
    return Telemetry(**(values | changes))  # type: ignore[arg-type]  # a test's keyword bag


def samples(text: bytes) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_names_are_the_promised_ones() -> None:
    text = Exporter(lambda: telemetry()).render().decode()
    families = [line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE")]
    assert [" ".join(family) for family in families] == GOLDEN.read_text().splitlines()


def test_all_of_them_are_documented() -> None:
    names = {line.split()[0] for line in GOLDEN.read_text().splitlines()}
    documented = set(re.findall(r"`(sparsed_\w+)`", DOCUMENT.read_text()))
    assert documented == names


def test_values_reach_the_text_and_zero_is_a_value() -> None:
    found = samples(Exporter(lambda: telemetry(engine_restarts=2)).render())
    assert found["sparsed_engine_steps_total", ()] == 7
    assert found["sparsed_h2d_bytes_total", ()] == 4096
    assert found["sparsed_engine_restarts_total", ()] == 2
    assert found["sparsed_kv_hot_hits_total", ()] == 0
    assert found["sparsed_kv_wasted_pages_total", ()] == 3
    assert found["sparsed_kv_exposed_seconds_total", ()] == 0.25
    assert found["sparsed_kv_timed_steps_total", ()] == 2
    assert found["sparsed_requests_running", ()] == 0
    assert found["sparsed_attention_recall", ()] == 0.9
    assert found["sparsed_kv_working_set_bytes", ()] == 1 << 20
    assert found["sparsed_kv_metadata_bytes", ()] == 1 << 10
    assert found["sparsed_kv_misses_per_step", ()] == 2
    assert found["sparsed_copied_bytes_total", ("h2d", "kernel")] == 4096
    assert found["sparsed_copied_seconds_total", ("h2d", "kernel")] == 0.5
    assert found["sparsed_link_capacity_bytes_per_second", ("d2h",)] == 3
    assert found["sparsed_pcie_bytes_per_second", ("d2h",)] == 30
    assert ("sparsed_pcie_bytes_per_second", ("h2d",)) not in found
    assert found["sparsed_knob", ("token_budget",)] == 1024
    assert ("sparsed_knob", ("hbm_budget",)) not in found


def test_without_a_fresh_report_counters_stay_and_gauges_go() -> None:
    found = samples(Exporter(lambda: telemetry(snapshot=None)).render())
    assert found["sparsed_engine_steps_total", ()] == 7
    assert ("sparsed_requests_running", ()) not in found


def test_building_an_exporter_asks_for_nothing() -> None:
    def read() -> Telemetry:
        raise AssertionError("asked before the first scrape")

    exporter = Exporter(read)
    with pytest.raises(AssertionError):
        exporter.render()


def test_histograms_have_an_edge_at_the_target() -> None:
    exporter = Exporter(lambda: telemetry(), slo=Slo(ttft_s=0.333, tpot_s=0.05))
    exporter.observe_request(ttft_s=0.3, tpot_s=None)
    exporter.observe_request(ttft_s=0.4, tpot_s=0.02)
    exporter.observe_steps((0.004, 0.02))
    found = samples(exporter.render())
    assert found["sparsed_time_to_first_token_seconds_bucket", ("0.333",)] == 1
    assert found["sparsed_time_per_output_token_seconds_bucket", ("0.05",)] == 1
    assert found["sparsed_time_per_output_token_seconds_count", ()] == 1
    assert found["sparsed_step_seconds_sum", ()] == pytest.approx(0.024)
