"""A warm start: taken where it helps, given up where the trials speak against it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import KNOBS

from sparsed.core import KnobValue
from sparsed.tuner.beliefs import Expectation, expect_nothing
from sparsed.tuner.constrained import ConstrainedSearch, MemoryLimit
from sparsed.tuner.policy import Constraint, Observation
from sparsed.tuner.space import build_space
from sparsed.tuner.warm import MIN_TRIALS, WarmStart, misleads, warm_prior

SPACE = build_space(KNOBS, auto_hbm_budget=4096)
HOME = SPACE.default_values
BEST = SPACE.decode(SPACE.encode({"token_budget": 512, "max_num_active_seqs": 12}))
ANCHORS: tuple[tuple[Mapping[str, KnobValue], float], ...] = (
    (HOME, 0.0),
    (BEST, math.log(1.4)),
)
WARM = WarmStart(values=BEST, anchors=ANCHORS)


def gain_of(values: Mapping[str, KnobValue], *, sign: float = 1.0) -> float:
    """Falls off from ``BEST`` in every direction; with sign -1 that is the worst."""
    pairs = zip(SPACE.encode(values), SPACE.encode(BEST), strict=True)
    return -sign * 0.02 * sum((one - other) ** 2 for one, other in pairs)


def observed(values: Mapping[str, KnobValue], sign: float = 1.0) -> Observation:
    return Observation(values=values, objective=gain_of(values, sign=sign))


def search(
    num_trials: int, *, warm: WarmStart | None, sign: float = 1.0
) -> tuple[ConstrainedSearch, list[Observation]]:
    backend = ConstrainedSearch(space=SPACE, seed=1, warm=warm)
    done: list[Observation] = []
    for number in range(num_trials):
        suggestion = backend.suggest(done, incumbent=HOME, num_left=num_trials - number)
        assert suggestion is not None
        done.append(observed(suggestion.values, sign))
    return backend, done


def test_the_prior_passes_near_its_anchors_and_keeps_what_was_known() -> None:
    def base(values: Mapping[str, KnobValue]) -> Expectation:
        return Expectation(objective=2.0, slacks={Constraint.HBM: -0.5})

    prior = warm_prior(SPACE, WARM, base=base, seed=0)
    assert prior(HOME).objective == pytest.approx(2.0, abs=0.1)
    assert prior(BEST).objective == pytest.approx(2.0 + math.log(1.4), abs=0.1)
    assert prior(BEST).slacks == {Constraint.HBM: -0.5}
    bare = WarmStart(values=BEST)
    assert warm_prior(SPACE, bare, base=base, seed=0) is base


def test_a_good_start_is_where_the_first_trials_go() -> None:
    _, warm = search(3, warm=WARM)
    _, cold = search(3, warm=None)
    assert warm[1].values == BEST
    assert all(gain_of(item.values) < gain_of(BEST) for item in cold)


@pytest.mark.parametrize("num_left", [9, 2])
def test_a_start_that_is_being_tried_is_not_tried_again(num_left: int) -> None:
    backend = ConstrainedSearch(space=SPACE, seed=1, warm=WARM)
    ask = partial(backend.suggest, [observed(HOME)], incumbent=HOME, num_left=num_left)
    first = ask()
    assert first is not None and first.values == BEST
    second = ask(pending=[BEST])
    assert second is not None and second.values not in (BEST, HOME)


def test_a_misleading_start_is_dropped_after_five_trials() -> None:
    backend, done = search(MIN_TRIALS, warm=WARM, sign=-1.0)
    assert not backend.has_dropped_warm(done[:-1])
    assert backend.has_dropped_warm(done)
    cold = ConstrainedSearch(space=SPACE, seed=1)
    ask = partial(backend.suggest, done, incumbent=HOME, num_left=9)
    assert ask() == cold.suggest(done, incumbent=HOME, num_left=9)


def test_a_good_start_is_not_dropped() -> None:
    backend, done = search(8, warm=WARM)
    assert not backend.has_dropped_warm(done)


def test_where_memory_does_not_hold_it_it_is_no_centre() -> None:
    def memory(values: Mapping[str, KnobValue]) -> float:
        return 1.0 if SPACE.encode(values) == SPACE.encode(BEST) else 0.0

    limit = MemoryLimit(predict=memory, limit_bytes=0.5, margin_bytes=0.0)
    backend = ConstrainedSearch(space=SPACE, seed=1, warm=WARM, memory=limit)
    done = [observed(HOME)]
    for _ in range(6):
        suggestion = backend.suggest(done, incumbent=HOME, num_left=9)
        assert suggestion is not None and suggestion.values != BEST
        done.append(observed(suggestion.values))


@given(st.lists(st.floats(-1.0, 1.0), min_size=0, max_size=4))
def test_fewer_than_five_trials_say_nothing(scores: list[float]) -> None:
    prior = warm_prior(SPACE, WARM, base=expect_nothing, seed=0)
    done = [Observation(values=HOME, objective=score) for score in scores]
    assert not misleads(prior, done)


@given(st.permutations(range(6)))
def test_only_the_order_counts(order: list[int]) -> None:
    ranks = {SPACE.encode({"max_num_active_seqs": n}): i for i, n in enumerate((2, 3, 4, 6, 8, 12))}

    def prior(values: Mapping[str, KnobValue]) -> Expectation:
        return Expectation(objective=float(ranks[SPACE.encode(values)]))

    done = [
        Observation(values=SPACE.decode(point), objective=math.exp(order[rank]))
        for point, rank in ranks.items()
    ]
    pairs = [(i, j) for i in range(6) for j in range(i)]
    concordant = sum(1 if order[i] > order[j] else -1 for i, j in pairs)
    assert misleads(prior, done) is (concordant < 0)


def test_a_constant_prior_is_not_dropped() -> None:
    points = ({"max_num_active_seqs": n} for n in (2, 3, 4, 6, 8, 12))
    assert not misleads(expect_nothing, [observed(point) for point in points])
