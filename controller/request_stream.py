"""What a client reads of one request, and how it lets go of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sparsed.core import TokenOutput

LAST_OUTPUT_S = 2.0  # a stopped request's comes with the next step


class RequestStream:
    """The outputs of one request, in order, ending with the one that has a finish reason.

    ``outputs`` holds at most ``max_tokens`` outputs, so a slow reader costs memory but never
    time; None ends it early. ``cancel`` and ``stop`` are the ledger's, harmless when finished.
    """

    def __init__(
        self,
        outputs: asyncio.Queue[TokenOutput | None],
        *,
        cancel: Callable[[], None],
        stop: Callable[[], None],
    ) -> None:
        self._outputs = outputs
        self._cancel = cancel
        self._stop = stop
        self._ended = False

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> TokenOutput:
        if self._ended:
            raise StopAsyncIteration
        output = await self._outputs.get()
        self._ended = output is None or output.finish_reason is not None
        if output is None:
            raise StopAsyncIteration
        return output

    def cancel(self) -> None:
        """Stop the request; the iteration ends without a last output."""
        self._cancel()

    async def stop(self) -> TokenOutput | None:
        """Stop the request and return its last output; None if the engine gives none in time."""
        self._stop()
        try:
            async with asyncio.timeout(LAST_OUTPUT_S):
                async for output in self:
                    if output.finish_reason is not None:
                        return output
        except TimeoutError:
            self.cancel()
        return None
