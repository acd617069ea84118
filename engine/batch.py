"""What one forward pass computes: the plan the scheduler makes and the runner runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class DrawParams(NamedTuple):
    """How one token is drawn where the most likely one will not do. ``temperature`` is above 0,
    ``top_k`` 0 keeps all; of ``seed`` 128 bits count."""

    seed: int
    token_index: int
    temperature: float
    top_p: float
    min_p: float
    top_k: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptChunk:
    """A slice of one prompt.

    ``row`` is the KV row of the request, ``start`` the position of the first token,
    ``prompt_length`` the tokens of the whole prompt. Positions from ``logits_from`` on need
    logits; the position after the chunk means none. ``draw`` says how the token after the prompt
    is drawn; None: the most likely one.
    """

    row: int
    tokens: tuple[int, ...]
    start: int
    prompt_length: int
    logits_from: int
    draw: DrawParams | None = None

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeRow:
    """One token of one request, at ``position``. ``token`` None: the last one drawn for the row,
    which only the device knows yet. ``draw`` says how the next token is drawn; None: the most
    likely one. Only a model that runs ahead draws."""

    row: int
    token: int | None
    position: int
    draw: DrawParams | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    chunks: tuple[PromptChunk, ...]
    decodes: tuple[DecodeRow, ...]

    @property
    def is_empty(self) -> bool:
        return not (self.chunks or self.decodes)
