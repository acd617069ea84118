"""The free list against a set: every id has one owner, nothing leaks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sparsed.engine.kvcache.pages import FreeList


class FreeListMachine(RuleBasedStateMachine):
    """Ids are taken in groups and given back in any order, whole groups or parts."""

    @initialize(size=st.integers(0, 40), first=st.integers(0, 3))
    def make(self, size: int, first: int) -> None:
        self.ids = FreeList(size, first=first)
        self.all = set(range(first, first + size))
        self.taken: list[int] = []

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.ids)))
        taken = self.ids.take(count).tolist()
        assert len(taken) == count
        assert not set(taken) & set(self.taken)
        self.taken += taken

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        self.taken = data.draw(st.permutations(self.taken))
        count = data.draw(st.integers(0, len(self.taken)))
        self.ids.give(np.array(self.taken[:count], dtype=np.int64))
        del self.taken[:count]

    @invariant()
    def every_id_is_free_or_taken(self) -> None:
        self.ids.check_integrity()
        assert set(self.taken) <= self.all
        assert len(self.ids) + len(self.taken) == self.ids.size == len(self.all)


TestFreeList = FreeListMachine.TestCase
TestFreeList.settings = settings(max_examples=40, stateful_step_count=20)


@given(size=st.integers(1, 50), first=st.integers(0, 5), count=st.integers(0, 50))
def test_low_ids_come_first(size: int, first: int, count: int) -> None:
    count = min(count, size)
    assert FreeList(size, first=first).take(count).tolist() == list(range(first, first + count))


def test_an_id_is_returned_once() -> None:
    ids = FreeList(4)
    taken = ids.take(3)
    ids.give(taken[:1])
    with pytest.raises(AssertionError, match="returned twice"):
        ids.give(taken[:2])


def test_more_than_is_free_is_refused() -> None:
    with pytest.raises(AssertionError, match="5 ids wanted, 4 free"):
        FreeList(4).take(5)


def test_a_damaged_list_is_noticed() -> None:
    ids = FreeList(4)
    ids._is_free[2] = False
    with pytest.raises(AssertionError):
        ids.check_integrity()
