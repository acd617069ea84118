"""Effects of knobs on landscapes where they are known, and the front of Pareto."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsed.core import Knobs, TrialResult, TrialStatus
from sparsed.tuner.importance import MIN_POINTS, knob_importance, pareto_front
from sparsed.tuner.space import Point, SearchSpace, build_space, describe_space

DEFAULT = Knobs(
    token_budget=2048,
    hbm_budget=None,
    max_num_active_seqs=4,
    prefill_chunk=512,
    page_size=32,
    sparse_method="cuboid-mean",
    dense_layers=0,
    max_num_seqs=16,
    kv_hbm_gib=1.0,
    kv_dram_gib=1.0,
    max_model_len=8192,
)
SPACE = build_space(DEFAULT, auto_hbm_budget=4096, fixed={"hbm_budget", "prefill_chunk"})


def trial(
    number: int,
    point: Point | None,
    score: float | None,
    *,
    space: SearchSpace = SPACE,
    status: TrialStatus = TrialStatus.OK,
    metrics: dict[str, float] | None = None,
) -> TrialResult:
    return TrialResult(
        number=number,
        arm="random",
        values={} if point is None else space.decode(point),
        status=status,
        score=score,
        spread_frac=None,
        metrics=metrics or {},
    )


def trials_of(name: str, *, count: int = 24, sign: float = 1.0) -> list[TrialResult]:
    """Of a landscape in which one knob alone decides."""
    axis = SPACE.names.index(name)
    points = random.Random(3).sample(list(SPACE.points()), count)
    return [trial(n, point, 10.0 + sign * point[axis]) for n, point in enumerate(points)]


@pytest.mark.parametrize("name", SPACE.names)
@pytest.mark.parametrize("sign", [1.0, -0.5])
def test_the_knob_that_decides_comes_first(name: str, sign: float) -> None:
    found = knob_importance(SPACE, trials_of(name, sign=sign), seed=1)
    assert next(iter(found)) == name and set(found) == set(SPACE.names)
    others = [effect for other, effect in found.items() if other != name]
    assert found[name] > 0.8 and max(others) < 0.2


def test_infeasible_trials_count_as_bad_and_interrupted_ones_not() -> None:
    axis = SPACE.names.index("max_num_active_seqs")
    points = random.Random(5).sample(list(SPACE.points()), 24)
    scores = [None if point[axis] > 2 else 10.0 for point in points]
    known = [
        trial(n, point, score) for n, (point, score) in enumerate(zip(points, scores, strict=True))
    ]
    found = knob_importance(SPACE, known, seed=1)
    assert next(iter(found)) == "max_num_active_seqs"
    stopped = trial(99, points[0], None, status=TrialStatus.INTERRUPTED)
    assert knob_importance(SPACE, [*known, stopped], seed=1) == found


def test_too_few_or_equal_trials_tell_nothing() -> None:
    known = trials_of("token_budget", count=MIN_POINTS)
    assert knob_importance(SPACE, known, seed=1)
    assert knob_importance(SPACE, known[1:], seed=1) == {}
    assert knob_importance(SPACE, [known[0]] * 10, seed=1) == {}
    assert (
        knob_importance(
            SPACE, [trial(n, p, None) for n, p in enumerate(SPACE.points())][:9], seed=1
        )
        == {}
    )


measured = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.booleans()), min_size=0, max_size=12
)


@given(measured)
def test_the_front_is_what_no_feasible_trial_beats(rows: list[tuple[int, int, bool]]) -> None:
    trials = [
        trial(
            number,
            None,
            1.0 if feasible else None,
            metrics={"output_tokens_per_s": float(speed), "tpot_p95_s": float(cost)},
        )
        for number, (speed, cost, feasible) in enumerate(rows)
    ]
    front = pareto_front(trials, cost="tpot_p95_s")
    places = [(t.metrics["output_tokens_per_s"], t.metrics["tpot_p95_s"]) for t in front]
    known = {(s, c) for s, c, feasible in rows if feasible}
    best = {
        (s, c)
        for s, c in known
        if not any((a, b) != (s, c) and a >= s and b <= c for a, b in known)
    }
    assert set(places) == best and len(places) == len(best)
    assert places == sorted(places)


def test_a_trial_without_the_figure_is_not_on_the_front() -> None:
    assert pareto_front([trial(0, None, 1.0)], cost="tpot_p95_s") == ()


def test_a_space_is_described_by_what_trials_depend_on() -> None:
    whole = build_space(DEFAULT, auto_hbm_budget=4096)
    for other in (
        build_space(DEFAULT.with_values({"token_budget": 1024}), auto_hbm_budget=4096),
        build_space(DEFAULT.with_values({"sparse_method": "quest"}), auto_hbm_budget=4096),
        build_space(DEFAULT, auto_hbm_budget=4096, fixed={"page_size"}),
    ):
        assert describe_space(other) != describe_space(whole)
    for auto in (2048, 4096, 5000, 8192):
        assert describe_space(build_space(DEFAULT, auto_hbm_budget=auto)) == describe_space(whole)
    kept = build_space(DEFAULT, auto_hbm_budget=4096, fixed={"hbm_budget"})
    assert describe_space(kept, fixed={"hbm_budget"}) != describe_space(whole)
    larger = build_space(DEFAULT.with_values({"kv_hbm_gib": 2.0}), auto_hbm_budget=4096)
    given = {"kv_hbm_gib"}
    smaller = build_space(DEFAULT, auto_hbm_budget=4096)
    assert describe_space(larger) == describe_space(smaller)
    assert describe_space(larger, fixed=given) != describe_space(smaller, fixed=given)
