"""The quality breaker: a request whose sampled attention recall is too low reads more, then all.

====== ======================================================================================
state  attends to
====== ======================================================================================
0      its own token budget
1..3   twice, four times, eight times as many, as far as the knob's range goes
dense  everything; final, for dense attention is not sampled
====== ======================================================================================

One sample under the floor is enough for the next state: samples of one request are rare. Back goes
only who has shown ``GOOD_SAMPLES`` in a row that are ``MARGIN`` above it. Independent of tuning.
Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

MAX_RAISES: Final = 3
GOOD_SAMPLES: Final = 8
MARGIN: Final = 0.1  # of recall; what one raise gains on average is less


@dataclass(frozen=True, kw_only=True, slots=True)
class Breaker:
    """State of one request. ``num_good``: samples well above the floor since the last other one."""

    raises: int = 0
    is_dense: bool = False
    num_good: int = 0

    def budget(self, own_tokens: int, *, most_tokens: int) -> int:
        """Its token budget now, at most ``most_tokens`` unless it asked for more itself."""
        return max(own_tokens, min(own_tokens << self.raises, most_tokens))


def judge(
    state: Breaker, recall: float, *, floor: float, own_tokens: int, most_tokens: int
) -> Breaker:
    """The state after one sample of recall. ``floor`` 0: the breaker is off."""
    if floor <= 0 or state.is_dense:
        return state
    if recall < floor:
        return _worse(state, own_tokens=own_tokens, most_tokens=most_tokens)
    if recall < floor + MARGIN:
        return replace(state, num_good=0)
    if state.raises and state.num_good + 1 >= GOOD_SAMPLES:
        return Breaker(raises=state.raises - 1)
    return replace(state, num_good=min(state.num_good + 1, GOOD_SAMPLES))


def _worse(state: Breaker, *, own_tokens: int, most_tokens: int) -> Breaker:
    """The next state that reads more than this one."""
    raised = Breaker(raises=state.raises + 1)
    before = state.budget(own_tokens, most_tokens=most_tokens)
    if raised.raises <= MAX_RAISES and raised.budget(own_tokens, most_tokens=most_tokens) > before:
        return raised
    return replace(state, is_dense=True, num_good=0)
