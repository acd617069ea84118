"""Start plans: what was asked, what a profile adds, what the machine gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsed.controller import start_values, startup
from sparsed.controller.config import DaemonConfig
from sparsed.controller.control import KnobSource
from sparsed.controller.lookups import FindTuned
from sparsed.controller.recovery import SAFE_VALUES, TunedValues
from sparsed.controller.startup import StartPlan, describe_plan, num_fitting, prepare
from sparsed.core import (
    GIB,
    QUEUED_RECALL_STRIDE,
    RECALL_STRIDE,
    WATCHED_RECALL_STRIDE,
    InputError,
    KnobValue,
    Objective,
    Profile,
    ProfileKey,
    ProfileStatus,
    RolloutReason,
    RolloutRecord,
    RolloutState,
    SparseMethod,
)
from sparsed.db import open_store
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.dram import DramPool
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.kvcache.hbm import HotArena
from sparsed.engine.kvcache.tables import PageTables
from sparsed.engine.kvcache.transfer import Transfer

PlanStart = Callable[..., StartPlan]
Configure = Callable[..., DaemonConfig]
KEY = ProfileKey(hardware="cpu", model="dummy:tiny", dtype="float32")


def profile(**values: KnobValue) -> Profile:
    return Profile(
        key=KEY,
        values=values,
        status=ProfileStatus.VERIFIED,
        workload="chat",
        objective=Objective.THROUGHPUT,
        default_scores=(10.0, 10.0, 10.0),
        winner_scores=(12.0, 12.0, 12.0),
        profile_id=7,
    )


def test_a_start_without_wishes(plan_start: PlanStart) -> None:
    plan = plan_start(find_verified=lambda key: None)
    assert plan.spec.model == "dummy:tiny"
    assert (plan.spec.device, plan.spec.dtype) == ("cpu", "float32")
    assert plan.key == ProfileKey(
        hardware=plan.machine.fingerprint, model="dummy:tiny", dtype="float32"
    )
    assert plan.profile.startswith("none: no verified one for dummy:tiny")
    assert plan.tokenizer_dir is None
    assert plan.sources["token_budget"] is KnobSource.DEFAULT
    assert plan.sources["kv_hbm_gib"] is KnobSource.FLAG
    assert plan.sources["max_num_seqs"] is KnobSource.MACHINE


def test_a_gpu_samples_recall_less_often(
    plan_start: PlanStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sample there holds up the steps that are queued."""
    on_cpu = plan_start(no_profile=True)
    assert (on_cpu.spec.recall_stride, on_cpu.max_prefill_chunk) == (RECALL_STRIDE, None)
    machine = replace(startup.read_machine(), hbm_total_bytes=80 * GIB, hbm_free_bytes=70 * GIB)
    monkeypatch.setattr(startup, "find_device", lambda _asked: ("cuda:0", machine))
    monkeypatch.setattr(startup, "link_key", lambda _machine: None)
    plan = plan_start(no_profile=True, kv_dram_gib=0.1, dtype="bfloat16")
    assert plan.spec.recall_stride == QUEUED_RECALL_STRIDE > RECALL_STRIDE
    watched = plan_start(no_profile=True, kv_dram_gib=0.1, dtype="bfloat16", min_recall=0.9)
    assert watched.spec.recall_stride == WATCHED_RECALL_STRIDE < QUEUED_RECALL_STRIDE
    assert plan.max_prefill_chunk is not None and plan.max_prefill_chunk > 2048


def test_a_profile_fills_in_what_was_not_asked_for(plan_start: PlanStart) -> None:
    asked: list[ProfileKey] = []

    def find(key: ProfileKey) -> Profile:
        asked.append(key)
        return replace(profile(token_budget=512, page_size=16), key=key)

    plan = plan_start(find_verified=find, page_size=64)
    assert asked == [plan.key]
    assert (plan.spec.knobs.token_budget, plan.spec.knobs.page_size) == (512, 64)
    assert plan.sources["token_budget"] is KnobSource.PROFILE
    assert plan.sources["page_size"] is KnobSource.FLAG
    for words in ("#7", "chat", "+20.0% throughput", "token_budget=512"):
        assert words in plan.profile


