"""What the daemon hands to the HTTP edge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from sparsed.controller.control import DaemonState
from sparsed.controller.ledger import Ledger
from sparsed.controller.tokenizer import Tokenizer
from sparsed.engine.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpContext:
    """Everything a request handler may use; fixed while the daemon runs."""

    ledger: Ledger
    tokenizer: Tokenizer
    model_ids: tuple[str, ...]  # served names; the first one is written into answers
    model: ModelConfig
    max_model_len: int  # tokens, prompt and output together
    sparse_method: str
    state: Callable[[], DaemonState]
    metrics: Callable[[], bytes]  # Prometheus text
    api_key: str | None
    version: str


async def _context_of(request: Request) -> HttpContext:
    context = request.app.state.context
    assert isinstance(context, HttpContext)
    return context


Context = Annotated[HttpContext, Depends(_context_of)]
