"""Streams and timed events of a device."""

from __future__ import annotations

import torch


def new_stream(device: torch.device, *, priority: int = 0) -> torch.cuda.Stream | None:
    """A stream of its own; None on a CPU, where nothing is queued."""
    if device.type == "cpu":
        return None
    return torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]  # torch's


def timer() -> torch.cuda.Event:
    """An event that can be timed."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own
