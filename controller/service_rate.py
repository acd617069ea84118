"""When a refused client had better come back: how fast places in the queue come free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

UNKNOWN_S: Final = 5.0  # told before two requests have ended
SHORTEST_S: Final = 1.0
LONGEST_S: Final = 60.0
LEARNING_RATE: Final = 0.1


class ServiceRate:
    """Mean time between two requests that end. Every client that is refused is promised a place of
    its own: the first one the next to come free, the tenth the tenth."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last_end_s: float | None = None
        self._interval_s: float | None = None
        self._num_promised = 0

    def note_end(self) -> None:
        """A request has ended: a place is free."""
        now_s = self._clock()
        if self._last_end_s is not None:
            interval_s = now_s - self._last_end_s
            if self._interval_s is None:
                self._interval_s = interval_s
            self._interval_s += LEARNING_RATE * (interval_s - self._interval_s)
        self._last_end_s = now_s
        self._num_promised = max(0, self._num_promised - 1)

    def promise_s(self) -> float:
        """Seconds after which a client that is refused now may find a place."""
        self._num_promised += 1
        if self._interval_s is None:
            return UNKNOWN_S
        return min(max(self._num_promised * self._interval_s, SHORTEST_S), LONGEST_S)
