"""Free lists of frames and blocks, with the check that nothing leaks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class FreeList:
    """Hands out integer ids ``first .. first + size - 1``; low ids first, one owner at a time."""

    def __init__(self, size: int, *, first: int = 0) -> None:
        self._first = first
        self._size = size
        self._stack = np.arange(first + size - 1, first - 1, -1, dtype=np.int64)
        self._num_free = size
        self._is_free = np.ones(size, dtype=np.bool_)

    def __len__(self) -> int:
        """Ids that are free now."""
        return self._num_free

    @property
    def size(self) -> int:
        return self._size

    def take(self, count: int) -> npt.NDArray[np.int64]:
        """``count`` free ids; AssertionError if there are fewer (ask ``len`` first)."""
        assert 0 <= count <= self._num_free, f"{count} ids wanted, {self._num_free} free"
        taken = self._stack[self._num_free - count : self._num_free][::-1].copy()
        self._num_free -= count
        self._is_free[taken - self._first] = False
        return taken

    def give(self, ids: npt.NDArray[np.int64]) -> None:
        """Return ids; AssertionError if one of them is free already."""
        assert not self._is_free[ids - self._first].any(), "an id was returned twice"
        self._is_free[ids - self._first] = True
        self._stack[self._num_free : self._num_free + len(ids)] = ids[::-1]
        self._num_free += len(ids)

    def check_integrity(self) -> None:
        """AssertionError unless the stack and the marks agree."""
        free = self._stack[: self._num_free]
        assert len(np.unique(free)) == self._num_free
        assert int(self._is_free.sum()) == self._num_free
        assert bool(self._is_free[free - self._first].all())