def test_a_draft_in_a_config_file_claims_nothing(configure: Callable[..., DaemonConfig]) -> None:
    draft = replace(
        profile(), status=ProfileStatus.DRAFT, winner_scores=(), profile_id=None, values={}
    )
    config = replace(configure(), tuned_for=draft)
    words = prepare(config, progress=lambda phase, frac: None).profile
    assert words.startswith("from the config file: draft for ")
    assert words.endswith(", no gain over the default proved")


def test_a_profile_that_does_not_fit_is_left_out(plan_start: PlanStart) -> None:
    too_many = profile(max_num_active_seqs=8)
    plan = plan_start(find_verified=lambda key: replace(too_many, key=key), max_num_seqs=4)
    assert plan.spec.knobs.max_num_active_seqs == 4
    assert plan.profile.startswith("none: #7 does not fit this start (max_num_active_seqs=8")
    assert plan.sources["max_num_active_seqs"] is KnobSource.MACHINE


def test_a_profile_is_not_even_read_when_unwanted(plan_start: PlanStart) -> None:
    def find(key: ProfileKey) -> Profile:
        raise AssertionError("read")

    assert plan_start(find_verified=find, no_profile=True).profile == "none: --no-profile"


def test_profiles_come_from_the_state_directory(configure: Callable[..., DaemonConfig]) -> None:
    config = configure()

    def plan() -> StartPlan:
        return prepare(config, progress=lambda phase, frac: None)

    first = plan()
    assert not config.state_dir.root.exists()  # looking leaves nothing behind
    config.state_dir.root.mkdir()
    store = open_store(config.state_dir.database)
    store.save_profile(replace(profile(token_budget=512), key=first.key, profile_id=None))
    store.close()
    assert plan().spec.knobs.token_budget == 512


@pytest.mark.parametrize(
    ("flags", "field", "says"),
    [
        ({"device": "cuda:9"}, "device", "GPUs"),
        ({"model": "dummy:unheard-of"}, "model", "tiny"),
        ({"model": "/nowhere/at/all"}, "model", "/nowhere/at/all"),
        ({"kv_hbm_gib": 0.001}, "kv_hbm_gib", "at least"),
        ({"kv_hbm_gib": 4000}, "kv_hbm_gib", "4000 of"),
        ({"kv_dram_gib": 60000}, "kv_dram_gib", "60000"),
        ({"max_num_active_seqs": 8, "max_num_seqs": 4}, "max_num_active_seqs", "max_num_seqs=4"),
    ],
)
def test_what_cannot_start_names_the_field(
    plan_start: PlanStart, flags: dict[str, object], field: str, says: str
) -> None:
    with pytest.raises(InputError) as caught:
        plan_start(find_verified=lambda key: None, **flags)
    assert caught.value.field == field
    assert says in str(caught.value)


