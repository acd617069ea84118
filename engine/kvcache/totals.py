"""Bytes and seconds of copies by direction and path, counted without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch
from torch import Tensor

from sparsed.core import CopyPath, Direction
from sparsed.engine.kvcache.streams import timer

READ_PATIENCE_S: Final = 5e-4  # an idle device answers within; a busy one answers next time

Way = tuple[Direction, CopyPath]
WAYS: Final[tuple[Way, ...]] = tuple((d, p) for d in Direction for p in CopyPath)


class CopyTotals(NamedTuple):
    """Since the start. Seconds are those copies were under way; of fetches in CUDA graphs at the
    rate of those that were timed, of saves in them not counted."""

    num_bytes: int
    seconds: float


@dataclass(slots=True)
class _Clock:
    """Seconds of one way. Pairs of events wait until they are over."""

    seconds: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def collect(self) -> float:
        while self.events and self.events[0][1].query():  # type: ignore[no-untyped-call]  # torch's
            start, end = self.events.pop(0)
            self.seconds += start.elapsed_time(end) / 1e3
        return self.seconds


class DeviceCounters:
    """Integers on the device that the host reads late rather than waiting for them."""

    def __init__(self, num_counters: int, *, device: torch.device) -> None:
        self.values_C = torch.zeros(num_counters, dtype=torch.int64, device=device)
        self._is_cuda = device.type == "cuda"
        self._seen_C = torch.zeros(num_counters, dtype=torch.int64, pin_memory=self._is_cuda)
        self._latest = [0] * num_counters
        self._on_the_way: torch.cuda.Event | None = None

    def read(self) -> list[int]:
        """The values of now, or on a device with work queued those of the last call or before."""
        return read_together(self)[0]

    def _ask(self) -> None:
        if not self._is_cuda:
            self._seen_C.copy_(self.values_C)
        elif self._on_the_way is None:
            self._seen_C.copy_(self.values_C, non_blocking=True)
            self._on_the_way = torch.cuda.current_stream(self.values_C.device).record_event()

    def _has_arrived(self) -> bool:
        return self._on_the_way is None or bool(self._on_the_way.query())  # type: ignore[no-untyped-call]  # torch's

    def _take(self) -> list[int]:
        if self._has_arrived():
            self._latest = [int(value) for value in self._seen_C.tolist()]
            self._on_the_way = None
        return self._latest


def read_together(*counters: DeviceCounters) -> list[list[int]]:
    """As each of them would be read, with one look at the device for all."""
    for one in counters:
        one._ask()
    deadline_s = time.perf_counter() + READ_PATIENCE_S
    while not all(one._has_arrived() for one in counters) and time.perf_counter() < deadline_s:
        pass
    return [one._take() for one in counters]


@dataclass(slots=True)
class _Estimate:
    """Seconds of copies that are counted and not timed, at the rate of those that were timed.

    Bytes get their seconds when they are counted, at the rate known by then, and keep them:
    seconds never go back. Before anything was timed they wait."""

    timed_bytes: int = 0
    timed_s: float = 0.0
    known_bytes: int = 0  # those that have their seconds
    known_s: float = 0.0

    def seconds(self, num_bytes: int) -> float:
        """Of all bytes so far."""
        if self.timed_bytes:
            self.known_s += (num_bytes - self.known_bytes) * self.timed_s / self.timed_bytes
            self.known_bytes = num_bytes
        return self.known_s


class Totals:
    """Counters for every way, those of captured graphs apart: nothing clocks these. One thread."""

    def __init__(self, *, device: torch.device) -> None:
        self._device = device
        self._counted = DeviceCounters(2 * len(WAYS), device=device)
        self._known = dict.fromkeys(WAYS, 0)
        cells, in_graphs = self._counted.values_C.view(2, -1)
        self._cells = dict(zip(WAYS, cells.unbind(), strict=True))
        self._cells_in_graphs = dict(zip(WAYS, in_graphs.unbind(), strict=True))
        self._clocks = {way: _Clock() for way in WAYS}
        self._estimates = {way: _Estimate() for way in WAYS}

    def add(self, way: Way, pieces: Tensor | int, *, piece_bytes: int) -> None:
        """Count pieces; a scalar on the device is added there."""
        if isinstance(pieces, int):
            self._known[way] += pieces * piece_bytes
        else:
            cells = self._cells_in_graphs if self._is_capturing() else self._cells
            cells[way].add_(pieces, alpha=piece_bytes)

    def add_timed(self, way: Way, num_bytes: int, *, seconds: float) -> None:
        """A sample of the rate of copies in graphs; these bytes are counted already."""
        estimate = self._estimates[way]
        estimate.timed_bytes += num_bytes
        estimate.timed_s += seconds

    @contextmanager
    def timed(self, way: Way) -> Iterator[None]:
        """Time what is queued on the current stream inside the block (on a CPU, what is done)."""
        if self._device.type == "cpu":
            start_s = time.perf_counter()
            yield
            self._clocks[way].seconds += time.perf_counter() - start_s
            return
        if self._is_capturing():
            yield
            return
        first, last = timer(), timer()
        first.record()
        yield
        last.record()
        self._clocks[way].events.append((first, last))
        self._clocks[way].collect()

    def read(self) -> Mapping[Way, CopyTotals]:
        """Every way that was taken."""
        counts = self._counted.read()
        totals = {}
        for way, clocked, in_graphs in zip(
            WAYS, counts[: len(WAYS)], counts[len(WAYS) :], strict=True
        ):
            num_bytes = self._known[way] + clocked + in_graphs
            seconds = self._clocks[way].collect() + self._estimates[way].seconds(in_graphs)
            totals[way] = CopyTotals(num_bytes, seconds)
        return {way: total for way, total in totals.items() if total != (0, 0.0)}

    def _is_capturing(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
