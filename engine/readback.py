"""Numbers on their way from the device to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsed.engine.request import RequestState


class _Pending:
    """Reads ``values`` without keeping the device from going on; the copy is queued at once, on
    the current stream."""

    def __init__(self, values: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.current_stream(values.device).record_event()

    @property
    def has_arrived(self) -> bool:
        """Whether ``read`` would return at once."""
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]  # torch's

    def _wait(self) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._values


class PendingTokens(_Pending):
    """The tokens (n,) of a step."""

    def read(self) -> list[int]:
        """The tokens; waits for the step that draws them."""
        tokens: list[int] = self._wait().tolist()
        return tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class InFlight:
    """A step that was launched: who waits for which of its tokens."""

    tokens: PendingTokens
    waiting: tuple[tuple[RequestState, int], ...]


class PendingValue(_Pending):
    """One number, a tensor without dims."""

    def read(self) -> float:
        """The number; waits for the work that makes it."""
        return float(self._wait())


class PendingNumbers(_Pending):
    """Whole numbers, a tensor of two dims that nobody else writes to."""

    def read(self) -> list[list[int]]:
        """The numbers; waits for the work that makes them."""
        rows: list[list[int]] = self._wait().tolist()
        return rows
