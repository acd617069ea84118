"""Where the windows of a study are served: on one device, or on several of a kind side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from sparsed.core import KnobValue, Measurement
from sparsed.tuner.objective import TrialFailed

Measure = Callable[[Mapping[str, KnobValue], int], Measurement]


class Ended(NamedTuple):
    """What became of the window of one device, a number of ``Benches.devices``."""

    place: int
    result: Measurement | TrialFailed


class Benches(Protocol):
    """Devices are counted from 0 and serve one window at a time. One thread calls."""

    @property
    def devices(self) -> Sequence[str]:
        """Their names, one or more."""
        ...

    def begin(self, place: int, values: Mapping[str, KnobValue], *, order: int) -> float:
        """Serve a window of an arrival order on a device that serves none; returns at once, with
        the time in seconds since the epoch."""
        ...

    def next_end(self) -> Ended:
        """Wait for the next window to end, whichever that is; one or more are under way.
        ``OutOfTime`` when there is no time left for them."""
        ...

    def end_all(self) -> None:
        """Give up every window under way; none of them is told by ``next_end`` any more."""
        ...

    def leave_only(self, place: int) -> None:
        """End what the other devices have running; no window is under way."""
        ...


def measure_on(benches: Benches, place: int) -> Measure:
    """One window after the other on one device: knob values and arrival order in, figures out;
    ``TrialFailed`` where it could not be served."""

    def measure(values: Mapping[str, KnobValue], order: int) -> Measurement:
        benches.begin(place, values, order=order)
        result = benches.next_end().result
        if isinstance(result, TrialFailed):
            raise result
        return result

    return measure
