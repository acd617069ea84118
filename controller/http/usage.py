"""What a request cost: tokens, and what sparse attention read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from sparsed.controller.http.generation import Delta
from sparsed.core import SparseDetails


@dataclass(kw_only=True, slots=True)
class Tally:
    """Counts one answer; ``observe`` every delta. Prompts count once, however many choices."""

    sparse_method: str
    num_prompt_tokens: int
    num_completion_tokens: int = 0
    details: list[SparseDetails] = field(default_factory=list)

    def observe(self, delta: Delta) -> None:
        self.num_completion_tokens += delta.num_tokens
        if delta.sparse is not None:
            self.details.append(delta.sparse)

    def usage(self) -> dict[str, object]:
        """The ``usage`` object so far."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
            "sparse_details": self._sparse_details(),
        }

    def _sparse_details(self) -> dict[str, object]:
        """Sums over the choices; only the method where the engine died before it could tell."""
        if not self.details:
            return {"method": self.sparse_method}
        return asdict(_sum(self.details))


def _sum(details: Sequence[SparseDetails]) -> SparseDetails:
    """Counts are added up, the coverage is the mean over the sparse steps."""
    sampled = [item for item in details if item.coverage is not None]
    num_steps = sum(item.sparse_steps for item in sampled)
    weighted = sum((item.coverage or 0.0) * item.sparse_steps for item in sampled)
    return SparseDetails(
        method=details[0].method,
        token_budget=details[0].token_budget,
        decode_steps=sum(item.decode_steps for item in details),
        sparse_steps=sum(item.sparse_steps for item in details),
        tokens_read=sum(item.tokens_read for item in details),
        tokens_dense=sum(item.tokens_dense for item in details),
        coverage=weighted / num_steps if num_steps else None,
        replayed=any(item.replayed for item in details),
    )
