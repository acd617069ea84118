"""What `sparsed tune` begins from: by a real store and a real start."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from sparsed.controller.links import platform_versions
from sparsed.controller.search_model import search_space
from sparsed.controller.startup import StartPlan
from sparsed.controller.warm_start import Beginning, find_beginning
from sparsed.core import (
    Objective,
    Profile,
    ProfileStatus,
    Slo,
    TrialResult,
    TrialStatus,
    Workload,
    WorkloadRequest,
)
from sparsed.db.memory import InMemoryProfileStore

WORKLOAD = Workload(
    name="w",
    requests=tuple(
        WorkloadRequest(arrival_s=0.0, input_tokens=600, output_tokens=200) for _ in range(8)
    ),
)


@pytest.fixture
def plan(plan_start: Callable[..., StartPlan]) -> StartPlan:
    return plan_start(no_profile=True)


@pytest.fixture
def store() -> InMemoryProfileStore:
    return InMemoryProfileStore()


def profile(plan: StartPlan) -> Profile:
    return Profile(
        key=plan.key,
        values={"token_budget": 512, "prefill_chunk": 256},
        status=ProfileStatus.VERIFIED,
        workload="w",
        objective=Objective.THROUGHPUT,
        default_scores=(10.0,),
        winner_scores=(12.0,),
        versions=platform_versions(plan.machine),
        shape=plan.model.shape,
    )


def begin(
    plan: StartPlan,
    store: InMemoryProfileStore,
    *,
    objective: Objective = Objective.THROUGHPUT,
    is_wanted: bool = True,
) -> Beginning:
    space = search_space(plan, fixed=set(), workload=WORKLOAD)
    return find_beginning(plan, store, space=space, objective=objective, is_wanted=is_wanted)


def test_without_a_profile_it_is_a_cold_start(plan: StartPlan, store: InMemoryProfileStore) -> None:
    assert begin(plan, store).description.startswith("cold start: no profile is near")
    store.save_profile(profile(plan))
    assert begin(plan, store, is_wanted=False).description == "cold start: --no-profile"


@pytest.mark.parametrize("versions", [{}, {"torch": "1.0.0"}])
def test_a_profile_of_this_place_is_the_first_trial(
    plan: StartPlan, store: InMemoryProfileStore, versions: dict[str, str]
) -> None:
    store.save_profile(replace(profile(plan), versions=versions))
    found = begin(plan, store)
    assert found.first is not None and found.warm is None
    assert (found.first["token_budget"], found.first["prefill_chunk"]) == (512, 256)
    assert ("compatible" if versions else "exact") in found.description


def test_a_profile_of_elsewhere_is_centre_and_prior(
    plan: StartPlan, store: InMemoryProfileStore
) -> None:
    there = replace(plan.key, model="another")
    store.save_profile(replace(profile(plan), key=there))
    study = store.start_study(
        there,
        workload=WORKLOAD,
        objective=Objective.THROUGHPUT,
        slo=Slo(),
        seed=0,
        space={},
        versions={},
        started_at=0.0,
    )
    for number, (arm, score) in enumerate((("default", 10.0), ("bayes", 5.0), ("bayes", None))):
        trial = TrialResult(
            number=number,
            arm=arm,
            values={"token_budget": 2048 >> number},
            status=TrialStatus.OK if score else TrialStatus.SLO_BROKEN,
            score=score,
            spread_frac=None,
            metrics={},
        )
        store.record_trial(study, trial)
    found = begin(plan, store)
    assert found.first is None and found.warm is not None
    assert found.warm.values["token_budget"] == 512
    scores = [score for _, score in found.warm.anchors]
    assert scores == pytest.approx([0.0, math.log(1.2), math.log(0.5)])
    assert "transfer: model: tuned on another" in found.description
    other = begin(plan, store, objective=Objective.GOODPUT)
    assert other.warm is not None and other.warm.anchors == ()


def test_what_comes_to_the_default_is_nothing_to_begin_from(
    plan: StartPlan, store: InMemoryProfileStore
) -> None:
    default = plan.spec.knobs.token_budget
    store.save_profile(replace(profile(plan), values={"token_budget": default}))
    assert "comes to the default" in begin(plan, store).description
