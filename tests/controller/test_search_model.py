"""What `sparsed tune` knows beforehand: planner, roofline and the rates there are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsed.controller.plan.forecast import Configuration, Place, Traffic
from sparsed.controller.plan.gpus import GPUS
from sparsed.controller.search_model import (
    SearchModel,
    can_start,
    hot_tokens,
    memory_limit,
    search_model,
    search_space,
)
from sparsed.controller.startup import StartPlan
from sparsed.core import (
    BLOCK_TOKENS,
    GIB,
    CopyPath,
    Direction,
    EngineSpec,
    KnobValue,
    LinkCalibration,
    LinkEntry,
    LinkKey,
    LinkProbe,
    MachineFacts,
    Objective,
    ProfileKey,
    Slo,
    Workload,
    WorkloadRequest,
)
from sparsed.engine.hit_curve import Learned
from sparsed.engine.models.dummy import dummy_config
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.workspace import plan_workspace
from sparsed.tuner.constrained import ConstrainedSearch
from sparsed.tuner.policy import Constraint, Observation
from sparsed.tuner.space import SearchSpace, build_space, describe_space

LLAMA = dummy_config("dummy:llama-3.1-8b")
HOST = MachineFacts(
    cpu_name="any",
    num_cpus=16,
    dram_total_bytes=128 * GIB,
    dram_free_bytes=120 * GIB,
    gpu_name="NVIDIA H100 80GB HBM3",
    num_gpus=1,
    hbm_total_bytes=GPUS["h100"].rates.hbm_bytes,
    hbm_free_bytes=GPUS["h100"].rates.hbm_bytes - GIB,
)
LOAD = Workload(
    name="load",
    requests=tuple(
        WorkloadRequest(arrival_s=0.0, input_tokens=tokens, output_tokens=200)
        for tokens in (20_000, 40_000) * 16
    ),
)
SLO = Slo(ttft_s=20.0, tpot_s=0.05)


def start_plan(
    *, machine: MachineFacts = HOST, device: str = "cuda:0", **asked: KnobValue
) -> StartPlan:
    shape = LLAMA.shape
    sizes: dict[str, KnobValue] = {"kv_hbm_gib": 20.0, "kv_dram_gib": 96.0}
    knobs = resolve_knobs(
        sizes | asked, shape=shape, machine=machine, device=device, dtype="bfloat16"
    )
    return StartPlan(
        spec=EngineSpec(
            model="dummy:llama-3.1-8b",
            device=device,
            dtype="bfloat16",
            knobs=knobs,
            plan=plan_memory(knobs, shape=shape, dtype="bfloat16"),
        ),
        model=LLAMA,
        model_id="dummy",
        tokenizer_dir=None,
        machine=machine,
        key=ProfileKey(hardware="any", model="dummy", dtype="bfloat16"),
        profile="none",
        sources={},
        versions={},
    )


def calibration(bytes_per_s: float, programs: int = 32) -> LinkCalibration:
    return LinkCalibration(
        key=LinkKey(gpu_name="any", driver="1", link="gen5x16", torch="2", triton="3"),
        contiguous=LinkProbe(h2d_bytes_per_s=5e10, d2h_bytes_per_s=5e10),
        entries=(
            LinkEntry(
                direction=Direction.H2D,
                piece_bytes=4096,
                path=CopyPath.KERNEL,
                programs=programs,
                tile_bytes=4096,
                bytes_per_s=bytes_per_s,
            ),
        ),
    )


def model_of(
    plan: StartPlan,
    *,
    objective: Objective = Objective.THROUGHPUT,
    slo: Slo = SLO,
    link: LinkCalibration | None = None,
) -> SearchModel:
    return search_model(plan, LOAD, objective=objective, slo=slo, calibration=link)


def test_where_no_rates_are_known_there_is_no_prior_and_it_says_so() -> None:
    cpu = model_of(start_plan(device="cpu", machine=replace(HOST, dram_total_bytes=512 * GIB)))
    assert cpu.memory is None and cpu.prior({}).slacks == {}
    assert "no analytic prior" in cpu.description and "CPU" in cpu.description
    other = model_of(start_plan(machine=replace(HOST, gpu_name="GPU of tomorrow")))
    assert "no analytic prior: the rates of GPU of tomorrow" in other.description
    assert other.prior({}).slacks == {} and other.memory is not None


def test_the_prior_is_the_roofline_of_planner_gates_and_hit_curve() -> None:
    plan = start_plan()
    found = model_of(plan).prior({"max_num_active_seqs": 4})
    knobs = plan.spec.knobs.with_values({"max_num_active_seqs": 4})
    config = Configuration(
        Place(
            shape=LLAMA.shape,
            dtype="bfloat16",
            gpu=GPUS["h100"].rates,
            machine=HOST,
            learned=Learned(),
        ),
        Traffic(context=30_000, output_tokens=200, slo=SLO),
        asked={k: v for k, v in knobs.as_dict().items() if v is not None},
    )
    step_s = config.step(4).step_s
    total_s = 32 * config.job.prompt_s + 8 * 199 * step_s
    assert math.exp(found.objective) == pytest.approx(32 * 200 / total_s)
    assert set(found.slacks) == {*Constraint} - {Constraint.QUALITY}
    assert found.slacks[Constraint.TPOT] > step_s / 0.05 - 1, "others' prompts come in between"


def test_with_goodput_late_requests_cost_and_are_no_limit() -> None:
    plan = start_plan()
    easy, hard = (
        model_of(plan, objective=Objective.GOODPUT, slo=Slo(tpot_s=tpot_s)).prior({})
        for tpot_s in (10.0, 0.001)
    )
    assert set(easy.slacks) == {Constraint.HBM, Constraint.LINK}
    assert hard.objective < easy.objective - 1.0


def test_what_a_preset_expects_is_in_its_own_unit() -> None:
    plan = start_plan()

    def expected(objective: Objective) -> float:
        return model_of(plan, objective=objective).prior({}).objective

    latency, throughput = expected(Objective.LATENCY), expected(Objective.THROUGHPUT)
    assert latency != throughput
    assert expected(Objective.BALANCED) == pytest.approx((latency + throughput) / 2)
    assert expected(Objective.CAPACITY) == 0.0, "nothing is claimed of bytes that only a run tells"


def test_a_measured_link_counts_instead_of_the_table() -> None:
    plan = start_plan(token_budget=1024, hbm_budget=1024)
    slow, fast = (model_of(plan, link=calibration(rate)) for rate in (1e9, 5e10))
    assert "measured here" in slow.description
    assert slow.prior({}).objective < fast.prior({}).objective
    assert slow.prior({}).slacks[Constraint.LINK] > fast.prior({}).slacks[Constraint.LINK]


def test_programs_that_load_are_tried_where_a_link_loads() -> None:
    """The number of the calibration is what auto comes to; before there is one a study is of the
    same space."""

    def space(plan: StartPlan, link: LinkCalibration | None) -> SearchSpace:
        return search_space(plan, fixed=set(), workload=LOAD, calibration=link)

    plan = start_plan()
    before, known = space(plan, None), space(plan, calibration(5e10, programs=24))
    ladder = next(one for one in known.ladders if one.name == "copy_programs")
    assert ladder.auto_rung == 24 and {2, 32} < set(ladder.rungs)
    assert known.decode(known.encode({}))["copy_programs"] is None
    assert describe_space(before) == describe_space(known)
    cpu = start_plan(device="cpu", machine=replace(HOST, dram_total_bytes=512 * GIB))
    assert "copy_programs" not in space(cpu, None).names
    dense = start_plan(sparse_method="dense")
    assert "copy_programs" not in space(dense, None).names, "nothing is missing"


def test_the_prior_knows_the_rates_of_other_programs() -> None:
    plan = start_plan(token_budget=1024, hbm_budget=1024)
    few, many = calibration(1e9, programs=8), calibration(5e10, programs=132)
    link = replace(few, entries=few.entries + many.entries)
    model = model_of(plan, link=link)
    slow, fast, auto = (
        model.prior({"copy_programs": number}).slacks[Constraint.LINK] for number in (8, 132, None)
    )
    assert slow > fast == auto


def test_a_bound_on_what_a_request_keeps_misses_more() -> None:
    plan = start_plan(token_budget=1024)
    model = model_of(plan)
    few = {"max_num_active_seqs": 4}
    tight, wide, auto = (
        model.prior({**few, "hbm_budget": tokens}).slacks[Constraint.LINK]
        for tokens in (1024, 8192, None)
    )
    assert tight > wide >= auto


def test_memory_is_the_planners_with_a_margin() -> None:
    plan = start_plan(kv_hbm_gib=58.0)
    limit, knobs, shape = memory_limit(plan), plan.spec.knobs, LLAMA.shape
    workspace = plan_workspace(knobs, shape=shape, dtype="bfloat16").total_bytes
    used = plan.spec.plan.weights_bytes + plan.spec.plan.hot_bytes + workspace
    assert limit.predict({}) == used
    assert limit.limit_bytes == HOST.hbm_free_bytes
    assert limit.allows({}) and not limit.allows({"prefill_chunk": 32768})


def test_what_the_default_takes_is_allowed_for_it_runs() -> None:
    plan = start_plan(kv_hbm_gib=63.0)
    limit = memory_limit(plan)
    assert limit.predict({}) > HOST.hbm_free_bytes - limit.margin_bytes
    assert limit.allows({}) and limit.allows({"prefill_chunk": 512})
    assert not limit.allows({"prefill_chunk": 8192})


def test_what_the_planner_refuses_cannot_start_and_is_never_suggested() -> None:
    plan = start_plan(kv_hbm_gib=0.15, max_num_seqs=2, max_model_len=4096, kv_dram_gib=4.0)
    knobs = plan.spec.knobs
    refused = knobs.with_values({"prefill_chunk": 32768})
    assert can_start(plan, knobs) and not can_start(plan, refused)
    model = model_of(plan)
    assert model.memory is not None
    assert model.memory.predict({"prefill_chunk": 32768}) == math.inf
    assert model.prior({"prefill_chunk": 32768}).slacks == {}
    space = build_space(
        replace(knobs, max_model_len=32768),
        auto_hbm_budget=4096,
        is_planned=lambda wanted: can_start(plan, replace(wanted, max_model_len=4096)),
    )
    search = ConstrainedSearch(space=space, seed=0, memory=model.memory, prior=model.prior)
    seen: list[Observation] = []
    for num_left in range(6, 0, -1):
        found = search.suggest(seen, incumbent={}, num_left=num_left)
        assert found is not None
        assert can_start(plan, knobs.with_values(found.values))
        seen.append(Observation(values=found.values, objective=float(len(seen))))


def test_hot_tokens_are_those_of_whole_lanes() -> None:
    plan = start_plan()
    bytes_each = LLAMA.shape.kv_bytes_per_token("bfloat16")
    assert hot_tokens(plan) % BLOCK_TOKENS == 0
    assert 0 <= plan.spec.plan.hot_pages_bytes - hot_tokens(plan) * bytes_each < 256 * GIB // 1024


@settings(max_examples=30, deadline=None)
@given(
    budget=st.sampled_from((256, 1024, 4096)),
    active=st.integers(1, 64),
    page=st.sampled_from((8, 32, 64)),
    chunk=st.sampled_from((512, 2048, 8192)),
)
def test_expectations_are_finite(budget: int, active: int, page: int, chunk: int) -> None:
    found = MODEL.prior(
        {
            "token_budget": budget,
            "max_num_active_seqs": active,
            "page_size": page,
            "prefill_chunk": chunk,
        }
    )
    assert math.isfinite(found.objective) and all(map(math.isfinite, found.slacks.values()))


MODEL = model_of(start_plan())
