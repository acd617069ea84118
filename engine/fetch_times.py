"""How long the fetches of a step take, and how long attention stands still for them.

A fetch is timed by what is noted on the streams around it, also inside a captured graph. That costs
a few microseconds a layer, so that on a CUDA device one step in ``STRIDE`` is timed, and read when
it is over; on a CPU, where a note is a look at the clock, every step is.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from sparsed.engine.kvcache.streams import Moment
from sparsed.engine.kvcache.transfer import Transfer
from sparsed.engine.readback import PendingValue

STRIDE: Final = 257  # a prime: else a request would always be met at the same place of a page


class Fetch:
    """One fetch of pages, which nobody times: call these where it happens."""

    def starts(self) -> None:
        """What comes next on the current stream is the fetch."""

    def ends(self, count_1: Tensor) -> None:
        """What came last on the current stream was the fetch, of ``count`` pages."""

    def is_needed(self) -> None:
        """What comes next on the current stream waits for its end."""


class StepTimes:
    """The fetches of a step that nobody times."""

    def fetch(self) -> Fetch:
        """The next fetch of the step."""
        return Fetch()


UNTIMED: Final = StepTimes()


class Seconds(NamedTuple):
    """Of a step: how long fetches were under way, each for itself, and how long what needed them
    waited."""

    under_way: float
    exposed: float


class _TimedFetch(Fetch):
    def __init__(self, device: torch.device) -> None:
        self._started, self._ended, self._needed = (Moment(device) for _ in range(3))
        self.count_1 = torch.empty(0)  # until it has ended

    def starts(self) -> None:
        self._started.note()

    def ends(self, count_1: Tensor) -> None:
        self._ended.note()
        self.count_1 = count_1

    def is_needed(self) -> None:
        self._needed.note()

    def seconds(self, begin: Moment) -> Seconds:
        """``begin`` lies before all of it: of two moments, the device only tells which is how much
        later than the other."""
        start_s, end_s, need_s = (
            moment.seconds_after(begin) for moment in (self._started, self._ended, self._needed)
        )
        return Seconds(end_s - start_s, max(0.0, end_s - need_s))


class TimedStep(StepTimes):
    """The fetches of a step that begins now, on the current stream; each is to start, end and be
    needed once. In a captured graph every replay is such a step: read it before the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._fetches: list[_TimedFetch] = []
        self._begin = Moment(device)
        self._begin.note()

    def fetch(self) -> Fetch:
        self._fetches.append(_TimedFetch(self._device))
        return self._fetches[-1]

    @property
    def has_fetches(self) -> bool:
        """Whether there was one, be it of no page."""
        return bool(self._fetches)

    def num_pages(self) -> Tensor:
        """All pages fetched, a scalar on the device, in the order of the current stream; there
        must be a fetch."""
        return torch.cat([one.count_1 for one in self._fetches]).sum()

    def seconds(self) -> Seconds:
        """Sums over all fetches; the step must be over."""
        found = [one.seconds(self._begin) for one in self._fetches]
        return Seconds(sum(one.under_way for one in found), sum(one.exposed for one in found))


class _Pending(NamedTuple):
    step: TimedStep
    num_pages: PendingValue


class FetchTimes:
    """Times the fetches of some steps: ``steps`` of them were read so far, in which attention stood
    still for ``exposed_s``. What is known of their rate, ``transfer`` uses for steps that were not
    timed; with ``is_on`` false none is. One thread, one stream, one timed step at a time."""

    def __init__(self, transfer: Transfer, *, device: torch.device) -> None:
        self.stride = 1 if device.type == "cpu" else STRIDE
        self.is_on = True
        self.steps = 0
        self.exposed_s = 0.0
        self._transfer = transfer
        self._device = device
        self._pending: _Pending | None = None

    def is_turn(self, step: int) -> bool:
        """Whether ``step`` is to be timed."""
        self.collect()
        return self.is_on and step % self.stride == 0 and self._pending is None

    def add(self, step: TimedStep) -> None:
        """A timed step was queued."""
        # The number arrives after the step: when it is there, all of the step is over.
        self._pending = _Pending(step, PendingValue(step.num_pages()))

    def collect(self) -> None:
        """Count a step that is over."""
        if self._pending is None or not self._pending.num_pages.has_arrived:
            return
        step, num_pages = self._pending
        self._pending = None
        seconds = step.seconds()
        self._transfer.add_timed(int(num_pages.read()), seconds=seconds.under_way)
        self.steps += 1
        self.exposed_s += seconds.exposed
