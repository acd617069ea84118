"""Loads after saves: what a load reads must have arrived, whichever stream brought it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A save under way. ``event`` None: it is done."""

    event: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Before its source is overwritten: the current stream goes on once it has been read."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


class SaveOrder:
    """The newest save of every stream, and the streams that have waited for it. One thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._newest: dict[int, torch.cuda.Event] = {}
        self._waited: set[tuple[int, int]] = set()
        self._scatters: list[Future[None]] = []

    def saved(self, *, scatter: Future[None] | None = None) -> Saved:
        """What the current stream has queued so far is a save; ``scatter`` is the rest of it."""
        if self._device.type == "cpu" or torch.cuda.is_current_stream_capturing():
            return Saved()
        stream = torch.cuda.current_stream(self._device)
        event = self._newest[stream.cuda_stream] = stream.record_event()
        self._waited = {pair for pair in self._waited if pair[0] != stream.cuda_stream}
        if scatter is not None:
            self._scatters.append(scatter)
        return Saved(event=event)

    def wait(self) -> None:
        """The current stream goes on once every save so far is complete."""
        if self._device.type == "cpu" or torch.cuda.is_current_stream_capturing():
            return
        while self._scatters:
            self._scatters.pop().result()
        stream = torch.cuda.current_stream(self._device)
        for producer, event in self._newest.items():
            pair = (producer, stream.cuda_stream)
            if producer != stream.cuda_stream and pair not in self._waited:
                stream.wait_event(event)
                self._waited.add(pair)
