"""The windows of a study on real engines, one for each device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from queue import SimpleQueue

from sparsed.controller.bench_thread import BenchThread, stop_all
from sparsed.core import KnobValue, Measurement, Workload
from sparsed.tuner.benches import Ended
from sparsed.tuner.objective import TrialFailed


class BenchPool:
    """``tuner.benches.Benches`` over ``threads``, one or more, which the caller closes. Every
    window serves ``workload`` within ``deadline_s``; ``on_begin`` is called as one begins."""

    def __init__(
        self,
        threads: Sequence[BenchThread],
        *,
        workload: Workload,
        deadline_s: float,
        on_begin: Callable[[], None],
    ) -> None:
        self.devices: Sequence[str] = tuple(thread.bench.device for thread in threads)
        self._threads = tuple(threads)
        self._workload = workload
        self._deadline_s = deadline_s
        self._on_begin = on_begin
        self._ends: SimpleQueue[tuple[int, Measurement | Exception]] = SimpleQueue()

    def begin(self, place: int, values: Mapping[str, KnobValue], *, order: int) -> float:
        thread, ends = self._threads[place], self._ends
        serve = partial(
            thread.bench.measure,
            values,
            workload=self._workload,
            deadline_s=self._deadline_s,
            order=order,
        )
        self._on_begin()
        thread.begin(serve, tell=lambda ended: ends.put((place, ended)))
        return time.time()

    def next_end(self) -> Ended:
        """Also raises whatever a window raised beside ``TrialFailed``."""
        place, ended = self._ends.get()
        if isinstance(ended, Measurement | TrialFailed):
            return Ended(place, ended)
        raise ended

    def end_all(self) -> None:
        stop_all(self._threads)
        self._ends = SimpleQueue()  # what ended meanwhile is of no use to anybody

    def leave_only(self, place: int) -> None:
        others = (thread for number, thread in enumerate(self._threads) if number != place)
        stop_all(tuple(others))
