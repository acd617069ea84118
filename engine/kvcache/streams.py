"""Streams and timed events of a device."""

from __future__ import annotations

import time

import torch


def new_stream(device: torch.device, *, priority: int = 0) -> torch.cuda.Stream | None:
    """A stream of its own; None on a CPU, where nothing is queued."""
    if device.type == "cpu":
        return None
    return torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]  # torch's


def timer() -> torch.cuda.Event:
    """An event that can be timed."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own


class Moment:
    """When the current stream comes to where it was noted last: on a CUDA device an event, which a
    captured graph notes anew at every replay; on a CPU the time."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._noted_s = 0.0
        if device.type != "cpu":
            # Not external, it would be an edge of the graph and never be noted.
            self._event = torch.cuda.Event(enable_timing=True, external=True)  # type: ignore[no-untyped-call]  # torch's

    def note(self) -> None:
        if self._event is None:
            self._noted_s = time.perf_counter()
        else:
            self._event.record()

    def seconds_after(self, earlier: Moment) -> float:
        """Both must be over."""
        if self._event is None or earlier._event is None:
            return self._noted_s - earlier._noted_s
        elapsed_ms: float = earlier._event.elapsed_time(self._event)
        return elapsed_ms / 1e3
