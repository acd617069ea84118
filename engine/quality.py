"""Watches sampled attention recall, and has requests read more where it is low."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sparsed.core import KNOBS_BY_NAME, Knobs, QualityEvent
from sparsed.engine.breaker import Breaker, judge
from sparsed.engine.request import RequestState

MAX_EVENTS = 256  # kept between two reports, should nobody ask for them


class Attention(Protocol):
    """What the guard needs of the KV cache."""

    def recalls(self, row: int) -> Sequence[float]:
        """All samples of a request so far."""
        ...

    def set_attention(self, row: int, *, token_budget: int, is_dense: bool) -> None: ...


@dataclass(slots=True)
class _Watched:
    state: Breaker = field(default_factory=Breaker)
    num_seen: int = 0  # samples that were judged
    was_changed: bool = False  # since then its budget is a number, which no knob moves


class QualityGuard:
    """One breaker per request. ``look`` at every step boundary: a sample acts in the step after the
    one in which it arrived. ``floor`` 0: nothing is ever changed. One thread."""

    def __init__(self, attention: Attention, *, floor: float) -> None:
        self.num_raises = 0
        self.num_dense = 0
        self._attention = attention
        self._floor = floor
        self._watched: dict[str, _Watched] = {}
        self._events: list[QualityEvent] = []

    def look(self, requests: Iterable[RequestState], *, knobs: Knobs) -> None:
        """Judge the samples that have arrived since."""
        if self._floor <= 0:
            return
        for request in requests:
            assert request.row is not None
            recalls = self._attention.recalls(request.row)
            watched = self._watched.setdefault(request.request_id, _Watched())
            for recall in recalls[watched.num_seen :]:
                self._judge(request, watched, recall, knobs)
            watched.num_seen = len(recalls)

    def apply(self, requests: Iterable[RequestState], *, knobs: Knobs) -> None:
        """Knobs have changed: raised budgets are multiples of the new one."""
        for request in requests:
            watched = self._watched.get(request.request_id)
            if watched is not None and watched.was_changed:
                self._set(request, watched.state, knobs)

    def forget(self, request_id: str) -> None:
        self._watched.pop(request_id, None)

    def take_events(self) -> tuple[QualityEvent, ...]:
        """What was changed since the last call."""
        events, self._events = tuple(self._events[-MAX_EVENTS:]), []
        return events

    def _judge(self, request: RequestState, watched: _Watched, recall: float, knobs: Knobs) -> None:
        own, before = _own_tokens(request, knobs), watched.state
        after = judge(before, recall, floor=self._floor, own_tokens=own, most_tokens=_most())
        watched.state = after
        if (after.raises, after.is_dense) == (before.raises, before.is_dense):
            return
        watched.was_changed = True
        self.num_raises += after.raises > before.raises
        self.num_dense += after.is_dense
        tokens = self._set(request, after, knobs)
        self._events.append(
            QualityEvent(
                request_id=request.request_id,
                recall=recall,
                token_budget=tokens,
                is_dense=after.is_dense,
            )
        )

    def _set(self, request: RequestState, state: Breaker, knobs: Knobs) -> int:
        """Have the request read what its state says; its token budget."""
        assert request.row is not None
        tokens = state.budget(_own_tokens(request, knobs), most_tokens=_most())
        self._attention.set_attention(request.row, token_budget=tokens, is_dense=state.is_dense)
        return tokens


def _own_tokens(request: RequestState, knobs: Knobs) -> int:
    return request.request.sparse.token_budget or knobs.token_budget


def _most() -> int:
    """The largest budget there is."""
    most = KNOBS_BY_NAME["token_budget"].maximum
    assert most is not None
    return int(most)
