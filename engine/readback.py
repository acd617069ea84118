"""Tokens on their way from the device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class PendingTokens:
    """Reads ``tokens_N`` without keeping the device from going on; the copy is queued at once, on
    the current stream."""

    def __init__(self, tokens_N: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._tokens_N = tokens_N
        if tokens_N.is_cuda:
            self._tokens_N = torch.empty_like(tokens_N, device="cpu", pin_memory=True)
            self._tokens_N.copy_(tokens_N, non_blocking=True)
            self._copied = torch.cuda.current_stream(tokens_N.device).record_event()

    def read(self) -> list[int]:
        """The tokens; waits for the step that draws them."""
        if self._copied is not None:
            self._copied.synchronize()
        tokens: list[int] = self._tokens_N.tolist()
        return tokens
