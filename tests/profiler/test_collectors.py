"""Collectors: a driver that offers everything, some of it, or nothing; real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from sparsed.core import GpuSlowdown, HostGauges
from sparsed.profiler.collectors.gauges import open_gauges
from sparsed.profiler.collectors.host import HostCollector
from sparsed.profiler.collectors.nvml import NvmlSession, open_nvml
from sparsed.profiler.collectors.pcie import (
    FieldPcie,
    GpmPcie,
    NoPcie,
    PcieRates,
    ThroughputPcie,
    choose_pcie,
)

MakeNvml = Callable[..., Any]
GIB = 1 << 30
NOT_SUPPORTED, FUNCTION_NOT_FOUND, GPU_LOST = 3, 13, 15


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_missing_call_is_tried_once(make_nvml: MakeNvml) -> None:
    nvml = make_nvml(failing={"nvmlDeviceGetName": FUNCTION_NOT_FOUND})
    session = NvmlSession(nvml)
    assert [session.call("nvmlDeviceGetName", "gpu0") for _ in range(3)] == [None] * 3
    assert nvml.calls["nvmlDeviceGetName"] == 1
    assert session.call("nvmlOfALaterBinding") is None


def test_a_passing_failure_is_tried_again(make_nvml: MakeNvml) -> None:
    nvml = make_nvml(failing={"nvmlDeviceGetName": GPU_LOST})
    session = NvmlSession(nvml)
    assert session.call("nvmlDeviceGetName", "gpu0") is None
    nvml.failing.clear()
    assert session.call("nvmlDeviceGetName", "gpu0") == "Fake H100"


def test_the_session_ends_with_its_block(make_nvml: MakeNvml) -> None:
    nvml = make_nvml()
    with open_nvml(nvml) as session:
        assert session is not None and nvml.open
    assert not nvml.open


def test_without_a_driver_there_is_no_session(make_nvml: MakeNvml) -> None:
    with open_nvml(make_nvml(failing={"nvmlInit": 12})) as session:
        assert session is None


def test_memory_is_read_in_the_version_that_leaves_reserved_memory_out(
    make_nvml: MakeNvml,
) -> None:
    memory = NvmlSession(make_nvml()).memory("gpu0")
    assert memory is not None
    assert (memory.total_bytes, memory.used_bytes) == (80 * GIB, 9 * GIB)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"gpm": True}, GpmPcie),
        ({}, FieldPcie),
        ({"failing": {"nvmlGpmQueryDeviceSupport": FUNCTION_NOT_FOUND}}, FieldPcie),
        ({"failing": {"nvmlDeviceGetFieldValues": NOT_SUPPORTED}}, ThroughputPcie),
        (
            {
                "failing": {
                    "nvmlDeviceGetFieldValues": NOT_SUPPORTED,
                    "nvmlDeviceGetPcieThroughput": NOT_SUPPORTED,
                }
            },
            NoPcie,
        ),
    ],
)
def test_the_best_pcie_counter_on_offer_is_taken(
    make_nvml: MakeNvml, settings: dict[str, Any], expected: type
) -> None:
    source = choose_pcie(NvmlSession(make_nvml(**settings)), "gpu0", clock=Clock())
    assert type(source) is expected


def test_gpm_rates_come_from_two_samples(make_nvml: MakeNvml) -> None:
    nvml, clock = make_nvml(gpm=True), Clock()
    source = GpmPcie(NvmlSession(nvml), "gpu0", clock=clock)
    assert source.read() is None
    nvml.received, nvml.sent, clock.now_s = 5, 2, 1.0
    assert source.read() == PcieRates(5 << 20, 2 << 20, 1.0)
    clock.now_s = 1.01
    assert source.read() is None  # shorter than the counter's own window
    nvml.received, clock.now_s = 6, 2.0
    assert source.read() == PcieRates(1 << 20, 0, 1.0)


def test_field_rates_are_growth_over_time_and_survive_one_wrap(make_nvml: MakeNvml) -> None:
    nvml, clock = make_nvml(), Clock()
    source = FieldPcie(NvmlSession(nvml), "gpu0", clock=clock)
    assert source.read() is None
    nvml.received, nvml.sent, clock.now_s = (1 << 32) - 100, 50, 2.0
    assert source.read() == PcieRates(((1 << 32) - 100) / 2, 25.0, 2.0)
    nvml.received, clock.now_s = 300, 4.0
    assert source.read() == PcieRates(200.0, 0.0, 2.0)


def test_a_wide_field_that_goes_back_was_reset(make_nvml: MakeNvml) -> None:
    nvml, clock = make_nvml(), Clock()
    nvml.received = 1 << 40
    source = FieldPcie(NvmlSession(nvml), "gpu0", clock=clock)
    source.read()
    nvml.received, clock.now_s = 10, 1.0
    assert source.read() is None
    nvml.received, clock.now_s = 30, 2.0
    assert source.read() == PcieRates(20.0, 0.0, 1.0)


def test_throughput_is_in_kilobytes(make_nvml: MakeNvml) -> None:
    nvml = make_nvml()
    nvml.received, nvml.sent = 7, 3
    assert ThroughputPcie(NvmlSession(nvml), "gpu0").read() == PcieRates(7000.0, 3000.0, 0.02)


@pytest.mark.parametrize(
    ("processes", "failing", "expected"),
    [
        ({7: 3 * GIB, 8: GIB, 9: 2 * GIB}, {}, (4 * GIB, 2 * GIB)),
        ({7: 3 * GIB}, {}, (3 * GIB, 0)),
        ({9: 2 * GIB}, {}, None),  # ours under other ids, or not there yet
        ({}, {}, None),
        ({7: 3 * GIB, 9: None}, {}, None),  # the driver keeps it to itself
        ({7: GIB}, {"nvmlDeviceGetComputeRunningProcesses": NOT_SUPPORTED}, None),
        ({7: GIB}, {"nvmlDeviceGetGraphicsRunningProcesses": NOT_SUPPORTED}, (GIB, 0)),
    ],
)
def test_memory_of_others_is_told_apart_where_the_driver_tells(
    make_nvml: MakeNvml,
    processes: dict[int, int | None],
    failing: dict[str, int],
    expected: tuple[int, int] | None,
) -> None:
    nvml = make_nvml(failing=failing)
    nvml.processes = processes
    assert NvmlSession(nvml).process_memory("gpu0", own_pids=[7, 8]) == expected


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (0x00, None),
        (0x01 | 0x04, None),  # it rests, or is at its power cap
        (0x20, GpuSlowdown.THERMAL),
        (0x08 | 0x40, GpuSlowdown.THERMAL),
        (0x08 | 0x80, GpuSlowdown.POWER_BRAKE),
        (0x08, GpuSlowdown.HARDWARE),
    ],
)
def test_a_slowdown_has_a_reason(
    make_nvml: MakeNvml, bits: int, expected: GpuSlowdown | None
) -> None:
    nvml = make_nvml()
    nvml.clock_events = bits
    with open_gauges(list, gpu_index=0, clock=Clock(), library=nvml) as read:
        assert read().gpu_slowdown is expected


def test_all_gauges_together(make_nvml: MakeNvml) -> None:
    nvml, clock = make_nvml(), Clock()
    with open_gauges(lambda: [os.getpid()], gpu_index=0, clock=clock, library=nvml) as read:
        read()
        nvml.processes = {os.getpid(): 6 * GIB, -1: GIB}
        nvml.sent, clock.now_s = 1000, 1.0
        gauges = read()
    assert gauges.process_rss_bytes is not None and gauges.process_rss_bytes > 1 << 20
    assert gauges.gpu_total_bytes == 80 * GIB
    assert gauges.gpu_util_frac == 0.5
    assert (gauges.gpu_own_bytes, gauges.gpu_others_bytes) == (6 * GIB, GIB)
    assert (gauges.pcie_h2d_bytes_per_s, gauges.pcie_d2h_bytes_per_s) == (0.0, 1000.0)
    assert (gauges.pcie_generation, gauges.pcie_width) == (5, 16)


def test_a_gpu_that_answers_nothing_leaves_gaps(make_nvml: MakeNvml) -> None:
    names = [name for name in dir(type(make_nvml())) if name.startswith("nvmlDeviceGet")]
    nvml = make_nvml(failing=dict.fromkeys(names, GPU_LOST))
    with open_gauges(list, gpu_index=0, clock=Clock(), library=nvml) as read:
        gauges = read()
    assert gauges.gpu_used_bytes is None
    assert gauges.process_rss_bytes is None
    assert gauges.host_free_bytes is not None


def test_a_cpu_machine_reads_no_gpu(make_nvml: MakeNvml) -> None:
    nvml = make_nvml()
    with open_gauges(list, gpu_index=None, clock=Clock(), library=nvml) as read:
        assert read().gpu_total_bytes is None
    assert "nvmlDeviceGetHandleByIndex" not in nvml.calls


def test_processes_are_followed_as_they_come_and_go() -> None:
    command = [sys.executable, "-c", "input()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE)
    pids = [os.getpid(), child.pid]
    collector = HostCollector(lambda: pids)
    alone = HostCollector(lambda: [os.getpid()])
    first, single = collector.fill(HostGauges()), alone.fill(HostGauges())
    assert first.process_cpu_frac is None
    assert first.process_rss_bytes is not None and single.process_rss_bytes is not None
    assert first.process_rss_bytes > single.process_rss_bytes
    child.communicate(b"\n")
    second = collector.fill(HostGauges())
    assert second.process_cpu_frac is not None
    assert second.process_rss_bytes is not None
    assert second.process_rss_bytes < first.process_rss_bytes
