"""Space, guard, judge and arms."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsed.core import (
    KNOBS_BY_NAME,
    Knobs,
    KnobValue,
    Measurement,
    Objective,
    Slo,
    TrialStatus,
    Workload,
    WorkloadRequest,
)
from sparsed.tuner.guard import guard
from sparsed.tuner.objective import judge
from sparsed.tuner.policy import BayesSearch, Observation, RandomSearch, SearchBackend
from sparsed.tuner.space import SearchSpace, build_space, half_octaves
from sparsed.tuner.surrogate import losses

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


@pytest.mark.parametrize("kind", [RandomSearch, BayesSearch])
def test_arms_propose_every_point_once_then_nothing(
    kind: type[RandomSearch | BayesSearch],
) -> None:
    space = build_space(
        DEFAULT,
        auto_hbm_budget=5000,
        fixed={"hbm_budget", "token_budget", "prefill_chunk", "max_num_active_seqs"},
    )
    observations = [Observation(space.default_values, 1.0)]
    arm: SearchBackend = kind(space=space, seed=3)
    while (suggestion := arm.suggest(observations)) is not None:
        observations.append(Observation(suggestion.values, None))
    tried = [item.values["page_size"] for item in observations]
    assert sorted(tried) == [8, 16, 32, 64, 128]  # type: ignore[type-var]  # integers
    assert tried[0] == 32


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
        assert set(ladder.rungs) <= set(whole[ladder.name])
    budgets = next(ladder.rungs for ladder in long.ladders if ladder.name == "token_budget")
    assert {4096, 6144} <= set(budgets) and budgets[-1] == 8192, "the last one is no limit"


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 500)), min_size=1, max_size=40)
)
def test_the_default_stays_whatever_the_workload(sizes: list[tuple[int, int]]) -> None:
    space = build_space(DEFAULT, auto_hbm_budget=5000, workload=load(*sizes))
    assert space.decode(space.encode({})) == space.default_values
    assert space.contains(space.encode({}))


@pytest.mark.parametrize("kind", [RandomSearch, BayesSearch])
def test_a_space_of_the_default_alone_has_nothing_to_suggest(
    kind: type[RandomSearch | BayesSearch],
) -> None:
    space = build_space(DEFAULT, auto_hbm_budget=5000, fixed=set(SPACE.names))
    arm = kind(space=space, seed=1)
    assert arm.suggest([Observation(space.default_values, 1.0)]) is None


@pytest.mark.parametrize("kind", [RandomSearch, BayesSearch])
def test_suggestions_are_plain_valid_and_reproducible(
    kind: type[RandomSearch | BayesSearch],
) -> None:
    def walk(seed: int) -> list[Mapping[str, KnobValue]]:
        observations = [Observation(SPACE.default_values, 1.0)]
        for turn in range(6):
            suggestion = kind(space=SPACE, seed=seed).suggest(observations)
            assert suggestion is not None
            DEFAULT.with_values(suggestion.values)
            assert json.loads(json.dumps(suggestion.values)) == suggestion.values
            assert {type(value) for value in suggestion.values.values()} <= {int, type(None)}
            score = None if turn % 3 == 2 else 1.0 + turn
            observations.append(Observation(suggestion.values, score))
        return [item.values for item in observations]

    assert walk(1) == walk(1) != walk(2)


@pytest.mark.slow
def test_the_bayesian_arm_finds_a_hill_that_random_search_misses() -> None:
    """On a smooth landscape the mean best score over seeds is clearly higher."""

    def height(values: Mapping[str, KnobValue]) -> float:
        point = SPACE.encode(values)
        top = [len(ladder.rungs) - 1 for ladder in SPACE.ladders]
        return math.exp(
            -sum(((rung - 0.7 * t) / t) ** 2 * 4 for rung, t in zip(point, top, strict=True))
        )

    def best(kind: type[RandomSearch | BayesSearch], seed: int) -> float:
        observations = [Observation(SPACE.default_values, height(SPACE.default_values))]
        for _ in range(10):
            suggestion = kind(space=SPACE, seed=seed).suggest(observations)
            assert suggestion is not None
            observations.append(Observation(suggestion.values, height(suggestion.values)))
        return max(item.score or 0.0 for item in observations)

    ours = fmean(best(BayesSearch, seed) for seed in range(3))
    theirs = fmean(best(RandomSearch, seed) for seed in range(20))
    assert ours > theirs + 0.05


@given(st.lists(st.one_of(st.none(), st.floats(1e-6, 1e6)), min_size=1).filter(any))
def test_infeasible_points_cost_a_bounded_finite_penalty(scores: list[float | None]) -> None:
    taught = losses(scores)
    feasible = [loss for loss, score in zip(taught, scores, strict=True) if score is not None]
    assert all(math.isfinite(loss) for loss in taught)
    for loss, score in zip(taught, scores, strict=True):
        assert score is not None or loss == max(feasible) + 0.5


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


def test_a_space_of_one_point_is_exhausted_at_once() -> None:
    space = SearchSpace(default=DEFAULT, ladders=())
    for arm in (RandomSearch(space=space, seed=0), BayesSearch(space=space, seed=0)):
        assert arm.suggest([Observation({}, 1.0)] * 5) is None