def test_the_description_shows_every_byte_and_knob(plan_start: PlanStart) -> None:
    plan = plan_start(find_verified=lambda key: None)
    text = describe_plan(plan)
    for name, value in plan.spec.knobs.as_dict().items():
        assert any(
            name in line and ("auto" if value is None else str(value)[:5]) in line
            for line in text.splitlines()
        )
    assert f"{plan.spec.plan.dram_pool_bytes / GIB:.3f} GiB" in text
    assert "131,072 tokens" in text
    assert plan.profile in text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_longer_requests_never_fit_more_often(plan_start: PlanStart, one: int, other: int) -> None:
    plan = plan_start(find_verified=lambda key: None, no_profile=True)
    short, long = sorted((one, other))
    assert num_fitting(plan, long) <= num_fitting(plan, short)
    frames = num_fitting(plan, long) * -(-long // 128)
    assert frames <= plan.spec.plan.num_frames


def make_cache(plan: StartPlan) -> KVCache:
    """The cache that an engine of ``plan`` has."""
    knobs, memory, parts = plan.spec.knobs, plan.spec.plan, {"device": torch.device("cpu")}
    geometry = Geometry.of(plan.model.shape, dtype=plan.spec.dtype, page_size=knobs.page_size)
    num_frames = memory.num_frames
    tables = PageTables(
        geometry,
        num_rows=knobs.max_num_seqs,
        max_model_len=knobs.max_model_len,
        pool_frames=num_frames,
        **parts,
    )
    return KVCache(
        geometry,
        arena=HotArena(geometry, memory, dtype=torch.float32, **parts),
        pool=DramPool(geometry, num_frames=num_frames, pool_fd=None, dtype=torch.float32, **parts),
        tables=tables,
        selector=None,
        transfer=Transfer(page_bytes=geometry.page_bytes, **parts),
        knobs=knobs,
    )


@pytest.mark.parametrize("method", [SparseMethod.DENSE, SparseMethod.MEAN_KEY])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_as_many_requests_fit_as_the_cache_admits(
    plan_start: PlanStart, method: SparseMethod, data: st.DataObject
) -> None:
    plan = plan_start(find_verified=lambda key: None, sparse_method=method.value)
    num_tokens = data.draw(st.integers(1, plan.spec.knobs.max_model_len))
    cache = make_cache(plan)
    count = 0
    while cache.can_admit(num_tokens, method=method, token_budget=None):
        cache.add(num_tokens, method=method, token_budget=None)
        count += 1
    assert num_fitting(plan, num_tokens) == count


def good(**values: KnobValue) -> FindTuned:
    return lambda key: TunedValues(values=values, moved_at=100.0, why="the last known good")


def start_on(
    configure: Configure,
    profile: Profile | None,
    tuned: FindTuned,
    *,
    others: tuple[Profile, ...] = (),
    **flags: object,
) -> Any:
    return prepare(
        configure(**flags),
        progress=lambda phase, frac: None,
        find_verified=lambda key: profile and replace(profile, key=key),
        find_tuned=tuned,
        find_profiles=lambda: others,
    )


def test_what_the_live_tuner_proved_goes_over_the_profile(configure: Configure) -> None:
    old = replace(profile(token_budget=512, prefill_chunk=256), created_at=1.0)
    tuned = good(token_budget=1024, max_num_active_seqs=2)
    plan = start_on(configure, old, tuned, max_num_active_seqs=3, min_recall=0.9)
    knobs, sources = plan.spec.knobs, plan.sources
    assert (knobs.token_budget, knobs.prefill_chunk, knobs.max_num_active_seqs) == (1024, 256, 3)
    assert sources["token_budget"] is KnobSource.TUNER
    assert sources["prefill_chunk"] is KnobSource.PROFILE
    assert sources["max_num_active_seqs"] is KnobSource.FLAG
    for newer in (replace(old, created_at=200.0), replace(old, pinned=True)):
        plan = start_on(configure, newer, tuned)
        assert plan.spec.knobs.token_budget == 512
        assert "instead of the last known good" in plan.profile


def test_a_token_budget_proved_under_a_floor_of_recall_is_left_out_without_one(
    configure: Configure,
) -> None:
    tuned = good(token_budget=512, max_num_active_seqs=2)
    plan = start_on(configure, None, tuned)
    assert (plan.spec.knobs.token_budget, plan.spec.knobs.max_num_active_seqs) == (2048, 2)
    assert "no token_budget, as this start has no --min-recall" in plan.profile
    under_one = start_on(configure, None, tuned, min_recall=0.9)
    assert under_one.spec.knobs.token_budget == 512
    assert "no token_budget" not in under_one.profile


def test_a_last_known_good_that_does_not_fit_is_left_out(configure: Configure) -> None:
    plan = start_on(
        configure, profile(token_budget=512), good(max_num_active_seqs=8), max_num_seqs=4
    )
    assert plan.spec.knobs.max_num_active_seqs == 4
    assert plan.spec.knobs.token_budget == 512
    assert "does not fit this start (max_num_active_seqs=8" in plan.profile


def test_no_profile_leaves_the_live_tuner_out_too(configure: Configure) -> None:
    plan = start_on(configure, None, good(token_budget=1024), no_profile=True)
    assert plan.spec.knobs.token_budget == 2048


@pytest.mark.parametrize("name", ["torch", "triton", "sparsed"])
def test_what_another_platform_proved_is_left_out(configure: Configure, name: str) -> None:
    here = start_on(configure, None, good()).versions
    there = {**here, name: "0.0.1", "driver": "1"}
    old = replace(profile(token_budget=512), versions=there, created_at=1.0, profile_id=3)
    same = TunedValues(values={"prefill_chunk": 256}, moved_at=100.0, why="good", versions=here)
    plan = start_on(configure, old, lambda key: same)
    assert (plan.spec.knobs.token_budget, plan.spec.knobs.prefill_chunk) == (2048, 256)
    assert plan.stale_profile_id == 3 and plan.profile_id is None
    assert f"profile #3 ({name} 0.0.1 -> " in plan.stale
    assert "sparsed tune" in plan.stale and plan.stale in plan.profile
    plan = start_on(configure, old, lambda key: replace(same, versions=there))
    assert plan.spec.knobs.prefill_chunk == 2048 and "last known good" in plan.stale
    tuned_again = replace(old, versions=here, created_at=200.0)
    plan = start_on(configure, tuned_again, lambda key: replace(same, versions=there))
    assert plan.spec.knobs.token_budget == 512 and plan.stale == "", "a newer profile replaces it"
    pinned = start_on(configure, replace(old, pinned=True), good())
    assert pinned.spec.knobs.token_budget == 512 and pinned.stale == ""
    taken = start_on(configure, replace(old, versions=here), lambda key: same)
    assert (taken.stale, taken.profile_id) == ("", 3)


def test_safe_mode_takes_neither(configure: Configure) -> None:
    def safe(key: ProfileKey) -> TunedValues:
        return TunedValues(values=SAFE_VALUES, is_safe=True, why="safe mode")

    plan = start_on(configure, profile(token_budget=512), safe, kv_hbm_gib=0.03)
    assert plan.spec.knobs.with_values(SAFE_VALUES) == plan.spec.knobs
    assert plan.profile == "none: safe mode"


def nothing(key: ProfileKey) -> TunedValues:
    return TunedValues()


def test_a_profile_of_these_versions_is_used_as_it_is(configure: Configure) -> None:
    versions = start_on(configure, None, nothing).versions
    plan = start_on(configure, replace(profile(token_budget=512), versions=versions), nothing)
    assert plan.spec.knobs.token_budget == 512
    assert "; exact: same hardware" in plan.profile
    assert plan.unproved is None


OLD = {"torch": "1.0.0", "triton": "1.0"}


def test_a_profile_of_other_versions_is_left_out_and_to_be_tested_first(
    configure: Configure,
) -> None:
    old = replace(profile(token_budget=512, page_size=16, prefill_chunk=256), versions=OLD)
    plan = start_on(configure, old, nothing, prefill_chunk=1024)
    assert plan.spec.knobs.token_budget == 2048
    assert KnobSource.PROFILE not in plan.sources.values()
    assert "; compatible: torch 1.0.0 -> " in plan.profile
    assert "first candidate of the tuner in mode auto" in plan.profile
    # What was asked for is no part of it, nor what waits for a restart.
    assert plan.unproved is not None and plan.unproved.values == {"token_budget": 512}
    assert plan.unproved.name.startswith("profile #7 on ")
    assert f"torch {plan.versions['torch']}" in plan.unproved.name
    assert plan.unproved.why.startswith("torch 1.0.0 -> ")


def test_what_was_left_out_once_is_still_to_be_tested_at_the_next_start(
    configure: Configure,
) -> None:
    here = start_on(configure, None, nothing)
    stale = replace(
        profile(token_budget=512), key=here.key, versions=OLD, status=ProfileStatus.STALE
    )
    plan = start_on(configure, None, nothing, others=(stale,))
    assert plan.spec.knobs.token_budget == 2048 and plan.stale == ""
    assert plan.unproved is not None and plan.unproved.values == {"token_budget": 512}
    older = replace(stale, status=ProfileStatus.VERIFIED, created_at=-1.0, values={})
    plan = start_on(configure, older, nothing, others=(stale,))
    assert plan.unproved is not None, "the newest one comes first"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"page_size": 16}, "nothing in it for the live tuner"),
        ({"token_budget": 2048}, "nothing in it for the live tuner"),
        ({"max_num_active_seqs": 8}, "does not fit this start (max_num_active_seqs=8"),
    ],
)
def test_a_compatible_profile_may_have_nothing_to_test(
    configure: Configure, values: dict[str, KnobValue], words: str
) -> None:
    old = replace(profile(**values), versions=OLD)
    plan = start_on(configure, old, nothing, max_num_seqs=4)
    assert plan.unproved is None and words in plan.profile


