"""Every pair is whole, nothing drifts in favour of one side, and a change is washed out."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from sparsed.tuner.schedule import paired_slots, ranking_slots


def test_the_order_is_a_b_b_a() -> None:
    kept = ["AB"[slot.is_candidate] for slot in paired_slots(6) if not slot.is_discarded]
    assert "".join(kept) == "ABBAABBAABBA"


@given(st.integers(1, 40))
def test_each_pair_has_one_window_of_each_side(num_pairs: int) -> None:
    kept = [slot for slot in paired_slots(num_pairs) if not slot.is_discarded]
    for pair in range(num_pairs):
        sides = [slot.is_candidate for slot in kept if slot.pair == pair]
        assert sorted(sides) == [False, True]
    if num_pairs % 2 == 0:  # a steady drift takes as much from both
        places = [at if slot.is_candidate else -at for at, slot in enumerate(kept)]
        assert sum(places) == 0


@given(st.integers(1, 40))
def test_a_window_is_discarded_just_after_each_change(num_pairs: int) -> None:
    slots = list(paired_slots(num_pairs))
    assert slots[0].is_discarded and not slots[-1].is_discarded
    for before, after in pairwise(slots):
        assert after.is_discarded == (before.is_candidate is not after.is_candidate)


@given(st.integers(1, 5), st.integers(1, 8))
def test_a_ranking_measures_each_configuration_once_a_round(configs: int, rounds: int) -> None:
    slots = list(ranking_slots(configs, rounds))
    assert sorted(slots) == [(turn, at) for turn in range(rounds) for at in range(configs)]
    firsts = [at for turn, at in slots[::configs]]
    assert firsts == [turn % configs for turn in range(rounds)]
