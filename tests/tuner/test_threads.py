"""Models are fitted on one thread, whoever asks and whatever the process was started with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from serving import KNOBS
from sklearn.gaussian_process import GaussianProcessRegressor
from threadpoolctl import threadpool_info, threadpool_limits

from sparsed.tuner.constrained import ConstrainedSearch
from sparsed.tuner.policy import Observation, SearchBackend
from sparsed.tuner.space import build_space
from sparsed.tuner.stock import NUM_INITIAL, StockSearch

SPACE = build_space(KNOBS, auto_hbm_budget=4096)


def widths() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info()}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[set[int]]]:
    """The widths of all pools whenever a process is fitted or asked, in a process with wide ones."""
    found: list[set[int]] = []

    def watched(name: str) -> Any:
        original = getattr(GaussianProcessRegressor, name)

        def call(self: GaussianProcessRegressor, *args: Any, **kwargs: Any) -> Any:
            found.append(widths())
            return original(self, *args, **kwargs)

        return call

    for name in ("fit", "predict"):
        monkeypatch.setattr(GaussianProcessRegressor, name, watched(name))
    with threadpool_limits(limits=2):
        assert 2 in widths()
        yield found
        assert 2 in widths(), "the limit is gone with the block"


@pytest.mark.parametrize(
    "backend", [ConstrainedSearch(space=SPACE, seed=0), StockSearch(space=SPACE, seed=0)]
)
def test_a_suggestion_computes_on_one_thread(backend: SearchBackend, seen: list[set[int]]) -> None:
    points = [SPACE.default_values, *map(SPACE.decode, SPACE.points())][: NUM_INITIAL + 1]
    observations = [
        Observation(values=values, objective=math.log(1.0 + number))
        for number, values in enumerate(points)
    ]
    assert backend.suggest(observations, incumbent=SPACE.default_values, num_left=5) is not None
    assert seen and set().union(*seen) == {1}
