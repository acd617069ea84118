"""The prompts of trials: real text for a real model, random tokens for a dummy."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate
from pydoc_data.topics import topics
from typing import Protocol

from sparsed.controller.startup import StartPlan, load_tokenizer
from sparsed.controller.tokenizer import Tokenizer
from sparsed.core import Workload

Prompt = tuple[int, ...]


class PromptSource(Protocol):
    """``description`` completes "the prompts are ..."."""

    @property
    def description(self) -> str: ...

    def make(self, workload: Workload, *, seed: int) -> list[Prompt]:
        """A prompt of exactly its length for every request; the seed decides them all."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomPrompts:
    vocab_size: int
    description: str = "random tokens, whose attention recall says nothing of a text's"

    def make(self, workload: Workload, *, seed: int) -> list[Prompt]:
        generator, ids = random.Random(seed), range(self.vocab_size)
        return [tuple(generator.choices(ids, k=item.input_tokens)) for item in workload.requests]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPrompts:
    """Windows of one text, each beginning where the one before ended, around the end of the text.
    ``first_tokens`` begin every prompt, as they do in the daemon."""

    text: Prompt
    first_tokens: Prompt = ()
    description: str = "Python's own reference, in the model's tokens"

    def make(self, workload: Workload, *, seed: int) -> list[Prompt]:
        lengths = [item.input_tokens for item in workload.requests]
        start = random.Random(seed).randrange(len(self.text))
        starts = accumulate(lengths[:-1], initial=start)
        return [self._cut(at, length) for at, length in zip(starts, lengths, strict=True)]

    def _cut(self, start: int, length: int) -> Prompt:
        places = range(start, start + max(0, length - len(self.first_tokens)))
        return (*self.first_tokens[:length], *(self.text[i % len(self.text)] for i in places))


def prompt_source(plan: StartPlan) -> PromptSource:
    """What trials of ``plan`` read. InputError naming a broken tokenizer file."""
    if plan.tokenizer_dir is None:
        return RandomPrompts(vocab_size=plan.model.vocab_size)
    return reference_prompts(load_tokenizer(plan))


def reference_prompts(tokenizer: Tokenizer) -> TextPrompts:
    """Technical documentation: about 100,000 tokens that every Python carries."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return TextPrompts(
        text=tuple(tokenizer.encode(text, add_special_tokens=False)),
        first_tokens=tuple(tokenizer.encode("", add_special_tokens=True)),
    )
