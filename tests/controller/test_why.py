"""The parts of an explanation brought together, and sources that fall silent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sparsed.controller import telemetry
from sparsed.controller.control import LoadState
from sparsed.controller.startup import StartPlan
from sparsed.controller.telemetry import Senses
from sparsed.controller.why import ceilings, explain
from sparsed.core import (
    AcceptanceDecision,
    AcceptanceRule,
    CopyPath,
    Decision,
    Direction,
    EngineFacts,
    EngineStats,
    HostGauges,
    LinkEntry,
    LinkProbe,
    MachineFacts,
    MemoryPlan,
    RolloutReason,
    RolloutRecord,
    RolloutState,
    Slo,
    Snapshot,
)
from sparsed.db.memory import InMemoryProfileStore
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.profiler.export import Telemetry
from sparsed.profiler.window import STALE_S
from sparsed.tuner.acceptance import decide
from sparsed.tuner.roofline import ENGINE_COSTS

GIB = 1 << 30
H100 = MachineFacts(
    cpu_name="any",
    num_cpus=16,
    dram_total_bytes=128 * GIB,
    dram_free_bytes=120 * GIB,
    gpu_name="NVIDIA H100 80GB HBM3",
    num_gpus=1,
    hbm_total_bytes=80 * GIB,
    hbm_free_bytes=79 * GIB,
)
FACTS = EngineFacts(
    pid=1,
    device_name="any",
    weights_bytes=77,
    load_s=1.0,
    link=LinkProbe(h2d_bytes_per_s=55e9, d2h_bytes_per_s=50e9),
    versions={},
)
WINDOW = Snapshot(
    ended_at=0.0,
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
    h2d_bytes=1_000_000,
    d2h_bytes=0,
    h2d_gb_per_s=None,
    d2h_gb_per_s=None,
    attention_recall=None,
    num_running=8,
    num_waiting=0,
    hot_used_frac=0.5,
    dram_used_frac=0.4,
    working_set_pages=0,
    working_set_bytes=0,
    metadata_bytes=1_000_000,
    requests_finished=0,
    selected_pages_per_step=1000.0,
)


@pytest.fixture
def plan(plan_start: Callable[..., StartPlan]) -> StartPlan:
    return plan_start(no_profile=True)


@pytest.fixture
def gpu_plan(plan: StartPlan) -> StartPlan:
    """As if the same had been planned for an H100."""
    return replace(plan, spec=replace(plan.spec, device="cuda:0"), machine=H100)


def page_bytes(plan: StartPlan) -> int:
    spec = plan.spec
    shape = plan.model.shape
    return Geometry.of(shape, dtype=spec.dtype, page_size=spec.knobs.page_size).page_bytes


def test_a_cpu_has_no_floor_and_no_facts_no_link(plan: StartPlan) -> None:
    found = ceilings(plan, [WINDOW], facts=None)
    assert not found.is_gpu and found.num_cpus == plan.machine.num_cpus
    assert found.h2d_bytes_per_s is None and found.floor_hbm_s is None


@pytest.mark.parametrize(("size_factor", "expected"), [(1, 40e9), (2, 55e9)])
def test_the_link_is_what_was_calibrated_for_pages_of_this_size(
    gpu_plan: StartPlan, size_factor: int, expected: float
) -> None:
    entry = LinkEntry(
        direction=Direction.H2D,
        piece_bytes=size_factor * page_bytes(gpu_plan),
        path=CopyPath.KERNEL,
        programs=8,
        tile_bytes=0,
        bytes_per_s=40e9,
    )
    saves = replace(entry, direction=Direction.D2H, bytes_per_s=1e9)
    facts = replace(FACTS, copies=(saves, entry))
    assert ceilings(gpu_plan, [], facts=facts).h2d_bytes_per_s == expected


def test_the_floor_grows_by_what_a_step_reads_and_computes(gpu_plan: StartPlan) -> None:
    base = ceilings(gpu_plan, [WINDOW], facts=FACTS)
    more = replace(WINDOW, selected_pages_per_step=2000.0)
    read = ceilings(gpu_plan, [more], facts=FACTS)
    assert base.floor_hbm_s is not None and read.floor_hbm_s is not None
    rate = 3.006e12 * ENGINE_COSTS.kv_frac
    expected = 1000 * page_bytes(gpu_plan) / rate
    assert read.floor_hbm_s - base.floor_hbm_s == pytest.approx(expected)
    prompts = ceilings(gpu_plan, [replace(WINDOW, prompt_tokens_per_s=1e6)], facts=FACTS)
    assert base.floor_compute_s is not None and prompts.floor_compute_s is not None
    assert prompts.floor_compute_s > base.floor_compute_s


def test_without_selection_what_is_hot_is_read(gpu_plan: StartPlan) -> None:
    dense = replace(WINDOW, selected_pages_per_step=None)
    half, full = (
        ceilings(gpu_plan, [replace(dense, hot_used_frac=frac)], facts=FACTS) for frac in (0.5, 1.0)
    )
    assert half.floor_hbm_s is not None and full.floor_hbm_s is not None
    rate = 3.006e12 * ENGINE_COSTS.kv_frac
    expected = 0.5 * gpu_plan.spec.plan.hot_pages_bytes / rate
    assert full.floor_hbm_s - half.floor_hbm_s == pytest.approx(expected)


def test_an_unknown_gpu_and_windows_without_steps_have_no_floor(gpu_plan: StartPlan) -> None:
    unknown = replace(gpu_plan, machine=replace(H100, gpu_name="GPU of tomorrow"))
    assert ceilings(unknown, [WINDOW], facts=FACTS).floor_hbm_s is None
    assert ceilings(gpu_plan, [replace(WINDOW, steps=0)], facts=FACTS).floor_hbm_s is None
    assert ceilings(gpu_plan, [], facts=FACTS).floor_hbm_s is None


def acceptance(plan: StartPlan, **changes: Any) -> AcceptanceDecision:
    rule, before = AcceptanceRule(), {"token_budget": 2048, "prefill_chunk": 512}
    after = {"token_budget": 1024, "prefill_chunk": 512}
    verdict = decide([], rule=rule, config_from=before, config_to=after)
    return replace(
        AcceptanceDecision(
            key=plan.key,
            config_from=before,
            config_to=after,
            rule=rule,
            verdict=verdict,
            windows=(),
            initiated_by="tune",
            decided_at=1.8e9,
        ),
        **changes,
    )


def test_an_explanation_holds_what_was_tried_for_this_machine_and_model(plan: StartPlan) -> None:
    store = InMemoryProfileStore()
    for number in range(7):
        store.save_acceptance(acceptance(plan, decided_at=float(number)))
    store.save_acceptance(acceptance(plan, key=replace(plan.key, model="another")))
    advice = Decision(
        made_at=1.0, values={}, reason="hold", predicted_score=None, current_score=None
    )
    store.record_decision(plan.key, advice)
    begun = RolloutRecord(
        state=RolloutState.VERIFYING,
        reason=RolloutReason.CANARY,
        config_from={"token_budget": 2048},
        config_to={"token_budget": 1024},
        initiated_by="tuner",
        at=2.0,
    )
    ended = replace(begun, state=RolloutState.REVERTED, reason=RolloutReason.ERRORS, at=3.0)
    for record in (begun, ended):
        store.note_rollout(plan.key, record)
    window = replace(WINDOW, ended_at=time.time())
    load = LoadState(current=1, drift="it has")
    found = asyncio.run(
        explain(store, plan, [window], knobs=plan.spec.knobs, facts=FACTS, load=load)
    )
    assert found.load == load
    assert [one.decided_at for one in found.tried] == [6.0, 5.0, 4.0, 3.0, 2.0]
    assert {tuple(one.values.items()) for one in found.tried} == {(("token_budget", 1024),)}
    assert found.tried[0].words.startswith("held: ")
    assert found.advised == (advice,)
    assert found.rollouts == (ended,)
    assert found.verdict.num_windows == 1
    assert found.remedies[-1].knob is None


class Clock:
    """Stands in for the module ``time``, as far as the senses use it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return 1e9 + self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(telemetry, "time", clock)
    return clock


