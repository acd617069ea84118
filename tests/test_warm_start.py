"""The arithmetic of the benchmark of warm starts, and of measuring a profile that ships."""

from __future__ import annotations

from pathlib import Path

import pytest
import seed_profiles
from hypothesis import given
from hypothesis import strategies as st
from scaled_daemon import Answer
from warm_start import goodput, reached_s, summarize

from sparsed.controller.seeds import load_seeds
from sparsed.core import Objective, Profile, ProfileKey, ProfileStatus

PROFILE = Profile(
    key=ProfileKey(hardware="gpu:x:80GiB", model="m", dtype="bfloat16"),
    values={"prefill_chunk": 512},
    status=ProfileStatus.VERIFIED,
    workload="mixed",
    objective=Objective.THROUGHPUT,
)
answers = st.lists(st.builds(Answer, ended_s=st.floats(0, 100), meets_slo=st.booleans()))


@given(answers)
def test_windows_add_up_and_late_answers_count_for_nothing(found: list[Answer]) -> None:
    parts = [goodput(found, begin_s=10.0 * i, end_s=10.0 * i + 10) for i in range(11)]
    whole = goodput(found, begin_s=0.0, end_s=110.0)
    assert 10.0 * sum(parts) == pytest.approx(110.0 * whole)
    assert 110.0 * whole == pytest.approx(sum(item.meets_slo for item in found))


def test_shares_are_of_the_final_goodput() -> None:
    warm = {"first": 1.9, "last_half": 2.0, "goodput": [1.7, 2.0], "window_s": 10.0}
    cold = {"first": 0.5, "last_half": 0.6, "goodput": [0.4, 0.6], "window_s": 10.0}
    found = summarize(warm, cold)
    assert found["warm_first_frac"] == pytest.approx(0.95) and found["meets_target"]
    assert found["cold_first_frac"] == pytest.approx(0.25) and found["cold_reached_s"] is None
    assert found["warm_reached_s"] == 20.0
    assert reached_s([1.8, 0.0], window_s=10.0, wanted=1.8) == 10.0
    with pytest.raises(SystemExit, match="no request kept"):
        summarize(warm | {"last_half": 0.0}, cold)


def test_a_verified_profile_is_kept_as_a_seed_and_a_draft_is_not(tmp_path: Path) -> None:
    seed_profiles.keep(PROFILE, name="m-x", folder=tmp_path)
    (found,) = load_seeds(tmp_path)
    assert (found.seed, found.values, found.profile_id) == ("m-x", PROFILE.values, None)
    draft = Profile(
        key=PROFILE.key,
        values={},
        status=ProfileStatus.DRAFT,
        workload="mixed",
        objective=Objective.THROUGHPUT,
    )
    with pytest.raises(SystemExit, match="default stays"):
        seed_profiles.keep(draft, name="m-y", folder=tmp_path)
    assert len(load_seeds(tmp_path)) == 1


def test_what_ships_can_be_read_and_is_verified() -> None:
    assert all(seed.status is ProfileStatus.VERIFIED and seed.shape for seed in load_seeds())
