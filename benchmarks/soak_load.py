"""Random requests and knobs for the soak, from one seed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from sparsed.core import AddRequest, KnobValue, SamplingParams, SparseMode, SparseOptions

MAX_NUM_SEQS = 8
MAX_MODEL_LEN = 2048
MAX_PROMPT, MAX_OUTPUT = 1800, 96
WAVES = (0.05, 0.2, 0.6)  # requests a step
WAVE_STEPS = (100, 500)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class SoakOptions:
    """``lane_blocks`` and ``num_frames`` are the sizes of the tiers: blocks of 128 tokens a lane,
    and frames, of all requests together. ``num_compared``: requests that are also run alone.
    ``check_steps``: from one look at both tiers to the next. ``retrieval_strides``: the first is that
    of the start, and any of them that of a change of knobs."""

    steps: int = 10_000
    seed: int = 0
    model: str = "dummy:tiny"
    device: str = "cpu"
    dtype: str = "float32"
    page_size: int = 16
    sparse_method: str = "mean-key"
    dense_layers: int = 0
    retrieval_strides: Sequence[int] = (1,)
    enforce_eager: bool = False
    lane_blocks: int = 22
    num_frames: int = 60
    num_compared: int = 40
    check_steps: int = 50


def is_too_long(request: AddRequest) -> bool:
    """Whether no engine of this size can serve it."""
    return len(request.prompt_tokens) + request.sampling.max_tokens > MAX_MODEL_LEN


class Load:
    """Random requests and knobs from one seed."""

    def __init__(self, options: SoakOptions, *, vocab_size: int) -> None:
        self._random = random.Random(options.seed)
        self._vocab_size = vocab_size
        self._budgets = [b for b in (256, 384, 512) if b >= 4 * options.page_size]
        self._strides = options.retrieval_strides
        self._count = 0

    def happens(self, probability: float) -> bool:
        return self._random.random() < probability

    def wave(self) -> tuple[float, int]:
        """Requests a step, and how many steps long."""
        return self._random.choice(WAVES), self._random.randint(*WAVE_STEPS)

    def pick(self, things: Sequence[T]) -> T:
        return self._random.choice(things)

    def sample(self, things: Sequence[T], count: int) -> list[T]:
        return self._random.sample(things, min(count, len(things)))

    def request(self) -> AddRequest:
        """One in a hundred is longer than any engine of this size can serve."""
        self._count += 1
        max_tokens = self._random.randint(1, MAX_OUTPUT)
        if self.happens(0.01):
            max_tokens = MAX_MODEL_LEN
        num_prompt = round(math.exp(self._random.uniform(0, math.log(MAX_PROMPT))))
        known = self._random.randint(1, min(max_tokens, 20)) if self.happens(0.1) else 0
        return AddRequest(
            request_id=f"request-{self._count}",
            prompt_tokens=self._tokens(num_prompt),
            sampling=self._sampling(max_tokens),
            sparse=self._sparse(),
            generated_tokens=self._tokens(known),
        )

    def knobs(self) -> dict[str, KnobValue]:
        budget = self._random.choice(self._budgets)
        return {
            "token_budget": budget,
            "hbm_budget": self._random.choice((None, budget, budget + 200, 4 * budget)),
            "max_num_active_seqs": self._random.randint(1, MAX_NUM_SEQS),
            "prefill_chunk": self._random.choice((16, 50, 200, 512)),
            "copy_programs": self._random.choice((None, 4, 32)),
            "retrieval_stride": self._random.choice(self._strides),
        }

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._random.choices(range(self._vocab_size), k=count))

    def _sparse(self) -> SparseOptions:
        if self.happens(0.3):
            return SparseOptions(mode=SparseMode.OFF)
        return SparseOptions(token_budget=self._random.choice((None, *self._budgets)))

    def _sampling(self, max_tokens: int) -> SamplingParams:
        """Half plain greedy, the others with anything that a request may ask for."""
        choice = self._random.choice
        num_stops = self._vocab_size // 40 if self.happens(0.3) else 0
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            seed=self._random.getrandbits(32),
            stop_token_ids=self._tokens(num_stops),
            prompt_logprobs=choice((0, 2)) if self.happens(0.05) else None,
        )
        if self.happens(0.5):
            return params
        return replace(
            params,
            temperature=choice((0.0, 0.7, 1.3)),
            top_p=choice((1.0, 0.9)),
            top_k=choice((0, 5, 300)),
            min_p=choice((0.0, 0.05)),
            repetition_penalty=choice((1.0, 1.2)),
            presence_penalty=choice((0.0, 0.5)),
            frequency_penalty=choice((0.0, 0.3)),
            logit_bias=tuple(
                (token, choice((-3.0, 3.0))) for token in self._tokens(choice((0, 2)))
            ),
            logprobs=choice((None, 0, 3)),
        )
