"""One contract for every search backend, and what the constrained one adds to it.

Of all: what they suggest is valid, reproducible, and nothing that crashed before. Of the constrained
one: it keeps to memory, targets and trust region, recommends by repeats, learns over a prior, and
beats random search at equal budget with fewer broken targets.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from itertools import islice
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsed.core import Knobs, KnobValue
from sparsed.tuner.beliefs import (
    Beliefs,
    Expectation,
    log_expected_improvement,
    log_normal,
    log_ratio,
)
from sparsed.tuner.constrained import (
    MAX_RADIUS,
    MIN_RADIUS,
    START_RADIUS,
    ConstrainedSearch,
    MemoryLimit,
    radius_after,
)
from sparsed.tuner.policy import (
    TEACHING_CRASHES,
    Constraint,
    Crash,
    GridSearch,
    Observation,
    RandomSearch,
    SearchBackend,
)
from sparsed.tuner.space import Point, SearchSpace, build_space
from sparsed.tuner.stock import StockSearch
from sparsed.tuner.surrogate import Prediction

DEFAULT = Knobs(
    token_budget=2048,
    hbm_budget=None,
    max_num_active_seqs=4,
    prefill_chunk=2048,
    page_size=32,
    sparse_method="cuboid-mean",
    dense_layers=0,
    max_num_seqs=64,
    kv_hbm_gib=1.0,
    kv_dram_gib=1.0,
    max_model_len=8192,
)
SPACE = build_space(DEFAULT, auto_hbm_budget=5000, fixed={"hbm_budget"})
PAGES = build_space(
    DEFAULT,
    auto_hbm_budget=5000,
    fixed={"hbm_budget", "token_budget", "prefill_chunk", "max_num_active_seqs"},
)
HOME = SPACE.default_values
MOST_ACTIVE = 24  # more run out of memory

Make = Callable[[SearchSpace, int], SearchBackend]
BACKENDS: Mapping[str, Make] = {
    "constrained": lambda space, seed: ConstrainedSearch(space=space, seed=seed),
    "fills first": lambda space, seed: ConstrainedSearch(space=space, seed=seed, num_initial=4),
    "skopt": lambda space, seed: StockSearch(space=space, seed=seed),
    "random": lambda space, seed: RandomSearch(space=space, seed=seed),
    "grid": lambda space, seed: GridSearch(space=space, seed=seed),
}
every_backend = pytest.mark.parametrize("make", BACKENDS.values(), ids=BACKENDS.keys())


def serve(values: Mapping[str, KnobValue]) -> Observation:
    """Throughput and time per token rise with active requests, memory ends them; quality falls
    with the budget and with the page."""
    knobs = DEFAULT.with_values(values)
    active, budget = knobs.max_num_active_seqs, knobs.token_budget
    if active > MOST_ACTIVE:
        return Observation(values=values, objective=None, crash=Crash.OOM_DEVICE)
    step_s = 0.005 + active * budget * 4e-7
    return Observation(
        values=values,
        objective=math.log(active / step_s),
        slacks={
            Constraint.TPOT: step_s / 0.02 - 1.0,
            Constraint.QUALITY: (100 / budget) * (knobs.page_size / 32) ** 0.3 / 0.1 - 1.0,
        },
    )


def search(
    backend: SearchBackend, *, num_trials: int, noise: float = 0.0, seed: int = 0
) -> list[Observation]:
    generator = random.Random(seed)
    observations = [serve(HOME)]
    for num_left in range(num_trials, 0, -1):
        found = backend.suggest(observations, incumbent=HOME, num_left=num_left)
        if found is None:
            break
        observations.append(shaken(serve(found.values), generator, noise))
    return observations


def shaken(item: Observation, generator: random.Random, noise: float) -> Observation:
    if item.objective is None:
        return item
    return Observation(
        values=item.values,
        objective=item.objective + generator.gauss(0.0, noise),
        slacks={
            name: (1.0 + slack) * math.exp(generator.gauss(0.0, noise)) - 1.0
            for name, slack in item.slacks.items()
        },
    )


def points_of(observations: list[Observation]) -> list[Point]:
    return [SPACE.encode(item.values) for item in observations]


# every backend


@every_backend
def test_every_point_is_proposed_once_and_then_nothing(make: Make) -> None:
    observations = [Observation(values=PAGES.default_values, objective=0.0)]
    backend = make(PAGES, 3)
    while found := backend.suggest(
        observations, incumbent=PAGES.default_values, num_left=100 - len(observations)
    ):
        observations.append(
            Observation(values=found.values, objective=None, crash=Crash.OOM_DEVICE)
        )
    tried = [item.values["page_size"] for item in observations]
    assert len(tried) == 5 and set(tried) == {8, 16, 32, 64, 128}


@every_backend
def test_a_space_without_a_choice_has_nothing_to_suggest(make: Make) -> None:
    space = SearchSpace(default=DEFAULT, ladders=())
    backend = make(space, 0)
    seen = [Observation(values={}, objective=1.0)] * 12
    assert backend.suggest(seen, incumbent={}, num_left=9) is None
    assert backend.recommend(seen, incumbent={}).values == {}


@pytest.mark.slow
@every_backend
def test_suggestions_are_plain_valid_and_reproducible(make: Make) -> None:
    def walk(seed: int) -> list[Mapping[str, KnobValue]]:
        return [item.values for item in search(make(SPACE, seed), num_trials=12)]

    found = walk(1)
    for values in found:
        DEFAULT.with_values(values)
        assert json.loads(json.dumps(values)) == values
        assert {type(value) for value in values.values()} == {int}
    assert walk(1) == found


@pytest.mark.parametrize("crash", Crash)
@every_backend
def test_what_crashed_never_comes_again(make: Make, crash: Crash) -> None:
    """Even when all that is left is to measure something twice."""
    backend = make(PAGES, 1)
    home = PAGES.default_values
    observations = [Observation(values=home, objective=0.0)]
    crashed: list[Mapping[str, KnobValue]] = []
    for num_left in (5, 4, 3, 2, 1):
        found = backend.suggest(observations, incumbent=home, num_left=num_left)
        if found is None:
            break
        assert found.values not in crashed
        crashed.append(found.values)
        observations.append(Observation(values=found.values, objective=None, crash=crash))
    assert len(crashed) == 4
    assert backend.recommend(observations, incumbent=home).values == home


@every_backend
def test_with_nothing_feasible_the_incumbent_stays(make: Make) -> None:
    late = {Constraint.TPOT: 0.5}
    seen = [
        Observation(values=SPACE.decode(point), objective=2.0, slacks=late)
        for point in [SPACE.encode(HOME), (0, 0, 0, 0)]
    ]
    assert make(SPACE, 0).recommend(seen, incumbent=HOME).values == HOME


# the constrained one


def test_it_starts_at_the_incumbent() -> None:
    found = ConstrainedSearch(space=SPACE, seed=0).suggest([], incumbent=HOME, num_left=9)
    assert found is not None and found.values == HOME


@pytest.mark.slow
@pytest.mark.parametrize("num_initial", [0, 4])
def test_nothing_leaves_the_known_memory(num_initial: int) -> None:
    """The limit bites: without it such a search runs into it."""

    def predict(values: Mapping[str, KnobValue]) -> float:
        return float(DEFAULT.with_values(values).max_num_active_seqs)

    memory = MemoryLimit(predict=predict, limit_bytes=MOST_ACTIVE, margin_bytes=8)
    bound = ConstrainedSearch(space=SPACE, seed=2, memory=memory, num_initial=num_initial)
    active = [item.values["max_num_active_seqs"] for item in search(bound, num_trials=14)]
    assert max(int(value or 0) for value in active) == 16
    free = search(ConstrainedSearch(space=SPACE, seed=2, num_initial=8), num_trials=8)
    assert any(item.crash for item in free)


def test_steps_stay_in_the_trust_region_of_the_best_point() -> None:
    observations = search(ConstrainedSearch(space=SPACE, seed=1), num_trials=1)
    home, there = points_of(observations)
    for ladder, a, b in zip(SPACE.ladders, home, there, strict=True):
        assert abs(a - b) <= max(1, math.floor(START_RADIUS * (len(ladder.rungs) - 1)))


@pytest.mark.slow
def test_a_target_needs_its_deviations_of_slack() -> None:
    """What is tried was believed to be safe, by what was known before it."""
    backend = ConstrainedSearch(space=SPACE, seed=4)
    observations = search(backend, num_trials=10, noise=0.03)
    judged = 0
    for number in range(1, len(observations)):
        known = observations[:number]
        found = backend.suggest(known, incumbent=HOME, num_left=40)
        assert found is not None
        if not found.reason.startswith("expected improvement"):
            continue
        beliefs = Beliefs.fit(SPACE, observations=known, seed=4)
        (belief,) = beliefs.of([SPACE.encode(found.values)])
        for name in (Constraint.TPOT, Constraint.QUALITY):
            slack = belief.slacks[name]
            assert slack.mean + 2.0 * slack.deviation <= 1e-9
            judged += 1
    assert judged > 4


def test_one_lucky_window_is_not_recommended() -> None:
    lucky = Observation(values=SPACE.decode((2, 6, 4, 8)), objective=9.0)
    home = [Observation(values=HOME, objective=1.0)] * 3
    backend = ConstrainedSearch(space=SPACE, seed=0)
    assert backend.recommend([*home, lucky], incumbent=HOME).values == HOME
    again = backend.suggest([*home, lucky], incumbent=HOME, num_left=2)
    assert again is not None and again.values == lucky.values
    assert backend.recommend([*home, lucky, lucky], incumbent=HOME).values == lucky.values


@pytest.mark.parametrize(("gain", "stays"), [(0.0, True), (0.004, True), (0.2, False)])
def test_a_tie_keeps_the_incumbent(gain: float, stays: bool) -> None:
    other = SPACE.decode((2, 6, 4, 8))
    seen = [
        *[Observation(values=HOME, objective=1.0)] * 6,
        *[Observation(values=other, objective=1.0 + gain)] * 6,
    ]
    chosen = ConstrainedSearch(space=SPACE, seed=0).recommend(seen, incumbent=HOME)
    assert (chosen.values == HOME) is stays


def test_what_broke_a_target_once_is_not_recommended() -> None:
    other = SPACE.decode((2, 6, 4, 8))
    good = Observation(values=other, objective=3.0, slacks={Constraint.TPOT: -0.5})
    late = Observation(values=other, objective=3.0, slacks={Constraint.TPOT: 0.01})
    home = Observation(values=HOME, objective=1.0, slacks={Constraint.TPOT: -0.5})
    backend = ConstrainedSearch(space=SPACE, seed=0)
    assert backend.recommend([home, good, good], incumbent=HOME).values == other
    assert backend.recommend([home, good, good, late], incumbent=HOME).values == HOME


@pytest.mark.parametrize("crash", Crash)
def test_only_some_crashes_teach_where_not_to_go(crash: Crash) -> None:
    failed = Observation(values=SPACE.decode((2, 6, 10, 8)), objective=None, crash=crash)
    seen = [serve(HOME), failed]
    beliefs = Beliefs.fit(SPACE, observations=seen, seed=0)
    assert (beliefs.crashes is not None) is (crash in TEACHING_CRASHES)
    near, far = beliefs.of([(2, 6, 9, 8), SPACE.encode(HOME)])
    if beliefs.crashes is not None:
        assert near.log_feasible < far.log_feasible - 0.1


def test_a_prior_is_believed_until_trials_contradict_it() -> None:
    far = (2, 6, 4, 12)

    def prior(values: Mapping[str, KnobValue]) -> Expectation:
        chunk = DEFAULT.with_values(values).prefill_chunk
        return Expectation(objective=math.log(chunk), slacks={Constraint.TTFT: 512 / chunk - 1})

    first = Observation(values=HOME, objective=0.0, slacks={Constraint.TTFT: -0.5})
    beliefs = Beliefs.fit(SPACE, observations=[first], prior=prior, seed=0)
    here, there = beliefs.of([SPACE.encode(HOME), far])
    gain = math.log(SPACE.ladders[3].rungs[12] / 2048)
    assert there.objective.mean - here.objective.mean == pytest.approx(gain, abs=0.05)
    assert there.slacks[Constraint.TTFT].mean < here.slacks[Constraint.TTFT].mean - 0.3
    second = Observation(values=SPACE.decode(far), objective=-1.0, slacks={Constraint.TTFT: 0.5})
    (there,) = Beliefs.fit(SPACE, observations=[first, second], prior=prior, seed=0).of([far])
    assert there.objective.mean == pytest.approx(-1.0, abs=0.2)
    assert there.slacks[Constraint.TTFT].mean > 0.2


@given(st.lists(st.tuples(st.floats(-5, 5), st.booleans()), max_size=60))
def test_the_radius_stays_in_its_bounds(trials: list[tuple[float, bool]]) -> None:
    observations = [
        Observation(values={}, objective=value, slacks={Constraint.TPOT: -0.1 if is_good else 0.1})
        for value, is_good in trials
    ]
    assert MIN_RADIUS <= radius_after(observations) <= MAX_RADIUS


def test_the_radius_grows_with_success_and_opens_again_when_stuck() -> None:
    def run(*values: float) -> float:
        return radius_after([Observation(values={}, objective=value) for value in values])

    assert run(0.0) == START_RADIUS
    assert run(0.0, 1.0) == pytest.approx(1.3 * START_RADIUS)
    assert run(0.0, 0.0) == pytest.approx(0.93 * START_RADIUS)
    radii = [run(*[0.0] * count) for count in range(1, 20)]
    assert max(radii) == MAX_RADIUS and min(radii) < 0.06


@settings(max_examples=200)
@given(st.floats(-50, 50), st.floats(0, 10), st.floats(-50, 50))
def test_log_scores_are_finite_and_rise_with_the_mean(mean: float, sd: float, best: float) -> None:
    here = log_expected_improvement(Prediction(mean, sd), best=best)
    above = log_expected_improvement(Prediction(mean + 0.5, sd), best=best)
    assert math.isfinite(here) and here <= above + 1e-3
    assert math.isfinite(log_normal(mean)) and log_normal(mean) <= 0


@pytest.mark.parametrize("z", [-5.9, -2.0, 0.0, 3.0])
def test_expected_improvement_is_the_integral(z: float) -> None:
    step = 1e-3
    grid = [z + step * i for i in range(-9000, 9001)]
    density = (math.exp(-0.5 * (x - z) ** 2) / math.sqrt(2 * math.pi) for x in grid)
    integral = sum(max(x, 0.0) * p * step for x, p in zip(grid, density, strict=True))
    found = log_expected_improvement(Prediction(z, 1.0), best=0.0)
    assert found == pytest.approx(math.log(integral), abs=1e-2)


def test_tails_continue_what_is_exact() -> None:
    """To the size of the first term left out, 3 / z**2."""

    def improvement(z: float) -> float:
        return log_expected_improvement(Prediction(z, 1.0), best=0.0)

    assert improvement(-6.0 + 1e-9) == pytest.approx(improvement(-6.0 - 1e-9), abs=0.1)
    assert log_normal(-6.0 + 1e-9) == pytest.approx(log_normal(-6.0 - 1e-9), abs=0.05)


@given(st.floats(-1.0, 1e6))
def test_log_ratios_are_bounded_and_keep_the_sign(slack: float) -> None:
    ratio = log_ratio(slack)
    assert -2.0 <= ratio <= 1.0
    assert abs(slack) < 1e-9 or (ratio < 0) == (slack < 0)


@pytest.mark.slow
def test_it_beats_random_and_stays_within_its_limits() -> None:
    """Noisy windows, equal budget: clearly better, and with far fewer broken targets."""

    def truth(values: Mapping[str, KnobValue]) -> float:
        item = serve(values)
        return math.exp(item.objective or 0.0) if item.is_feasible else 0.0

    def run(make: Make, seed: int) -> tuple[float, int]:
        backend = make(SPACE, seed)
        observations = search(backend, num_trials=20, noise=0.04, seed=seed)
        broken = sum(not serve(item.values).is_feasible for item in observations)
        return truth(backend.recommend(observations, incumbent=HOME).values), broken

    ours = [run(BACKENDS["constrained"], seed) for seed in range(3)]
    theirs = [run(BACKENDS["random"], seed) for seed in range(20)]
    assert fmean(score for score, _ in ours) > 1.1 * fmean(score for score, _ in theirs)
    assert fmean(n for _, n in ours) < 0.4 * fmean(n for _, n in theirs)


# what is pending on other devices


@every_backend
@settings(max_examples=10)
@given(num_devices=st.integers(2, 6), num_ended=st.integers(1, 12), seed=st.integers(0, 9))
def test_what_is_pending_is_not_suggested_again(
    make: Make, num_devices: int, num_ended: int, seed: int
) -> None:
    backend = make(SPACE, seed)
    points = islice(SPACE.points(), 0, 977 * (num_ended - 1), 977)
    observations = [serve(HOME), *(serve(SPACE.decode(point)) for point in points)]
    pending: list[Mapping[str, KnobValue]] = []
    for number in range(num_devices):
        found = backend.suggest(observations, incumbent=HOME, num_left=20 - number, pending=pending)
        assert found is not None
        assert found.values not in pending
        assert SPACE.is_valid(SPACE.encode(found.values))
        pending.append(found.values)


@every_backend
def test_a_pending_last_point_leaves_nothing(make: Make) -> None:
    pages = [{"page_size": size} for size in (8, 16, 32, 64, 128)]
    crashed = [
        Observation(values=values, objective=None, crash=Crash.OOM_DEVICE) for values in pages[:2]
    ]
    home = Observation(values=PAGES.default_values, objective=0.0)
    found = make(PAGES, 0).suggest(
        [home, *crashed], incumbent=PAGES.default_values, num_left=9, pending=pages[3:]
    )
    assert found is None


def test_a_pending_repeat_counts_as_one() -> None:
    lucky = HOME | {"max_num_active_seqs": 8}
    observations = [*[serve(HOME)] * 3, serve(lucky)]
    backend = ConstrainedSearch(space=SPACE, seed=0)
    asked = backend.suggest(observations, incumbent=HOME, num_left=3)
    assert asked is not None and asked.values == lucky and "once more" in asked.reason
    other = backend.suggest(observations, incumbent=HOME, num_left=2, pending=[lucky])
    assert other is not None and other.values != lucky


def test_filling_the_space_goes_on_where_the_pending_trials_are() -> None:
    backend = ConstrainedSearch(space=SPACE, seed=0, num_initial=4)
    pending: list[Mapping[str, KnobValue]] = []
    for _ in range(4):
        found = backend.suggest([serve(HOME)], incumbent=HOME, num_left=9, pending=pending)
        assert found is not None and found.reason == "fills the space"
        pending.append(found.values)
    alone = [serve(HOME)]
    for _ in range(4):
        found = backend.suggest(alone, incumbent=HOME, num_left=9)
        assert found is not None
        alone.append(serve(found.values))
    assert pending == [item.values for item in alone[1:]]


def test_stock_is_told_what_its_own_batches_are_told() -> None:
    """The point that the library's own ``ask`` for two, with the lie ``cl_min``, gives second."""
    import warnings

    from skopt import Optimizer
    from skopt.space import Integer

    from sparsed.tuner.stock import losses

    generator = random.Random(4)
    everywhere = list(SPACE.points())
    observations = [serve(SPACE.decode(generator.choice(everywhere))) for _ in range(12)]
    first = StockSearch(space=SPACE, seed=5).suggest(observations, incumbent=HOME, num_left=9)
    assert first is not None and first.reason.startswith("expected improvement")
    second = StockSearch(space=SPACE, seed=5).suggest(
        observations, incumbent=HOME, num_left=9, pending=[first.values]
    )
    assert second is not None
    optimizer = Optimizer(
        [Integer(0, max(1, len(ladder.rungs) - 1)) for ladder in SPACE.ladders],
        n_initial_points=0,
        random_state=random.Random("5:13").randrange(1 << 31),
    )
    told = losses(observations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.tell(
            [*(list(point) for point in points_of(observations)), list(SPACE.encode(first.values))],
            [*told, min(told)],
        )
        assert SPACE.encode(second.values) == tuple(int(rung) for rung in optimizer.ask())
