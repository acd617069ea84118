"""Which arena blocks the lanes of a row own: the host's copy.

Shape legend: L lanes, N blocks of the lane that ever had the most, n some of them, X any.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class LaneBlocks:
    """``ids`` (L, N): block ids in the order of a lane's slots, -1 after its last. ``counts`` (L,):
    how many. Lanes may own unequal numbers, but together they own a multiple of their number."""

    def __init__(self, num_lanes: int) -> None:
        self.ids_LN: Ints = np.empty((num_lanes, 0), dtype=np.int64)
        self.counts_L: Ints = np.zeros(num_lanes, dtype=np.int64)

    @property
    def mean(self) -> int:
        """Blocks per lane."""
        return int(self.counts_L.sum()) // len(self.counts_L)

    @property
    def least(self) -> int:
        """Blocks of the smallest lane."""
        return int(self.counts_L.min())

    @property
    def most(self) -> int:
        """Blocks of the largest lane."""
        return int(self.counts_L.max())

    @property
    def ids_X(self) -> Ints:
        """All of them."""
        return self.ids_LN[self.ids_LN >= 0]

    def drop(self, keep_L: Ints) -> Ints:
        """Cut every lane to its first ``keep`` blocks. Returns the others, (L, n), -1 after the
        last of a lane."""
        assert (keep_L <= self.counts_L).all()
        width = int((self.counts_L - keep_L).max(initial=0))
        places_Ln = keep_L[:, None] + np.arange(width)
        is_there_Ln = places_Ln < self.counts_L[:, None]
        lanes_X, columns_X = np.nonzero(is_there_Ln)
        dropped_Ln = np.full(places_Ln.shape, -1, dtype=np.int64)
        places_X = places_Ln[is_there_Ln]
        dropped_Ln[lanes_X, columns_X] = self.ids_LN[lanes_X, places_X]
        self.ids_LN[lanes_X, places_X] = -1
        self.counts_L = keep_L.copy()
        return dropped_Ln

    def put_newest_first(self, keep: int, *, num_placed: int) -> None:
        """Of lanes that have equal numbers, and pages in order in their first ``num_placed``
        blocks, more than ``keep``: move the newest ``keep`` to the beginning, in their order. Not
        the very last, some of whose pages may be yet to begin: it must leave before any other."""
        assert 0 <= keep < num_placed <= self.least == self.most
        newest = range(num_placed - 1 - keep, num_placed - 1)
        others = (i for i in range(self.most) if i not in newest)
        self.ids_LN[:, : self.most] = self.ids_LN[:, [*newest, *others]]

    def roll(self, shift: int) -> None:
        """Of lanes that have equal numbers: move the last ``shift`` to the beginning."""
        assert self.least == self.most
        self.ids_LN[:, : self.most] = np.roll(self.ids_LN[:, : self.most], shift, axis=1)

    def add(self, ids_X: Ints, more_L: Ints) -> None:
        """Append ``more`` blocks to every lane, from ``ids``, lane after lane."""
        counts_L = self.counts_L + more_L
        wider = max(0, int(counts_L.max(initial=0)) - self.ids_LN.shape[1])
        self.ids_LN = np.pad(self.ids_LN, ((0, 0), (0, wider)), constant_values=-1)
        places_N = np.arange(self.ids_LN.shape[1])
        is_new_LN = (places_N >= self.counts_L[:, None]) & (places_N < counts_L[:, None])
        self.ids_LN[is_new_LN] = ids_X
        self.counts_L = counts_L
