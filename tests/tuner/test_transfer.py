"""How far a profile is good elsewhere, and what its values come to there."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsed.core import (
    DTYPE_BYTES,
    KNOBS_BY_NAME,
    GpuRates,
    MatchLevel,
    Objective,
    Profile,
    ProfileKey,
    ProfileStatus,
)
from sparsed.engine.models.dummy import dummy_config
from sparsed.tuner.transfer import (
    MAX_OCTAVES,
    Site,
    carry_over,
    distance,
    match,
    match_profile,
    nearest,
)

SHAPE = replace(dummy_config("dummy:llama-3.1-8b").shape, num_parameters=8_000_000_000)
H100 = GpuRates(
    name="H100",
    hbm_bytes=80 << 30,
    copy_bytes_per_s=3e12,
    link_bytes_per_s=5e10,
    matmul_flop_per_s=8e14,
    is_measured=True,
)
H200 = replace(H100, name="H200", copy_bytes_per_s=4.3e12)
KEY = ProfileKey(hardware="gpu:NVIDIA H100 80GB HBM3:80GiB", model="m-8b", dtype="bfloat16")
VERSIONS = {"sparsed": "0.1.0", "torch": "2.13.0"}
HERE = Site(key=KEY, versions=VERSIONS, shape=SHAPE, rates=H100)
PROFILE = Profile(
    key=KEY,
    values={"page_size": 32, "max_num_active_seqs": 24, "token_budget": 1024},
    status=ProfileStatus.VERIFIED,
    workload="chat",
    objective=Objective.THROUGHPUT,
    versions=VERSIONS,
    profile_id=1,
    shape=SHAPE,
)


def rates_of(name: str) -> GpuRates | None:
    return {"NVIDIA H100 80GB HBM3": H100, "NVIDIA H200": H200}.get(name)


sizes = st.sampled_from([32, 64, 128, 256])
platforms = st.builds(
    lambda name, gib, model, dtype, layers, heads, head_dim, has_shape: Site(
        key=ProfileKey(hardware=f"gpu:{name}:{gib}GiB", model=model, dtype=dtype),
        versions=VERSIONS,
        shape=replace(SHAPE, num_layers=layers, num_kv_heads=heads, head_dim=head_dim)
        if has_shape
        else None,
        rates=rates_of(name),
    ),
    st.sampled_from(["NVIDIA H100 80GB HBM3", "NVIDIA H200", "odd: name"]),
    st.integers(8, 200),
    st.sampled_from(["a", "b"]),
    st.sampled_from(sorted(DTYPE_BYTES)),
    st.integers(8, 96),
    st.integers(1, 16),
    sizes,
    st.booleans(),
)


@given(platforms, platforms)
def test_the_distance_is_symmetric_and_nothing_between_equals(one: Site, other: Site) -> None:
    assert distance(one, other) == pytest.approx(distance(other, one))
    assert distance(one, one) == 0.0
    assert match(one, one).level is MatchLevel.EXACT


@pytest.mark.parametrize("size", [0, -1, 10**400])
@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_dim"])
def test_a_size_that_no_model_has_is_far_away_at_most(name: str, size: int) -> None:
    key = replace(KEY, model="another")
    there = replace(HERE, key=key, shape=replace(SHAPE, **{name: size}))
    assert distance(there, HERE) >= 1.0
    assert math.isfinite(distance(there, HERE))


def test_hardware_with_more_memory_than_there_is_is_of_no_kind() -> None:
    key = replace(KEY, hardware=f"gpu:NVIDIA H100:{400 * '9'}GiB")
    assert match(replace(HERE, key=key), HERE).level is MatchLevel.NONE


@given(platforms, platforms)
def test_the_level_says_what_differs(there: Site, here: Site) -> None:
    found = match(there, here)
    if there.key == here.key:
        assert found.level is MatchLevel.EXACT
        return
    assert found.level in (MatchLevel.TRANSFER, MatchLevel.NONE)
    assert (found.level is MatchLevel.NONE) is (found.distance > MAX_OCTAVES)
    for name in ("hardware", "model", "dtype"):
        differs = getattr(there.key, name) != getattr(here.key, name)
        assert (f"{name}: tuned on" in found.why) is differs


def test_other_versions_are_compatible_and_labels_of_builds_are_no_versions() -> None:
    newer = replace(HERE, versions={**VERSIONS, "torch": "2.14.0"})
    found = match(HERE, newer)
    assert found.level is MatchLevel.COMPATIBLE
    assert found.why == "torch 2.13.0 -> 2.14.0"
    labelled = replace(HERE, versions={**VERSIONS, "torch": "2.13.0+cu130", "cuda": "13.0"})
    assert match(HERE, labelled).level is MatchLevel.EXACT


@pytest.mark.parametrize("hardware", ["cpu:x:2:80GiB", "who knows", "gpu:NVIDIA H100:80"])
def test_hardware_of_another_kind_is_no_match(hardware: str) -> None:
    there = replace(HERE, key=replace(KEY, hardware=hardware))
    assert match(there, HERE).level is MatchLevel.NONE
    assert match(HERE, there).level is MatchLevel.NONE


def test_what_ships_is_compatible_at_the_most() -> None:
    seed = replace(PROFILE, seed="m-8b-h100", profile_id=None)
    found = match_profile(seed, HERE, rates_of=rates_of)
    assert found.level is MatchLevel.COMPATIBLE and "ships" in found.why
    elsewhere = replace(HERE, key=replace(KEY, model="other"))
    assert match_profile(seed, elsewhere, rates_of=rates_of).level is MatchLevel.TRANSFER


def test_what_is_stale_is_compatible_at_the_most_and_may_still_begin_a_search() -> None:
    stale = replace(PROFILE, status=ProfileStatus.STALE)
    found = match_profile(stale, HERE, rates_of=rates_of)
    assert found.level is MatchLevel.COMPATIBLE and "had changed" in found.why
    newer = replace(HERE, versions={**VERSIONS, "torch": "2.14.0"})
    assert match_profile(stale, newer, rates_of=rates_of).why == "torch 2.13.0 -> 2.14.0"
    elsewhere = replace(HERE, key=replace(KEY, model="other"))
    assert match_profile(stale, elsewhere, rates_of=rates_of).level is MatchLevel.TRANSFER
    first = nearest([stale], HERE, rates_of=rates_of)
    assert first is not None and first.profile is stale
    exact = nearest([stale, replace(PROFILE, created_at=-1.0)], HERE, rates_of=rates_of)
    assert exact is not None and exact.match.level is MatchLevel.EXACT


def test_the_nearest_key_wins_and_only_what_is_verified_or_pinned() -> None:
    h200 = replace(KEY, hardware="gpu:NVIDIA H200:140GiB")
    far = replace(PROFILE, key=replace(h200, model="x"), shape=replace(SHAPE, num_kv_heads=1))
    near = replace(PROFILE, key=replace(KEY, model="y"), profile_id=2)
    draft = replace(PROFILE, status=ProfileStatus.DRAFT, profile_id=3)
    found = nearest([far, near, draft], HERE, rates_of=rates_of)
    assert found is not None and found.profile is near
    pinned = replace(draft, pinned=True)
    found = nearest([far, near, pinned, PROFILE], HERE, rates_of=rates_of)
    assert found is not None and found.profile is pinned
    assert nearest([draft], HERE, rates_of=rates_of) is None


@given(platforms)
def test_values_stay_on_their_own_platform(platform: Site) -> None:
    values = {"page_size": 16, "max_num_active_seqs": 5, "token_budget": 512, "hbm_budget": None}
    assert carry_over(values, there=platform, here=platform) == values


@given(platforms, platforms, st.sampled_from([8, 16, 32, 64, 128]), st.integers(1, 256))
def test_pages_keep_their_bytes_and_requests_their_share(
    there: Site, here: Site, page_size: int, active: int
) -> None:
    values = {"page_size": page_size, "max_num_active_seqs": active, "prefill_chunk": 512}
    carried = carry_over(values, there=there, here=here)
    sizes = [int(choice) for choice in KNOBS_BY_NAME["page_size"].choices]
    assert carried["page_size"] in sizes and carried["prefill_chunk"] == 512
    assert isinstance(carried["max_num_active_seqs"], int) and carried["max_num_active_seqs"] >= 1
    if there.shape is None or here.shape is None:
        assert carried == values
        return
    ratio = there.shape.head_dim * DTYPE_BYTES[there.key.dtype]
    ratio /= here.shape.head_dim * DTYPE_BYTES[here.key.dtype]
    wanted = min(max(page_size * ratio, min(sizes)), max(sizes))
    assert isinstance(carried["page_size"], int)
    assert abs(math.log2(carried["page_size"] / wanted)) <= 0.5 + 1e-9


def test_more_memory_takes_more_requests() -> None:
    there, here = HERE, replace(HERE, key=replace(KEY, hardware="gpu:NVIDIA H200:141GiB"))
    carried = carry_over({"max_num_active_seqs": 24}, there=there, here=here)
    weights_gib = 16e9 / (1 << 30)
    share = (141 - weights_gib) / (80 - weights_gib)
    assert carried["max_num_active_seqs"] == round(24 * share)
