"""The slots of a cache: which page is in which, and which ones give way.

Shape legend: S steps, L lanes, N slots of a lane, X any.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from sparsed.engine.sim.trace import Bools, Ints

LAST_BIN: Final = 63  # the bin of every age from so many steps up

_ABSENT: Final = -1
_FREE: Final = -1  # as a last use
_NEVER: Final = 2**31 - 1  # as the last use of a slot that a lane does not own
_NOTHING: Final = _FREE - 1  # older than the last use of any slot


class Slots:
    """The slots of every lane, as the cache on the device keeps them. One thread.

    Missing pages, ascending, take first the free slots, then the slots of the bins of age above
    the cut, then the first ones of the bin at the cut, all in the order of slots. The cut is the
    youngest bin that has to give pages. Pages used in the step itself never give way.

    ``exact``: every age is a bin of its own, and of the bin at the cut the lower pages give way
    first, which makes it an exact LRU. Else ages are cut off at ``LAST_BIN``.
    """

    def __init__(self, capacity_L: Ints, *, num_pages: int, num_steps: int, exact: bool) -> None:
        num_lanes, width = len(capacity_L), int(capacity_L.max())
        self._width = width
        self._capacity_L = capacity_L
        self._num_pages, self._num_steps, self._exact = num_pages, num_steps, exact
        self._used_L = np.zeros(num_lanes, dtype=np.int64)
        self._slot_of_X = np.full(num_lanes * num_pages, _ABSENT, dtype=np.int64)
        self._key_in_X = np.full(num_lanes * width, _ABSENT, dtype=np.int64)
        is_owned_LN = np.arange(width) < capacity_L[:, None]
        self._last_LN = np.where(is_owned_LN, _FREE, _NEVER).astype(np.int32)
        self._last_X = self._last_LN.reshape(-1)
        self._count_LS = np.zeros((num_lanes, num_steps), dtype=np.int64)  # slots by last use

    def bring(self, keys_X: Ints, *, step: int) -> Bools:
        """Use pages in ``step`` and load the missing ones. Returns which were there, (X,).

        Keys are ascending. Errors: AssertionError if a lane cannot hold all its pages of the step.
        """
        slots_X = self._slot_of_X[keys_X]
        is_hit_X: Bools = slots_X != _ABSENT
        hit_slots_X = slots_X[is_hit_X]
        self._forget(hit_slots_X)
        self._last_X[hit_slots_X] = step
        missing_X = keys_X[~is_hit_X]
        need_L = np.bincount(missing_X // self._num_pages, minlength=len(self._capacity_L))
        if len(missing_X):
            self._put(missing_X, self._victims(need_L, step=step), step=step)
        lanes_X = keys_X // self._num_pages
        self._count_LS[:, step] += np.bincount(lanes_X, minlength=len(self._capacity_L))
        return is_hit_X

    def _forget(self, slots_X: Ints) -> None:
        """Slots that are about to be used anew no longer count as last used when they were."""
        last_X = self._last_X[slots_X]
        places_X = slots_X // self._width * self._num_steps + last_X
        count_X = np.bincount(places_X, minlength=self._count_LS.size)
        self._count_LS -= count_X.reshape(self._count_LS.shape)

    def _put(self, keys_X: Ints, slots_X: Ints, *, step: int) -> None:
        old_X = self._key_in_X[slots_X]
        self._slot_of_X[old_X[old_X != _ABSENT]] = _ABSENT
        self._key_in_X[slots_X] = keys_X
        self._slot_of_X[keys_X] = slots_X
        self._last_X[slots_X] = step

    def _victims(self, need_L: Ints, *, step: int) -> Ints:
        """So many slots of each lane, lane by lane, in the order in which they are filled."""
        free_X = self._take_free(need_L)
        rest_L = need_L - np.bincount(free_X // self._width, minlength=len(need_L))
        if not rest_L.any():
            return free_X
        self._last_X[free_X] = step
        oldest_L, youngest_L, from_cut_L = self._cut(rest_L, step=step)
        old_X = np.flatnonzero(self._last_LN <= youngest_L[:, None])
        is_at_cut_X = self._last_X[old_X] >= oldest_L[old_X // self._width]
        at_cut_X = old_X[is_at_cut_X]
        if self._exact:
            at_cut_X = at_cut_X[self._key_in_X[at_cut_X].argsort()]
        above_X = old_X[~is_at_cut_X]
        at_cut_X = _first_of_each(at_cut_X, at_cut_X // self._width, from_cut_L)
        self._forget(np.concatenate([above_X, at_cut_X]))
        slots_X = np.concatenate([free_X, above_X, at_cut_X])
        return slots_X[(slots_X // self._width).argsort(kind="stable")]

    def _take_free(self, need_L: Ints) -> Ints:
        """The first free slots of each lane, as many as it needs or has."""
        take_L = np.minimum(self._capacity_L - self._used_L, need_L)
        lanes_X = np.repeat(np.arange(len(take_L)), take_L)
        nth_X = np.arange(len(lanes_X)) - np.repeat(take_L.cumsum() - take_L, take_L)
        slots_X: Ints = lanes_X * self._width + self._used_L[lanes_X] + nth_X
        self._used_L += take_L
        return slots_X

    def _cut(self, rest_L: Ints, *, step: int) -> tuple[Ints, Ints, Ints]:
        """The bin at the cut of each lane, by its oldest and youngest step, and how many pages it
        gives; no slot is as old as the bin of a lane that gives nothing."""
        upto_LS = self._count_LS[:, :step].cumsum(axis=1)
        assert step and (rest_L <= upto_LS[:, -1]).all(), "a lane selects more than it holds"
        youngest_L = (upto_LS < rest_L[:, None]).sum(axis=1)
        oldest_L = youngest_L
        if not self._exact:
            is_last_L = youngest_L <= step - LAST_BIN
            oldest_L = np.where(is_last_L, 0, youngest_L)
            youngest_L = np.where(is_last_L, step - LAST_BIN, youngest_L)
        lanes_L = np.arange(len(rest_L))
        above_L = np.where(oldest_L > 0, upto_LS[lanes_L, np.maximum(oldest_L - 1, 0)], 0)
        return oldest_L, np.where(rest_L > 0, youngest_L, _NOTHING), rest_L - above_L


def _first_of_each(slots_X: Ints, lanes_X: Ints, count_L: Ints) -> Ints:
    """The first ``count`` of the slots of each lane; lanes are ascending."""
    first_L = np.searchsorted(lanes_X, np.arange(len(count_L)))
    return slots_X[np.arange(len(slots_X)) - first_L[lanes_X] < count_L[lanes_X]]