def make_senses(gpu_plan: MemoryPlan | None = None) -> Senses:
    return Senses(lambda: Telemetry(totals=EngineStats()), slo=Slo(), gpu_plan=gpu_plan)


def report(senses: Senses, clock: Clock, *, steps: int) -> Snapshot:
    clock.now_s += 1.0
    snapshot = senses.on_stats(EngineStats(steps=steps))
    assert snapshot is not None
    return snapshot


def test_an_engine_that_falls_silent_is_a_fault_until_it_reports(clock: Clock) -> None:
    senses = make_senses()
    assert senses.faults == ()  # nothing is due before an engine is loaded
    senses.on_engine_ready(weights_bytes=1)
    clock.now_s += STALE_S
    assert senses.faults == ()
    clock.now_s += 1.0
    assert list(senses.faults) == ["the engine has not reported for 4 s"]
    report(senses, clock, steps=1)
    assert not senses.faults


def test_old_gauges_are_dropped_from_windows_and_a_fault(clock: Clock, plan: StartPlan) -> None:
    senses = make_senses(plan.spec.plan)
    assert report(senses, clock, steps=1).host == HostGauges()

    async def read_gauges() -> Snapshot:
        watch = asyncio.create_task(senses.watch_host(lambda: (), gpu_index=None))
        while (window := report(senses, clock, steps=2)).host.read_at is None:
            await asyncio.sleep(0.01)
        watch.cancel()
        await asyncio.wait({watch})
        return window

    first = asyncio.run(read_gauges())
    assert first.host.host_free_bytes is not None
    senses.on_engine_ready(weights_bytes=77)
    clock.now_s += STALE_S
    last = report(senses, clock, steps=3)
    assert last.host == HostGauges()
    (fault,) = senses.faults
    assert fault.startswith("the gauges of host and GPU have not been read for ")
    assert first.hbm is not None and last.hbm is not None
    assert first.hbm.weights_bytes == plan.spec.plan.weights_bytes
    assert last.hbm.weights_bytes == 77