def test_a_pin_needs_no_test(configure: Configure) -> None:
    old = replace(profile(token_budget=512), versions=OLD, pinned=True)
    plan = start_on(configure, old, nothing)
    assert plan.spec.knobs.token_budget == 512 and "; compatible: " in plan.profile
    assert plan.unproved is None


def test_what_was_proved_since_need_not_make_way_for_a_profile(configure: Configure) -> None:
    old = replace(profile(token_budget=512), versions=OLD, created_at=1.0)
    tuned = TunedValues(values={"prefill_chunk": 256}, moved_at=100.0, why="good")
    assert start_on(configure, old, lambda key: tuned).unproved is None
    newer = replace(old, created_at=200.0)
    plan = start_on(configure, newer, lambda key: tuned)
    assert plan.spec.knobs.prefill_chunk == 256
    assert plan.unproved is not None and plan.unproved.values == {"token_budget": 512}


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (RolloutState.REVERTED, RolloutReason.NOT_BETTER),
        (RolloutState.REVERTED, RolloutReason.CRASHED),
        (RolloutState.EXPIRED, RolloutReason.REJECTED),
        (RolloutState.VERIFYING, RolloutReason.COMMITTED),
        (RolloutState.SUCCESS, RolloutReason.PROBATION_PASSED),
    ],
)
def test_a_verdict_on_a_profile_outlives_the_daemon(
    configure: Configure, state: RolloutState, reason: RolloutReason
) -> None:
    old = replace(profile(token_budget=512), versions=OLD)
    first = start_on(configure, old, nothing)
    assert first.unproved is not None
    record = RolloutRecord(
        state=state,
        reason=reason,
        config_from={"token_budget": 2048},
        config_to=first.unproved.values,
        initiated_by="auto",
        at=1.0,
        profile=first.unproved.name,
    )
    ended = replace(record, state=RolloutState.EXPIRED, reason=RolloutReason.SHUT_DOWN)
    plan = start_on(configure, old, lambda key: TunedValues(records=(ended, record)))
    assert plan.unproved is None
    assert f"tested on these versions: {reason}" in plan.profile
    assert start_on(configure, old, lambda key: TunedValues(records=(ended,))).unproved is not None
    elsewhere = replace(record, profile="profile #7 on torch 1")
    plan = start_on(configure, old, lambda key: TunedValues(records=(elsewhere,)))
    assert plan.unproved is not None, "other versions ask for another test"


