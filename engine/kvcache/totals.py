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
    """Since the start. Seconds are those copies were under way, in CUDA graphs not counted."""

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
        if not self._is_cuda:
            return [int(value) for value in self.values_C.tolist()]
        if self._on_the_way is None:
            self._seen_C.copy_(self.values_C, non_blocking=True)
            self._on_the_way = torch.cuda.current_stream(self.values_C.device).record_event()
        deadline_s = time.perf_counter() + READ_PATIENCE_S
        while not (arrived := self._arrived()) and time.perf_counter() < deadline_s:
            pass
        if arrived:
            self._latest = [int(value) for value in self._seen_C.tolist()]
            self._on_the_way = None
        return self._latest

    def _arrived(self) -> bool:
        assert self._on_the_way is not None
        return bool(self._on_the_way.query())  # type: ignore[no-untyped-call]  # torch's


class Totals:
    """One pair of counters for every way. One thread."""

    def __init__(self, *, device: torch.device) -> None:
        self._device = device
        self._counted = DeviceCounters(len(WAYS), device=device)
        self._known = dict.fromkeys(WAYS, 0)
        self._cells = dict(zip(WAYS, self._counted.values_C.unbind(), strict=True))
        self._clocks = {way: _Clock() for way in WAYS}

    def add(self, way: Way, pieces: Tensor | int, *, piece_bytes: int) -> None:
        """Count pieces; a scalar on the device is added there."""
        if isinstance(pieces, int):
            self._known[way] += pieces * piece_bytes
        else:
            self._cells[way].add_(pieces, alpha=piece_bytes)

    @contextmanager
    def timed(self, way: Way) -> Iterator[None]:
        """Time what is queued on the current stream inside the block (on a CPU, what is done)."""
        if self._device.type == "cpu":
            start_s = time.perf_counter()
            yield
            self._clocks[way].seconds += time.perf_counter() - start_s
            return
        if torch.cuda.is_current_stream_capturing():
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
        counted = zip(WAYS, self._counted.read(), strict=True)
        totals = {
            way: CopyTotals(self._known[way] + num_bytes, self._clocks[way].collect())
            for way, num_bytes in counted
        }
        return {way: total for way, total in totals.items() if total != (0, 0.0)}
