"""Verdicts: one window for every rule, what is stale or missing, and anything at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from enum import StrEnum
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsed.core import (
    Bound,
    Ceilings,
    HostGauges,
    Knobs,
    Snapshot,
    Verdict,
    WaitCount,
    WaitReason,
)
from sparsed.profiler.verdict import (
    BUSY_SHARE,
    CAPACITY_WORDS,
    CORES_SHARE,
    EXPLAINED_SHARE,
    EXPOSED_SHARE,
    GPU_SHARE,
    HOST_SHARE,
    LINK_SHARE,
    fresh,
    judge,
)
from sparsed.profiler.window import STALE_S

NOW = 1000.0
LINK = 50e9  # bytes/s
HOST = HostGauges(
    process_cpu_frac=1.0,
    host_cpu_frac=0.2,
    gpu_util_frac=0.95,
    pcie_h2d_bytes_per_s=1e9,
    read_at=NOW,
)
BUSY = Snapshot(
    ended_at=NOW - 0.5,
    window_s=1.0,
    steps=100,
    step_s=1.0,
    step_p50_s=0.01,
    step_p95_s=0.01,
    step_p99_s=0.01,
    prompt_tokens_per_s=0.0,
    generated_tokens_per_s=800.0,
    hot_hit_frac=0.99,
    misses_per_step=1.0,
    miss_bytes_per_step=1e7,
    h2d_bytes=1_000_000_000,
    d2h_bytes=0,
    h2d_gb_per_s=None,
    d2h_gb_per_s=None,
    attention_recall=None,
    num_running=8,
    num_waiting=0,
    hot_used_frac=0.8,
    dram_used_frac=0.4,
    working_set_pages=0,
    working_set_bytes=0,
    metadata_bytes=0,
    requests_finished=0,
    host=HOST,
    exposed_s_per_step=0.0005,
)
GPU = Ceilings(
    num_cpus=16,
    is_gpu=True,
    h2d_bytes_per_s=LINK,
    floor_hbm_s=0.006,
    floor_compute_s=0.001,
    floor_latency_s=0.002,
)
CPU = Ceilings(num_cpus=4, is_gpu=False, h2d_bytes_per_s=10e9)
CPU_HOST = HostGauges(process_cpu_frac=3.6, host_cpu_frac=0.95, read_at=NOW)
ON_CPU = replace(BUSY, host=CPU_HOST)


def host(**changes: Any) -> HostGauges:
    return replace(HOST, **changes)


def waiting(*reasons: WaitReason) -> dict[str, Any]:
    counts = tuple(WaitCount(reason=one, count=3 - i) for i, one in enumerate(reasons))
    return {"waiting": counts, "num_waiting": sum(one.count for one in counts)}


def verdict(window: Snapshot, ceilings: Ceilings = GPU, *, now: float = NOW) -> Verdict:
    return judge([window], ceilings, now=now)


@pytest.mark.parametrize(
    ("window", "ceilings", "bound", "share"),
    [
        (BUSY, GPU, Bound.HBM, 0.6),
        (BUSY, replace(GPU, floor_compute_s=0.007), Bound.COMPUTE, 0.7),
        (BUSY, replace(GPU, floor_latency_s=0.0065), Bound.LATENCY, 0.65),
        (
            replace(BUSY, exposed_s_per_step=0.0029),
            replace(GPU, floor_hbm_s=0.002),
            Bound.LINK,
            0.29,
        ),
        (replace(BUSY, h2d_bytes=int(LINK * LINK_SHARE)), GPU, Bound.LINK, LINK_SHARE),
        (replace(BUSY, exposed_s_per_step=0.01 * EXPOSED_SHARE), GPU, Bound.LINK, EXPOSED_SHARE),
        (replace(BUSY, **waiting(WaitReason.LINK)), GPU, Bound.LINK, 0.02),
        (replace(BUSY, **waiting(WaitReason.HOT_TIER)), GPU, Bound.CAPACITY, 0.8),
        (replace(BUSY, **waiting(WaitReason.SPILLED)), GPU, Bound.CAPACITY, 0.8),
        (replace(BUSY, **waiting(WaitReason.DRAM_TIER)), GPU, Bound.CAPACITY, 0.4),
        (replace(BUSY, **waiting(WaitReason.ACTIVE_LIMIT)), GPU, Bound.CAPACITY, None),
        (replace(BUSY, **waiting(WaitReason.PROMPTS)), GPU, Bound.HBM, 0.6),
        (replace(BUSY, host=host(gpu_util_frac=GPU_SHARE - 0.1)), GPU, Bound.HOST, GPU_SHARE - 0.1),
        (replace(BUSY, step_s=BUSY_SHARE - 0.1), GPU, Bound.HOST, BUSY_SHARE - 0.1),
        (replace(BUSY, step_s=0.2, num_running=0), GPU, Bound.IDLE, 0.2),
        (replace(BUSY, step_s=0.0, steps=0, num_running=0), GPU, Bound.IDLE, 0.0),
        (ON_CPU, CPU, Bound.COMPUTE, 0.9),
        (
            replace(ON_CPU, host=replace(CPU_HOST, process_cpu_frac=1.0)),
            CPU,
            Bound.HOST,
            0.7,
        ),
    ],
)
def test_every_bound_has_its_window(
    window: Snapshot, ceilings: Ceilings, bound: Bound, share: float | None
) -> None:
    found = verdict(window, ceilings)
    assert found.bound is bound
    assert found.share == pytest.approx(share)


@pytest.mark.parametrize(
    "window",
    [
        replace(BUSY, h2d_bytes=int(LINK * (LINK_SHARE - 0.01))),
        replace(BUSY, exposed_s_per_step=0.01 * (EXPOSED_SHARE - 0.01)),
        replace(BUSY, host=host(gpu_util_frac=GPU_SHARE)),
        replace(BUSY, step_s=BUSY_SHARE, steps=50),
        replace(BUSY, host=host(host_cpu_frac=HOST_SHARE - 0.01)),
        replace(BUSY, host=host(host_cpu_frac=HOST_SHARE, process_cpu_frac=8.0)),
    ],
)
def test_under_its_threshold_no_rule_holds(window: Snapshot) -> None:
    assert verdict(window).bound is Bound.HBM


def test_one_of_three_windows_with_waiting_requests_is_not_most() -> None:
    full = replace(BUSY, **waiting(WaitReason.HOT_TIER))
    assert judge([BUSY, BUSY, full], GPU, now=NOW).bound is Bound.HBM
    found = judge([BUSY, full, full], GPU, now=NOW)
    assert (found.bound, found.limit) == (Bound.CAPACITY, WaitReason.HOT_TIER)
    assert CAPACITY_WORDS[WaitReason.HOT_TIER] in found.reason


def test_a_turn_is_a_wait_for_what_the_oldest_waits_for() -> None:
    found = verdict(replace(BUSY, **waiting(WaitReason.TURN, WaitReason.DRAM_TIER)))
    assert found.limit is WaitReason.DRAM_TIER


def test_traffic_of_others_binds_the_link_and_is_named() -> None:
    found = verdict(replace(BUSY, host=host(pcie_h2d_bytes_per_s=45e9)))
    assert found.bound is Bound.LINK
    assert found.share == pytest.approx(0.9)
    assert "88% of the rate not by this engine's copies" in found.reason


def test_the_numbers_stand_beside_the_verdict() -> None:
    found = verdict(BUSY)
    numbers = {item.name: (item.value, item.unit) for item in found.evidence}
    assert numbers["mean step"] == (0.01, "s")
    assert numbers["loaded over the link"] == (1.0, "GB/s")
    assert numbers["calibrated rate of the link"] == (50.0, "GB/s")
    assert numbers["link in use"] == (0.02, "share")
    assert numbers["HBM-bound part of a step"][0] == pytest.approx(0.6)
    assert (found.age_s, found.num_windows, found.left_out) == (0.5, 1, ())


def test_stale_windows_are_dropped_and_told() -> None:
    old = replace(BUSY, ended_at=NOW - STALE_S - 0.1, h2d_bytes=int(LINK))
    assert judge([old, BUSY], GPU, now=NOW) == replace(
        verdict(BUSY), left_out=("1 window over 3 s old",)
    )
    silent = judge([old, old], GPU, now=NOW)
    assert (silent.bound, silent.evidence) == (Bound.UNKNOWN, ())
    assert "silent" in silent.reason
    assert silent.left_out == ("2 windows over 3 s old",)


def test_without_any_window_there_is_no_verdict() -> None:
    found = judge([], GPU, now=NOW)
    assert (found.bound, found.reason) == (Bound.UNKNOWN, "the engine has not reported yet")


def test_the_clock_may_be_set_back_a_little_and_not_much() -> None:
    assert fresh([BUSY], now=BUSY.ended_at - STALE_S) == (BUSY,)
    assert fresh([BUSY], now=BUSY.ended_at - STALE_S - 0.1) == ()
    assert verdict(BUSY, now=BUSY.ended_at - 1).age_s == 0.0


def test_what_is_absent_is_said_and_is_no_zero() -> None:
    bare = replace(BUSY, host=HostGauges(), exposed_s_per_step=None)
    found = verdict(bare, Ceilings(num_cpus=16, is_gpu=True))
    assert found.bound is Bound.UNKNOWN
    assert found.left_out == (
        "calibrated rate of the link",
        "timed step that fetches in these windows",
        "PCIe counter of the GPU",
        "utilisation of the GPU",
        "gauges of the host",
        "rates of this GPU's memory and products",
    )
    assert all(gap in found.reason for gap in found.left_out)
    names = {item.name for item in found.evidence}
    assert not names & {"link in use", "GPU busy", "cores busy", "waits for pages in a step"}


def test_a_step_that_bytes_and_rates_do_not_explain_is_unknown() -> None:
    tiny = replace(BUSY, exposed_s_per_step=0.0)
    little = replace(GPU, floor_compute_s=0.0, floor_latency_s=0.0)
    least = 0.01 * EXPLAINED_SHARE
    assert verdict(tiny, replace(little, floor_hbm_s=least * 1.01)).bound is Bound.HBM
    assert verdict(tiny, replace(little, floor_hbm_s=least * 0.99)).bound is Bound.UNKNOWN


def test_a_cpu_that_is_not_busy_is_unknown() -> None:
    spare = replace(CPU_HOST, process_cpu_frac=4 * CORES_SHARE - 0.1, host_cpu_frac=0.8)
    assert verdict(replace(ON_CPU, host=spare), CPU).bound is Bound.UNKNOWN


def anything(hint: Any) -> st.SearchStrategy[Any]:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is NoneType or hint is Knobs:
        return st.none()
    if origin in (Union, UnionType):
        return st.one_of(*(anything(part) for part in parts))
    if origin is tuple:
        return st.lists(anything(parts[0]), max_size=2).map(tuple)
    if origin is Mapping:
        return st.just({})
    if issubclass(hint, StrEnum):
        return st.sampled_from(list(hint))
    if is_dataclass(hint) and isinstance(hint, type):
        kinds = get_type_hints(hint)
        return st.builds(hint, **{item.name: anything(kinds[item.name]) for item in fields(hint)})
    return {
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.one_of(st.floats(), st.floats(0, 1)),
    }[hint]


ANY_WINDOW = st.builds(
    lambda window, ended_at: replace(window, ended_at=ended_at),
    anything(Snapshot),
    st.one_of(st.floats(NOW - 4, NOW + 4), st.floats()),
)


@settings(max_examples=300)
@given(st.lists(ANY_WINDOW, max_size=3), anything(Ceilings), st.one_of(st.just(NOW), st.floats()))
def test_a_verdict_never_raises(windows: list[Snapshot], ceilings: Ceilings, now: float) -> None:
    found = judge(windows, ceilings, now=now)
    assert found.reason
    assert all(isfinite(item.value) for item in found.evidence)
    assert (found.num_windows == 0) == (found.age_s is None)
