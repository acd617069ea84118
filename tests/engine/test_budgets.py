"""Blocks of requests: within bounds, none lost, and no exchange of one that would save misses."""

from __future__ import annotations

from functools import partial
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsed.engine.budgets import Share, by_gain, even, is_worth_it, multiple_of
from sparsed.engine.hit_curve import (
    START_EXPONENT,
    START_MISS_FRAC,
    Learned,
    MissCurve,
    measured_curve,
)
from sparsed.engine.kvcache.shares import Rule

SLOTS = 8  # of a block, all lanes together


@st.composite
def curves(draw: st.DrawFn) -> MissCurve:
    selected = draw(st.integers(8, 400))
    return MissCurve(
        slots=draw(st.integers(8, 2000)),
        misses=draw(st.floats(0.01, 200)),
        exponent=draw(st.floats(0.05, 8)),
        selected=selected,
        total=draw(st.integers(selected, 4000)),
    )


@st.composite
def shares(draw: st.DrawFn) -> Share:
    least = draw(st.integers(1, 20))
    return Share(
        least=least, most=least + draw(st.integers(0, 40)), curve=draw(curves()),
        slots_per_block=SLOTS,
    )  # fmt: skip


def power_law(share: Share, blocks: int) -> float:
    """Misses as the closed form takes them: without caps."""
    curve = share.curve
    return float(curve.misses * (curve.slots / (blocks * SLOTS)) ** curve.exponent)


@pytest.mark.parametrize("rule", [by_gain, even, partial(multiple_of, residency=2.5)])
@given(data=st.data())
def test_every_rule_keeps_the_bounds_and_the_sum(rule: Rule, data: st.DataObject) -> None:
    claims = data.draw(st.lists(shares(), min_size=1, max_size=6))
    least = sum(share.least for share in claims)
    total = data.draw(st.integers(least, least + 120))
    found = rule(claims, total)
    assert all(s.least <= b <= s.most for s, b in zip(claims, found, strict=True))
    assert sum(found) <= total
    if not isinstance(rule, partial):
        assert sum(found) == min(total, sum(share.most for share in claims))


@settings(max_examples=60)
@given(st.lists(shares(), min_size=2, max_size=5), st.integers(0, 80))
def test_no_exchange_of_a_block_saves_misses(claims: list[Share], extra: int) -> None:
    """A request is rounded by less than a block: the second one away it would not give, and the
    second one on top it would not want."""
    found = by_gain(claims, sum(share.least for share in claims) + extra)
    for (a, x), (b, y) in permutations(zip(claims, found, strict=True), 2):
        if x > a.least + 1 and y < b.most - 1:
            lost = power_law(a, x - 2) - power_law(a, x - 1)
            gained = power_law(b, y + 1) - power_law(b, y + 2)
            assert gained <= lost * (1 + 1e-6) + 1e-9


def test_the_request_that_misses_more_gets_more() -> None:
    calm, restless = (
        MissCurve(slots=80, misses=m, exponent=1.0, selected=64, total=9999) for m in (1.0, 16.0)
    )
    claims = [
        Share(least=2, most=99, curve=curve, slots_per_block=SLOTS) for curve in (calm, restless)
    ]
    few, many = by_gain(claims, 50)
    assert (few, many) == (10, 40), "gains are equal where blocks go with the root of the misses"
    assert even(claims, 50) == [25, 25]
    assert multiple_of(claims, 50, residency=4) == [8, 8]
    assert multiple_of(claims, 11, residency=4) == [8, 3], "the oldest is served first"


def test_nobody_gets_less_than_it_cannot_go_without() -> None:
    with pytest.raises(AssertionError, match="mandatory"):
        by_gain([Share(least=3, most=5, curve=Learned().curve(slots=8, selected=8, total=99),
                       slots_per_block=SLOTS)], 2)  # fmt: skip


@given(curves(), st.lists(st.floats(1, 5000), min_size=2, max_size=6))
def test_misses_fall_with_slots(curve: MissCurve, slots: list[float]) -> None:
    found = [curve.at(count) for count in sorted(slots)]
    assert found == sorted(found, reverse=True)
    assert all(0 <= misses <= curve.selected * (1 + 1e-9) for misses in found)
    assert curve.at(curve.total) == 0


def test_a_measured_curve_meets_its_point() -> None:
    curve = measured_curve(
        slots=256, selected=64, total=2000, misses=639, returns=1000, num_steps=100
    )
    assert curve.at(256) == pytest.approx(6.4)
    assert curve.at(128) > 6.4 > curve.at(512)
    steep = measured_curve(
        slots=256, selected=64, total=2000, misses=639, returns=9000, num_steps=100
    )
    assert steep.exponent > curve.exponent, "more returns: slots save more"


def test_what_is_learned_moves_towards_what_is_seen() -> None:
    learned = Learned()
    assert learned.curve(slots=64, selected=64, total=999).misses == 64 * START_MISS_FRAC
    assert learned.curve(slots=128, selected=64, total=999).misses == pytest.approx(
        64 * START_MISS_FRAC / 2**START_EXPONENT
    )
    seen = MissCurve(slots=128, misses=1.0, exponent=2.0, selected=64, total=999)
    for _ in range(200):
        learned = learned.learn(ratio=3.0, curve=seen)
    assert learned.ratio == pytest.approx(3.0)
    assert learned.curve(slots=128, selected=64, total=999).misses == pytest.approx(1.0)
    assert learned.working_set(selected=64, total=100) == 100


@given(st.integers(1, 200), st.integers(1, 200))
def test_small_changes_are_left_alone(now: int, wanted: int) -> None:
    assert is_worth_it(now, wanted) == (abs(wanted - now) >= max(1, now / 8))
