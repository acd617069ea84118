"""Space, guard and judge."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsed.core import (
    BLOCK_TOKENS,
    KNOBS_BY_NAME,
    Knobs,
    KnobValue,
    Measurement,
    Objective,
    Slo,
    TrialResult,
    TrialStatus,
    Workload,
    WorkloadRequest,
)
from sparsed.tuner.constrained import ConstrainedSearch
from sparsed.tuner.guard import guard
from sparsed.tuner.objective import judge, observe
from sparsed.tuner.policy import Constraint, Crash, GridSearch, Observation, RandomSearch
from sparsed.tuner.space import WATERMARKS, build_space, half_octaves
from sparsed.tuner.stock import StockSearch

DEFAULT = Knobs(
    token_budget=2048,
    hbm_budget=None,
    max_num_active_seqs=16,
    prefill_chunk=2048,
    page_size=32,
    sparse_method="cuboid-mean",
    dense_layers=0,
    max_num_seqs=16,
    kv_hbm_gib=1.0,
    kv_dram_gib=1.0,
    max_model_len=8192,
)
SPACE = build_space(DEFAULT, auto_hbm_budget=5000)
SMALL = build_space(
    DEFAULT, auto_hbm_budget=5000, fixed={"hbm_budget", "token_budget", "prefill_chunk"}
)


def test_half_octaves() -> None:
    assert half_octaves(1, 9) == (1, 2, 3, 4, 6, 8)
    assert half_octaves(256, 1024) == (256, 384, 512, 768, 1024)


def test_the_default_is_a_point_and_comes_back_as_it_was() -> None:
    assert SPACE.decode(SPACE.encode({})) == SPACE.default_values
    assert SPACE.default_values["hbm_budget"] is None
    assert SPACE.encode({"hbm_budget": 5000}) == SPACE.encode({"hbm_budget": None})


def test_ladders_stay_inside_the_knobs_the_model_and_the_capacity() -> None:
    for ladder in SPACE.ladders:
        spec = KNOBS_BY_NAME[ladder.name]
        assert [spec.check(rung) for rung in ladder.rungs] == [*ladder.rungs]
    ends = {ladder.name: ladder.rungs[-1] for ladder in SPACE.ladders}
    assert ends["hbm_budget"] == ends["prefill_chunk"] == DEFAULT.max_model_len
    assert ends["max_num_active_seqs"] == DEFAULT.max_num_seqs


@given(st.sampled_from([p for i, p in enumerate(SMALL.points())]))
def test_encode_inverts_decode(point: tuple[int, ...]) -> None:
    assert SMALL.encode(SMALL.decode(point)) == point


def load(*sizes: tuple[int, int]) -> Workload:
    requests = (
        WorkloadRequest(arrival_s=0.0, input_tokens=prompt, output_tokens=output)
        for prompt, output in sizes
    )
    return Workload(name="load", requests=tuple(requests))


def test_limits_that_the_workload_never_reaches_are_not_tried() -> None:
    short = build_space(DEFAULT, auto_hbm_budget=5000, workload=load((100, 20), (120, 30)))
    rungs = {ladder.name: ladder.rungs for ladder in short.ladders}
    assert "token_budget" not in rungs and "hbm_budget" not in rungs
    assert rungs["max_num_active_seqs"] == (1, DEFAULT.max_num_active_seqs)
    assert all(rung < 220 or rung == DEFAULT.prefill_chunk for rung in rungs["prefill_chunk"])
    long = build_space(DEFAULT, auto_hbm_budget=5000, workload=load(*[(7000, 100)] * 40))
    whole = {ladder.name: ladder.rungs for ladder in SPACE.ladders}
    for ladder in long.ladders:
        assert ladder.name == "retrieval_stride" or set(ladder.rungs) <= set(whole[ladder.name])
    budgets = next(ladder.rungs for ladder in long.ladders if ladder.name == "token_budget")
    assert {4096, 6144} <= set(budgets) and budgets[-1] == 8192, "the last one is no limit"


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 500)), min_size=1, max_size=40)
)
def test_the_default_stays_whatever_the_workload(sizes: list[tuple[int, int]]) -> None:
    space = build_space(DEFAULT, auto_hbm_budget=5000, workload=load(*sizes))
    assert space.decode(space.encode({})) == space.default_values
    assert space.contains(space.encode({}))


@pytest.mark.parametrize("method", ["mean-key", "dense"])
@pytest.mark.parametrize("longest", [2047, 2048])
def test_a_stride_is_tried_where_the_default_selects(longest: int, method: str) -> None:
    default = replace(DEFAULT, token_budget=2048, sparse_method=method)
    space = build_space(default, auto_hbm_budget=5000, workload=load((100, 5), (longest, 1)))
    strides = [ladder.rungs for ladder in space.ladders if ladder.name == "retrieval_stride"]
    assert strides == ([(1, 2, 4, 8)] if longest == 2048 and method == "mean-key" else [])


@settings(max_examples=50)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 500)), min_size=1, max_size=40),
    hot_tokens=st.integers(128, 300_000),
)
def test_the_watermark_is_tried_where_requests_are_not_kept_whole_anyway(
    sizes: list[tuple[int, int]], hot_tokens: int
) -> None:
    space = build_space(DEFAULT, auto_hbm_budget=5000, workload=load(*sizes), hot_tokens=hot_tokens)
    blocks = sorted((math.ceil(sum(size) / BLOCK_TOKENS) for size in sizes), reverse=True)
    needed = BLOCK_TOKENS * sum(blocks[: DEFAULT.max_num_seqs])
    assert ("residency_watermark" in space.names) == (needed > 0.9 * hot_tokens)
    assert space.decode(space.encode({})) == space.default_values
    for ladder in space.ladders:
        for rung in range(len(ladder.rungs)):
            assert ladder.nearest(ladder.value(rung)) == rung


@pytest.mark.parametrize(
    ("knobs", "fixed", "hot_tokens", "rungs"),
    [
        (DEFAULT, frozenset(), 4096, WATERMARKS),
        (DEFAULT, frozenset(), None, None),
        (DEFAULT, {"residency_watermark"}, 4096, None),
        (DEFAULT.with_values({"sparse_method": "dense"}), frozenset(), 4096, None),
        (DEFAULT.with_values({"residency_watermark": 0.15}), frozenset(), 4096, {0.15}),
        (DEFAULT.with_values({"residency_watermark": 0.0}), {"residency_watermark"}, 9, None),
    ],
)
def test_the_ladder_of_the_watermark(
    knobs: Knobs, fixed: set[str], hot_tokens: int | None, rungs: set[float] | None
) -> None:
    space = build_space(
        knobs,
        auto_hbm_budget=5000,
        fixed=fixed,
        workload=load(*[(7000, 100)] * 4),
        hot_tokens=hot_tokens,
    )
    found = {ladder.name: ladder.rungs for ladder in space.ladders}.get("residency_watermark")
    assert (found is None) == (rungs is None)
    if found is not None and rungs is not None:
        assert set(found) == {*rungs, *WATERMARKS}
        assert guard({"residency_watermark": 0.29}, current=knobs, space=space) == {
            "residency_watermark": 0.2
        }


def test_a_configuration_that_no_engine_could_start_with_is_not_in_the_space() -> None:
    def has_room(knobs: Knobs) -> bool:
        return knobs.page_size < 64

    space = build_space(
        DEFAULT,
        auto_hbm_budget=5000,
        fixed={"hbm_budget", "token_budget", "prefill_chunk"},
        is_planned=has_room,
    )
    pages = {space.decode(point)["page_size"] for point in space.points()}
    assert pages == {8, 16, 32}
    backends = (
        ConstrainedSearch(space=space, seed=1, num_initial=4),
        RandomSearch(space=space, seed=1),
        GridSearch(space=space, seed=1),
        StockSearch(space=space, seed=1),
    )
    for backend in backends:
        observations: list[Observation] = []
        for num_left in range(12, 0, -1):
            found = backend.suggest(observations, incumbent={}, num_left=num_left)
            if found is None:
                break
            assert found.values["page_size"] in pages
            observations.append(Observation(values=found.values, objective=0.0))


proposals = st.fixed_dictionaries(
    {},
    optional={
        "page_size": st.sampled_from((8, 16, 32, 64, 128)),
        "token_budget": st.integers(1, 100_000),
        "hbm_budget": st.one_of(st.none(), st.integers(1, 100_000)),
        "max_num_active_seqs": st.integers(1, 5000),
        "prefill_chunk": st.integers(1, 100_000),
    },
)


@settings(max_examples=200)
@given(proposals, st.sampled_from([p for i, p in enumerate(SPACE.points()) if i % 997 == 0]))
def test_guarded_values_apply_and_are_one_rung_away(
    proposal: dict[str, KnobValue], start: tuple[int, ...]
) -> None:
    current = DEFAULT.with_values(SPACE.decode(start))
    allowed = guard(proposal, current=current, space=SPACE)
    after = current.with_values(allowed)
    here, there = SPACE.encode(current.as_dict()), SPACE.encode(after.as_dict())
    for ladder, a, b in zip(SPACE.ladders, here, there, strict=True):
        repaired = ladder.name in ("token_budget", "hbm_budget")  # may have to follow another
        assert repaired or abs(a - b) <= 1


UNSAMPLED = {"attention_recall": None}
NOT_SPARSE = {"attention_recall": None, "sparse_steps": 0}


def measurement(**changes: object) -> Measurement:
    fields: dict[str, object] = {
        "duration_s": 2.0,
        "output_tokens": 20,
        "ttft_s": (0.1, 0.3),
        "tpot_s": (0.01, 0.05),
        "sparse_steps": 8,
        "attention_recall": 0.9,
        "hot_hit_frac": None,
        "h2d_bytes": 0,
        "hot_peak_bytes": 0,
    }
    return Measurement(**(fields | changes))  # type: ignore[arg-type]  # fields by name


def test_scores_of_the_presets() -> None:
    """256 tokens at the p95 take 0.3 + 255 x 0.05 s; half a GiB gives ten tokens a second."""
    run, answer_s = measurement(hot_peak_bytes=1 << 29), 0.3 + 255 * 0.05
    scores = {item: judge(run, objective=item, slo=Slo()).score for item in Objective}
    assert scores == pytest.approx(
        {
            Objective.THROUGHPUT: 10.0,
            Objective.GOODPUT: 1.0,
            Objective.LATENCY: 1.0 / answer_s,
            Objective.BALANCED: math.sqrt(10.0 / answer_s),
            Objective.CAPACITY: 20.0,
        }
    )


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        (Objective.CAPACITY, {"hot_peak_bytes": 0}),
        (Objective.LATENCY, {"ttft_s": (), "tpot_s": ()}),
        (Objective.BALANCED, {"ttft_s": (), "tpot_s": ()}),
    ],
)
def test_a_score_that_is_not_known_never_wins(
    objective: Objective, changes: dict[str, object]
) -> None:
    verdict = judge(measurement(**changes), objective=objective, slo=Slo())
    assert verdict.score is None and verdict.status is TrialStatus.ENGINE_ERROR
    assert "could not be measured" in verdict.reason


@given(
    objective=st.sampled_from(sorted(set(Objective) - {Objective.GOODPUT})),
    slower=st.floats(1.01, 100),
)
def test_a_slower_run_scores_less_by_every_preset(objective: Objective, slower: float) -> None:
    run = measurement(hot_peak_bytes=1 << 29)
    late = measurement(
        hot_peak_bytes=1 << 29,
        duration_s=2.0 * slower,
        ttft_s=tuple(slower * x for x in run.ttft_s),
        tpot_s=tuple(slower * x for x in run.tpot_s),
    )
    fast, slow = (judge(x, objective=objective, slo=Slo()).score for x in (run, late))
    assert fast is not None and slow is not None
    assert slow == pytest.approx(fast / slower)


@pytest.mark.parametrize(
    ("changes", "objective", "slo", "status", "score"),
    [
        ({}, Objective.THROUGHPUT, Slo(), TrialStatus.OK, 10.0),
        ({}, Objective.THROUGHPUT, Slo(ttft_s=0.3, tpot_s=0.05), TrialStatus.OK, 10.0),
        ({}, Objective.THROUGHPUT, Slo(ttft_s=0.2), TrialStatus.SLO_BROKEN, None),
        ({}, Objective.THROUGHPUT, Slo(tpot_s=0.04), TrialStatus.SLO_BROKEN, None),
        ({}, Objective.THROUGHPUT, Slo(min_recall=0.95), TrialStatus.RECALL_BROKEN, None),
        (UNSAMPLED, Objective.THROUGHPUT, Slo(), TrialStatus.OK, 10.0),
        (UNSAMPLED, Objective.THROUGHPUT, Slo(min_recall=0.1), TrialStatus.RECALL_BROKEN, None),
        (UNSAMPLED, Objective.GOODPUT, Slo(min_recall=0.1), TrialStatus.RECALL_BROKEN, None),
        (NOT_SPARSE, Objective.THROUGHPUT, Slo(min_recall=0.95), TrialStatus.OK, 10.0),
        (
            {"attention_recall": math.nan},
            Objective.THROUGHPUT,
            Slo(min_recall=0.5),
            TrialStatus.RECALL_BROKEN,
            None,
        ),
        ({"errors": 1}, Objective.THROUGHPUT, Slo(), TrialStatus.ENGINE_ERROR, None),
        ({"output_tokens": 0}, Objective.THROUGHPUT, Slo(), TrialStatus.TIMEOUT, None),
        ({}, Objective.GOODPUT, Slo(ttft_s=0.2), TrialStatus.OK, 0.5),
        ({}, Objective.GOODPUT, Slo(ttft_s=0.2, tpot_s=0.001), TrialStatus.SLO_BROKEN, None),
    ],
)
def test_judge(
    changes: dict[str, object], objective: Objective, slo: Slo, status: str, score: float | None
) -> None:
    verdict = judge(measurement(**changes), objective=objective, slo=slo)
    assert (verdict.status, verdict.score) == (status, score)
    assert bool(verdict.reason) == (score is None)
    assert all(math.isfinite(value) for value in verdict.metrics.values())


def test_an_unchecked_floor_says_so() -> None:
    verdict = judge(
        measurement(**UNSAMPLED), objective=Objective.THROUGHPUT, slo=Slo(min_recall=0.5)
    )
    assert "never sampled in 8 sparse steps" in verdict.reason
    assert verdict.metrics["sparse_steps"] == 8


def finished(
    status: TrialStatus = TrialStatus.OK, reason: str = "", **metrics: float
) -> TrialResult:
    return TrialResult(
        number=1,
        arm="bayes",
        values={"page_size": 32},
        status=status,
        score=None,
        spread_frac=None,
        metrics={"output_tokens_per_s": 10.0, "goodput_requests_per_s": 0.5} | metrics,
        reason=reason,
    )


@pytest.mark.parametrize(
    ("status", "reason", "crash"),
    [
        (TrialStatus.OUT_OF_MEMORY, "", Crash.OOM_DEVICE),
        (TrialStatus.HOST_OUT_OF_MEMORY, "", Crash.OOM_HOST_PINNED),
        (TrialStatus.DEVICE_ERROR, "an illegal memory access", Crash.CUDA_ERROR),
        (TrialStatus.ENGINE_ERROR, "pinned memory, CUDA error, Xid 79", Crash.ENGINE_BUG),
        (TrialStatus.TIMEOUT, "", Crash.TIMEOUT),
        (TrialStatus.INVALID_CONFIG, "", Crash.INVALID_CONFIG),
        (TrialStatus.INTERRUPTED, "", Crash.INTERRUPTED),
    ],
)
def test_crashes_are_typed(status: TrialStatus, reason: str, crash: Crash) -> None:
    seen = observe(finished(status, reason), objective=Objective.THROUGHPUT, slo=Slo())
    assert seen.crash is crash and seen.objective is None and not seen.is_feasible


def test_a_trial_that_missed_its_targets_still_teaches() -> None:
    slo = Slo(ttft_s=1.0, tpot_s=0.1, min_recall=0.9)
    figures = {
        "ttft_p95_s": 1.5,
        "tpot_p95_s": 0.05,
        "attention_recall": 0.95,
        "sparse_steps": 9.0,
    }
    late = finished(TrialStatus.SLO_BROKEN, "late", **figures)
    seen = observe(late, objective=Objective.THROUGHPUT, slo=slo)
    assert seen.objective == pytest.approx(math.log(10.0)) and not seen.is_feasible
    assert seen.slacks == {
        Constraint.TTFT: pytest.approx(0.5),
        Constraint.TPOT: pytest.approx(-0.5),
        Constraint.QUALITY: pytest.approx(-0.5),
    }
    counted = observe(late, objective=Objective.GOODPUT, slo=slo)
    assert counted.objective == pytest.approx(math.log(0.5))
    assert set(counted.slacks) == {Constraint.QUALITY}, "late requests do not count there already"


@pytest.mark.parametrize(("sparse_steps", "is_feasible"), [(0.0, True), (9.0, False)])
def test_an_unsampled_floor_is_broken(sparse_steps: float, is_feasible: bool) -> None:
    trial = finished(sparse_steps=sparse_steps)
    seen = observe(trial, objective=Objective.THROUGHPUT, slo=Slo(min_recall=0.9))
    assert seen.is_feasible is is_feasible


@pytest.mark.parametrize("objective", list(Objective))
def test_what_a_gpu_told_of_memory_and_link_is_a_slack(objective: Objective) -> None:
    told = measurement(hbm_peak_frac=0.9, link_busy_frac=0.99, sparse_steps=0, hot_peak_bytes=1)
    verdict = judge(told, objective=objective, slo=Slo())
    assert verdict.status is TrialStatus.OK, "a busy link breaks no promise"
    trial = replace(finished(), metrics=verdict.metrics)
    seen = observe(trial, objective=objective, slo=Slo())
    assert seen.slacks == {
        Constraint.HBM: pytest.approx(-0.1),
        Constraint.LINK: pytest.approx(0.1),
    }
    assert not seen.is_feasible
    untold = judge(measurement(), objective=objective, slo=Slo())
    assert not {"hbm_peak_frac", "link_busy_frac"} & set(untold.metrics)