def test_what_happens_while_the_profiler_is_off_is_in_no_window_and_no_fault(
    clock: Clock,
) -> None:
    senses = make_senses()
    senses.on_engine_ready(weights_bytes=1)
    report(senses, clock, steps=10)
    senses.switch(False)
    assert senses.snapshot is None and senses.windows == ()
    clock.now_s += 100 * STALE_S
    assert senses.faults == ()
    assert senses.on_stats(EngineStats(steps=500)) is None  # one that was under way
    senses.switch(True)
    assert senses.faults == ()
    clock.now_s += 50.0
    assert senses.on_stats(EngineStats(steps=9000, recent_step_s=(1.0,) * 9)) is None
    window = report(senses, clock, steps=9007)
    assert window.steps == 7 and window.step_p50_s is None
    assert senses.totals.steps == 9007


def test_an_explanation_says_that_the_profiler_is_off(plan: StartPlan) -> None:
    knobs = replace(plan.spec.knobs, profiler="off")
    found = asyncio.run(
        explain(InMemoryProfileStore(), plan, (), knobs=knobs, facts=FACTS, load=LoadState())
    )
    assert "knobs set profiler=on" in found.verdict.reason
    assert found.remedies == ()


def test_gauges_are_not_read_while_the_profiler_is_off(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "GAUGES_PERIOD_S", 0.01)
    senses, num_read = make_senses(), 0

    def read_pids() -> tuple[int, ...]:
        nonlocal num_read
        num_read += 1
        return ()

    async def watch_and_switch() -> None:
        watch = asyncio.create_task(senses.watch_host(read_pids, gpu_index=None))
        senses.switch(False)
        await asyncio.sleep(0.1)
        assert num_read == 0
        senses.switch(True)
        while num_read < 3:
            await asyncio.sleep(0.01)
        watch.cancel()
        await asyncio.wait({watch})

    asyncio.run(watch_and_switch())
    clock.now_s += 1.0
    senses.on_stats(EngineStats(steps=1))
    assert report(senses, clock, steps=2).host.host_free_bytes is not None


def test_the_senses_keep_a_few_windows(clock: Clock) -> None:
    senses = make_senses()
    for steps in range(1, 30):
        report(senses, clock, steps=steps)
    assert len(senses.windows) == telemetry.NUM_WINDOWS
    assert senses.windows[-1] == senses.snapshot
