"""What selecting costs, as a CUDA device tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from sparsed.core import GIB, EngineSpec, MachineFacts, SparseMethod
from sparsed.engine.batch import DecodeRow, StepPlan
from sparsed.engine.in_place_costs import is_of_hot_pages
from sparsed.engine.measure.ceilings import copy_bytes_per_s_within
from sparsed.engine.measure.clock import Clock
from sparsed.engine.models.dummy import dummy_config
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.runner import Runner
from sparsed.engine.step_decoder import StepDecoder

pytestmark = pytest.mark.gpu

DEVICE, MODEL = "cuda:0", "dummy:tiny"
MACHINE = MachineFacts(
    cpu_name="any",
    num_cpus=2,
    dram_total_bytes=16 * GIB,
    dram_free_bytes=8 * GIB,
    hbm_total_bytes=16 * GIB,
    hbm_free_bytes=16 * GIB,
)

MakeRunner = Callable[..., Runner]
Prefill = Callable[..., int]


@pytest.fixture
def make_runner() -> MakeRunner:
    """``make_runner(**knobs)`` -> a runner of a small model that may attend in place."""

    def make(**knobs: object) -> Runner:
        shape = dummy_config(MODEL).shape
        asked = {
            "kv_dram_gib": 1.0,
            "kv_hbm_gib": 1.0,
            "max_num_seqs": 4,
            "max_model_len": 2048,
            "page_size": 8,
            "token_budget": 256,
            "sparse_method": "mean-key",
            **knobs,
        }
        resolved = resolve_knobs(
            asked, shape=shape, machine=MACHINE, device=DEVICE, dtype="float32"
        )
        plan = plan_memory(resolved, shape=shape, dtype="float32")
        spec = EngineSpec(model=MODEL, device=DEVICE, dtype="float32", knobs=resolved, plan=plan)
        return Runner(spec, on_progress=lambda phase, frac: None)

    return make


def steps_of(runner: Runner) -> StepDecoder:
    assert runner.steps is not None and runner.steps.rule is not None
    return runner.steps


def check_overheads(steps: StepDecoder) -> None:
    """Of every graph of hot pages, and of no other."""
    assert steps.rule is not None
    overheads = steps.rule._overheads
    assert {key for key in steps.graphs._graphs if is_of_hot_pages(key)} <= set(overheads)
    assert {key.in_place for key in overheads} == {False, True}
    assert all(one.few_pages < one.many_pages for one in overheads.values())


def test_overheads_are_known_from_the_start_and_of_steps_made_anew(make_runner: MakeRunner) -> None:
    runner = make_runner()
    check_overheads(steps_of(runner))
    stats = runner.stats()
    assert stats.hot_hits == stats.hot_misses == stats.working_set_pages == 0
    runner.look_ahead(True)
    check_overheads(steps_of(runner))


def test_what_is_timed_beside_a_request_changes_no_token(
    make_runner: MakeRunner, prefill: Prefill
) -> None:
    """Another budget comes into force while it decodes."""
    tokens = [i * i % 64 for i in range(1500)]
    one, other = make_runner(), make_runner()
    (row,) = {prefill(runner, tokens, output=200) for runner in (one, other)}
    knobs, graphs = replace(one._spec.knobs, token_budget=512), steps_of(other).graphs
    for runner in (one, other):
        steps_of(runner).rule = None  # what they do does not depend on the clock
    for runner in (one, other):
        runner.ask(knobs)
    while one.readiness < 1.0:
        one.prepare(idle=True)
    for step in range(100):
        if not graphs.is_ready:
            other.prepare(idle=True)
        decode = DecodeRow(row=row, token=step % 64, position=len(tokens) + step)
        expected, got = (r.run(StepPlan(chunks=(), decodes=(decode,))) for r in (one, other))
        torch.testing.assert_close(got.logits_NV, expected.logits_NV, atol=1e-3, rtol=1e-3)
    assert graphs.is_ready
    for runner in (one, other):
        runner.kv.check_integrity()


def test_a_dense_request_beside_a_hot_one_is_judged_by_its_own_graph(
    make_runner: MakeRunner, prefill: Prefill
) -> None:
    runner = make_runner()
    tokens = [i * i % 64 for i in range(1500)]
    rows = [
        prefill(runner, tokens, method=method)
        for method in (SparseMethod.DENSE, SparseMethod.MEAN_KEY)
    ]
    steps = steps_of(runner)
    decodes = [DecodeRow(row=row, token=1, position=1500) for row in rows]
    queued = [row for row in map(steps.row_of, decodes) if row is not None]
    assert len(queued) == 2
    key, graph = steps._find(queued)
    assert graph is not None and key.in_place and key.fetches
    assert steps.rule is not None and key in steps.rule._overheads


def test_a_rate_within_a_buffer_takes_no_memory() -> None:
    clock = Clock(torch.device(DEVICE))
    buffer_NX = torch.zeros((1 << 17, 1024), dtype=torch.int32, device=DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert copy_bytes_per_s_within(buffer_NX, clock) > 0
    assert torch.cuda.max_memory_allocated() == before
