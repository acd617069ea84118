"""Prompts as token ids: reproducible, and alike exactly where requests share a prefix."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from sparsed.core import WorkloadRequest

BLOCK_TOKENS: Final = 512  # of a prefix block in traces
CACHED_BLOCKS: Final = 4096
# Special tokens are the first 3 to 1000 ids, or lie at the very end: Llama 2 and 3, Mistral old and
# new, Qwen and SmolLM have plain text from 1000 to 8999.
NUM_RESERVED: Final = 1000
# Prompts of a chat: words that tokenizers know whole, so that n ids become about n tokens.
PLAIN_WORDS: Final = """
apple bread river stone window garden paper yellow winter summer bridge street letter music silver
horse cloud table chair floor glass metal ocean island forest mountain valley field wheel engine
ship train plane road north south east west morning evening coffee sugar salt butter milk cheese
doctor teacher farmer soldier king queen brother sister cousin village castle market church tower
clock mirror candle blanket button needle thread cotton leather copper iron gold marble
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenIds:
    """The ids that prompts are made of: ``first`` up to, not including, ``end``."""

    first: int
    end: int

    @classmethod
    def below(cls, vocab_size: int) -> TokenIds:
        """Ids that are plain text in a vocabulary of this size: a quarter at the beginning, at most
        ``NUM_RESERVED`` ids, is left to special tokens."""
        return cls(first=min(NUM_RESERVED, vocab_size // 4), end=vocab_size)


class PromptMaker:
    """Makes the prompt of each request of a plan; the same seed gives the same tokens."""

    def __init__(self, *, ids: TokenIds, seed: int, shared_prefix_tokens: int = 0) -> None:
        self._ids = ids
        self._seed = seed
        self._shared = self._random("shared", shared_prefix_tokens)
        self._block = lru_cache(CACHED_BLOCKS)(self._make_block)

    def tokens(self, label: str, request: WorkloadRequest) -> list[int]:
        """Exactly ``input_tokens`` ids: the shared prefix, the blocks, then tokens that no other
        ``label`` has."""
        tokens = list(self._shared)
        for block_id in request.block_ids:
            if len(tokens) >= request.input_tokens:
                break
            tokens += self._block(block_id)
        missing = max(0, request.input_tokens - len(tokens))
        return [*tokens[: request.input_tokens], *self._random(f"own {label}", missing)]

    def _make_block(self, block_id: int) -> list[int]:
        return self._random(f"block {block_id}", BLOCK_TOKENS)

    def _random(self, name: str, count: int) -> list[int]:
        generator = random.Random(f"{self._seed} {name}")
        drawn = np.frombuffer(generator.randbytes(4 * count), dtype="<u4")
        span = self._ids.end - self._ids.first
        tokens: list[int] = (drawn % span + self._ids.first).tolist()
        return tokens


def to_text(tokens: Sequence[int]) -> str:
    """A word for each id, for endpoints that take text; equal ids give equal words."""
    words = PLAIN_WORDS.split()
    return " ".join(words[token % len(words)] for token in tokens)
