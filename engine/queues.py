"""Where requests are: waiting, running or spilled, each in order; and why those wait that do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

from sparsed.core import MAX_PASSING, WaitCount, WaitingRequest, WaitReason
from sparsed.engine.request import RequestState

MAX_TOLD: Final = 64  # waiting requests in a report


class Queues:
    """Unfinished requests by where they are. ``waiting`` is in order of arrival, the others in
    order of admission. One thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.waiting: dict[str, RequestState] = {}
        self.running: dict[str, RequestState] = {}
        self.spilled: dict[str, RequestState] = {}
        self.version = 0
        self._clock = clock
        self._waits: Counter[WaitReason] = Counter()
        self._num_admitted = 0

    def get(self, request_id: str) -> RequestState | None:
        """The unfinished request of that id."""
        places = (self.running, self.waiting, self.spilled)
        return next((place[request_id] for place in places if request_id in place), None)

    def add(self, request: RequestState) -> None:
        request.arrived_s = self._clock()
        self.waiting[request.request_id] = request
        if len(self.waiting) > MAX_PASSING:
            self.note([request], [WaitReason.TURN])

    def remove(self, request: RequestState) -> None:
        for place in (self.running, self.waiting, self.spilled):
            place.pop(request.request_id, None)
        self.version += 1

    def admit(self, request: RequestState) -> None:
        """From waiting to running."""
        del self.waiting[request.request_id]
        self._num_admitted += 1
        request.admission, request.wait_reason = self._num_admitted, None
        self.running[request.request_id] = request
        self.version += 1

    def spill(self, request: RequestState) -> None:
        """From running to spilled."""
        del self.running[request.request_id]
        self.note([request], [WaitReason.SPILLED])
        self.spilled = _in_order(self.spilled, request)
        self.version += 1

    def restore(self, request: RequestState) -> None:
        """From spilled to running, at its old place."""
        del self.spilled[request.request_id]
        request.wait_reason = None
        self.running = _in_order(self.running, request)
        self.version += 1

    @property
    def with_rows(self) -> list[RequestState]:
        """Those that hold a row of the cache."""
        return [*self.running.values(), *self.spilled.values()]

    @property
    def first_waiting(self) -> list[RequestState]:
        """Those that may be admitted in this step."""
        return list(islice(self.waiting.values(), MAX_PASSING))

    def waited_s(self, requests: Sequence[RequestState]) -> list[float]:
        """How long each has been here."""
        now_s = self._clock()
        return [now_s - request.arrived_s for request in requests]

    def note(self, requests: Sequence[RequestState], reasons: Sequence[WaitReason]) -> None:
        """Why the first of these wait now; counted where the reason is a new one."""
        for request, reason in zip(requests, reasons, strict=False):
            if request.wait_reason is not reason:
                self._waits[reason] += 1
                request.wait_reason = reason

    @property
    def waits(self) -> tuple[WaitCount, ...]:
        """How often requests began to wait, by reason."""
        return tuple(
            WaitCount(reason=r, count=self._waits[r]) for r in WaitReason if r in self._waits
        )

    @property
    def told(self) -> tuple[WaitingRequest, ...]:
        """The oldest of those that wait, spilled ones first."""
        requests = [*self.spilled.values(), *islice(self.waiting.values(), MAX_TOLD)][:MAX_TOLD]
        return tuple(
            WaitingRequest(
                request_id=request.request_id,
                reason=request.wait_reason or WaitReason.TURN,  # it came after the last step
                waited_s=seconds,
            )
            for request, seconds in zip(requests, self.waited_s(requests), strict=True)
        )


def _in_order(place: dict[str, RequestState], request: RequestState) -> dict[str, RequestState]:
    requests = sorted((*place.values(), request), key=lambda one: one.admission)
    return {one.request_id: one for one in requests}
