"""What became of each request of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

# Kinds of failure; an answer with an error status is ``http_`` and the status.
CONNECT: Final = "connect"  # nobody accepted the connection
TIMEOUT: Final = "timeout"  # the answer was not complete in time
DISCONNECTED: Final = "disconnected"  # the connection ended before the answer did
STREAM_ERROR: Final = "stream_error"  # the server said so in the middle of the stream
BAD_ANSWER: Final = "bad_answer"  # not HTTP, not JSON, or no token in it
INTERRUPTED: Final = "interrupted"  # the run was stopped; no fault of the server


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens as the server counted them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestRecord:
    """One request. Times are seconds since the start of the run; None: did not come to that.

    ``arrival_s`` is when it was to be sent, ``sent_s`` when it was (later where concurrency is
    limited). ``chunks_s`` are the arrivals of chunks that carried text; ``last_s`` may be a little
    later, when the answer ends with a token that has none. ``error`` is a kind, ``detail`` in words.
    """

    number: int
    arrival_s: float
    input_tokens: int
    max_tokens: int
    sent_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None
    ended_s: float | None = None
    chunks_s: tuple[float, ...] = field(default=(), repr=False)
    usage: Usage | None = None
    error: str | None = None
    detail: str = ""

    @property
    def is_complete(self) -> bool:
        return self.error is None

    @property
    def was_cut_off(self) -> bool:
        """Began to answer, and did not come to the end."""
        return self.error is not None and self.first_s is not None

    @property
    def output_tokens(self) -> int:
        """As the server counted them, else a token a chunk."""
        return len(self.chunks_s) if self.usage is None else self.usage.completion_tokens

    @property
    def prompt_tokens(self) -> int:
        """As the server counted them, else as planned."""
        return self.input_tokens if self.usage is None else self.usage.prompt_tokens

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: from sending to the first chunk."""
        if self.sent_s is None or self.first_s is None:
            return None
        return self.first_s - self.sent_s

    @property
    def e2e_s(self) -> float | None:
        """From sending to the last token."""
        if self.sent_s is None or self.last_s is None:
            return None
        return self.last_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for an output of one token."""
        if self.first_s is None or self.last_s is None or self.output_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Inter-token latencies: the gaps between chunks."""
        return tuple(later - earlier for earlier, later in pairwise(self.chunks_s))
