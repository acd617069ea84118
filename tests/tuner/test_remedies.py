"""What would help: every remedy can be carried out, and is one for what binds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sparsed.core import (
    KNOB_GUIDES,
    KNOB_SPECS,
    KNOBS_BY_NAME,
    PAGE_SIZES,
    Bound,
    InputError,
    KnobClass,
    Knobs,
    SparseMethod,
    Verdict,
    WaitReason,
)
from sparsed.tuner.remedies import BEYOND, remedies

KNOBS = Knobs(
    token_budget=2048,
    hbm_budget=4096,
    max_num_active_seqs=8,
    prefill_chunk=2048,
    page_size=32,
    sparse_method="mean-key",
    dense_layers=2,
    max_num_seqs=16,
    kv_hbm_gib=8.0,
    kv_dram_gib=64.0,
    max_model_len=8192,
    copy_programs=32,
)


def verdict(bound: Bound, limit: WaitReason | None = None) -> Verdict:
    return Verdict(bound=bound, reason="because", limit=limit)


def moves(found: Verdict, knobs: Knobs = KNOBS) -> dict[str | None, bool | None]:
    return {item.knob: item.up for item in remedies(found, knobs)}


def test_every_knob_has_a_guide_and_every_bound_a_last_word() -> None:
    assert list(KNOB_GUIDES) == [spec.name for spec in KNOB_SPECS]
    assert set(BEYOND) == set(Bound)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            verdict(Bound.CAPACITY, WaitReason.DRAM_TIER),
            {"kv_dram_gib": True, None: None},
        ),
        (
            verdict(Bound.CAPACITY, WaitReason.ACTIVE_LIMIT),
            {"max_num_active_seqs": True, "max_num_seqs": True, None: None},
        ),
        (verdict(Bound.CAPACITY, WaitReason.SPILLED), {"kv_hbm_gib": True, None: None}),
        (verdict(Bound.HBM), {"token_budget": False, "dense_layers": False, None: None}),
        (verdict(Bound.COMPUTE), {"prefill_chunk": False, None: None}),
        (verdict(Bound.HOST), {"prefill_chunk": True, None: None}),
        (verdict(Bound.IDLE), {None: None}),
        (verdict(Bound.UNKNOWN), {None: None}),
    ],
)
def test_remedies_fit_what_binds(found: Verdict, expected: dict[str | None, bool | None]) -> None:
    assert moves(found) == expected


def test_hot_knobs_come_first_and_the_last_word_last() -> None:
    names = [item.knob for item in remedies(verdict(Bound.LINK), KNOBS)]
    assert names.pop() is None
    restart = [KNOBS_BY_NAME[name or ""].klass is KnobClass.RESTART for name in names]
    assert restart == sorted(restart) and any(restart) and not all(restart)


@pytest.mark.parametrize(
    ("found", "changes", "gone"),
    [
        (verdict(Bound.LINK), {"token_budget": 256, "page_size": 8}, "token_budget"),
        (verdict(Bound.LINK), {"token_budget": 512, "page_size": 128}, "token_budget"),
        (verdict(Bound.LINK), {"page_size": 128}, "page_size"),
        (verdict(Bound.LINK), {"dense_layers": 0}, "dense_layers"),
        (verdict(Bound.LINK), {"max_num_active_seqs": 1}, "max_num_active_seqs"),
        (verdict(Bound.LINK), {"hbm_budget": None}, "hbm_budget"),
        (verdict(Bound.LINK), {"copy_programs": None}, "copy_programs"),
        (verdict(Bound.LINK), {"residency_watermark": 0.0}, "residency_watermark"),
        (verdict(Bound.HBM), {"sparse_method": SparseMethod.DENSE.value}, "token_budget"),
        (
            verdict(Bound.CAPACITY, WaitReason.ACTIVE_LIMIT),
            {"max_num_active_seqs": 16},
            "max_num_active_seqs",
        ),
        (
            verdict(Bound.CAPACITY, WaitReason.HOT_TIER),
            {"hbm_budget": 2048},
            "hbm_budget",
        ),
    ],
)
def test_what_has_no_room_or_no_effect_is_left_out(
    found: Verdict, changes: dict[str, Any], gone: str
) -> None:
    assert gone in moves(found)
    assert gone not in moves(found, replace(KNOBS, **changes))


@given(
    st.sampled_from(Bound),
    st.one_of(st.none(), st.sampled_from(WaitReason)),
    st.integers(256, 8192),
    st.sampled_from(PAGE_SIZES),
    st.one_of(st.none(), st.integers(256, 32768)),
    st.integers(1, 1024),
)
@example(Bound.LINK, None, 260, 64, None, 1)  # four pages of 65 would fit, but the next size is 128
def test_a_small_move_of_every_remedy_is_allowed(
    bound: Bound,
    limit: WaitReason | None,
    budget: int,
    page_size: int,
    hbm_budget: int | None,
    active: int,
) -> None:
    budget = max(budget, 4 * page_size)
    knobs = replace(
        KNOBS,
        token_budget=budget,
        page_size=page_size,
        hbm_budget=None if hbm_budget is None else max(budget, hbm_budget),
        max_num_active_seqs=active,
        max_num_seqs=1024,
    )
    for item in remedies(verdict(bound, limit), knobs):
        if item.knob is None:
            continue
        value, spec = getattr(knobs, item.knob), KNOBS_BY_NAME[item.knob]
        if item.knob == "page_size":
            moved = value * 2 if item.up else value // 2
        else:
            step = 1 if spec.integer else 1e-6
            moved = value + step if item.up else value - step
        try:
            knobs.with_values({item.knob: moved})
        except InputError as error:
            pytest.fail(f"{item}: {error}")