def test_a_profile_of_elsewhere_is_named_and_never_applied(configure: Configure) -> None:
    here = start_on(configure, None, nothing)
    key = replace(here.key, model="another")
    near = replace(profile(token_budget=512), key=key, shape=here.model.shape)
    plan = start_on(configure, None, nothing, others=(near,))
    assert plan.spec.knobs == here.spec.knobs
    assert plan.profile.startswith("none: no verified one for dummy:tiny")
    assert "sparsed tune begins from #7" in plan.profile
    assert "transfer: model: tuned on another, this is dummy:tiny" in plan.profile
    assert plan.unproved is None


def test_a_seed_of_this_place_is_compatible_at_the_most(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = start_on(configure, None, nothing)
    seed = replace(
        profile(token_budget=512),
        key=here.key,
        versions=here.versions,
        profile_id=None,
        seed="tiny-cpu",
    )
    monkeypatch.setattr(start_values, "load_seeds", lambda: (seed,))
    plan = start_on(configure, None, nothing)
    assert plan.spec.knobs.token_budget == 2048 and plan.stale == ""
    assert "tiny-cpu, verified for dummy:tiny" in plan.profile
    assert "compatible: it ships with sparsed" in plan.profile
    assert plan.unproved is not None and plan.unproved.values == {"token_budget": 512}
    assert plan.unproved.name.startswith("profile tiny-cpu on ")
    own = replace(profile(token_budget=1024), versions=here.versions)
    assert start_on(configure, own, nothing).spec.knobs.token_budget == 1024
