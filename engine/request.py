"""One request inside the engine: its tokens and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b

from sparsed.core import (
    KNOBS_BY_NAME,
    AddRequest,
    FinishReason,
    InputError,
    SamplingParams,
    TokenLogprob,
    WaitReason,
)
from sparsed.engine.batch import DrawParams

GREEDY_BELOW = 1e-5  # a temperature under this is greedy: dividing by it gains nothing


class Status(StrEnum):
    """WAITING -> PREFILL -> DECODE -> FINISHED; FINISHED can be reached from everywhere."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


@dataclass(kw_only=True, slots=True, eq=False)
class RequestState:
    """A request and its progress.

    ``row`` is set by the scheduler on admission; ``num_prefilled``, ``tokens`` and
    ``prompt_logprobs`` grow in ``Engine.step``. ``tokens`` starts empty even when the request
    brings ``generated_tokens``: those are forced one by one. ``num_in_flight`` tokens after them
    are drawn on the device and not read yet. The scheduler fills ``arrived_s`` and ``wait_reason``,
    None unless it is out of the batch; ``admission`` numbers the admitted ones, and
    ``changed_step`` is when it was admitted, spilled or brought back last.
    """

    request: AddRequest
    seed: int
    status: Status = Status.WAITING
    row: int | None = None
    num_prefilled: int = 0
    tokens: list[int] = field(default_factory=list)
    num_in_flight: int = 0
    prompt_logprobs: list[tuple[TokenLogprob, ...] | None] = field(default_factory=list)
    arrived_s: float = 0.0
    wait_reason: WaitReason | None = None
    admission: int = 0
    changed_step: int = 0
    is_plain: bool = field(init=False)  # drawn from the logits as they are, and only the token

    def __post_init__(self) -> None:
        params = self.sampling
        adjusted = self.has_penalties or bool(params.logit_bias)
        self.is_plain = not adjusted and params.logprobs is None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.request.prompt_tokens

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def is_greedy(self) -> bool:
        return self.sampling.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        params = self.sampling
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)

    @property
    def draw(self) -> DrawParams | None:
        """How the next token, after all in flight, is drawn; None: it is the most likely one."""
        if self.is_greedy:
            return None
        params = self.sampling
        return DrawParams(
            seed=self.seed,
            token_index=len(self.tokens) + self.num_in_flight,
            temperature=params.temperature,
            top_p=params.top_p,
            min_p=params.min_p,
            top_k=params.top_k,
        )

    @property
    def num_total_tokens(self) -> int:
        """Tokens the request can grow to."""
        return len(self.prompt) + self.sampling.max_tokens

    @property
    def next_position(self) -> int:
        """Where the next decode step puts its token, the last one drawn."""
        return len(self.prompt) + len(self.tokens) + self.num_in_flight - 1

    @property
    def num_computed(self) -> int:
        """Tokens whose K and V are in the cache once all that was launched is done."""
        return self.num_prefilled if self.status is Status.PREFILL else self.next_position

    @property
    def last_token(self) -> int | None:
        """The last one drawn, None while only the device knows it."""
        return None if self.num_in_flight else self.tokens[-1]

    @property
    def may_decode(self) -> bool:
        """Whether a step may draw another token, whatever those in flight turn out to be."""
        drawn = len(self.tokens) + self.num_in_flight
        return self.status is Status.DECODE and drawn < self.sampling.max_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """A replayed request reported them before its first token."""
        return self.sampling.prompt_logprobs is not None and not self.request.generated_tokens

    @property
    def forced_token(self) -> int | None:
        """The next token when it is known already (replay)."""
        known = self.request.generated_tokens
        return known[len(self.tokens)] if len(self.tokens) < len(known) else None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why no further token may be drawn, None if one may."""
        if self.tokens and self.tokens[-1] in self.sampling.stop_token_ids:
            return FinishReason.STOP
        if len(self.tokens) >= self.sampling.max_tokens:
            return FinishReason.LENGTH
        return None

    def admit(self, row: int) -> None:
        assert self.status is Status.WAITING, self.status
        self.row = row
        self.status = Status.PREFILL

    def advance_prefill(self, num_tokens: int) -> None:
        """``num_tokens`` more of the prompt are in the cache."""
        assert self.status is Status.PREFILL, self.status
        self.num_prefilled += num_tokens
        assert self.num_prefilled <= len(self.prompt)
        if self.num_prefilled == len(self.prompt):
            self.status = Status.DECODE

    def append(self, token: int) -> None:
        assert self.status is Status.DECODE, self.status
        self.tokens.append(token)

    def finish(self) -> None:
        assert self.status is not Status.FINISHED
        self.status = Status.FINISHED


def check_request(request: AddRequest, *, page_size: int, vocab_size: int) -> None:
    """InputError naming the field that no engine of this page and vocabulary size can serve."""
    if not request.prompt_tokens:
        raise InputError("the prompt is empty; send at least one token", field="prompt")
    biased = [token for token, _ in request.sampling.logit_bias]
    for field_name, tokens in (
        ("prompt", request.prompt_tokens),
        ("generated_tokens", request.generated_tokens),
        ("logit_bias", biased),
    ):
        if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
            raise InputError(
                f"{field_name} has a token id outside the vocabulary; "
                f"ids are 0 to {vocab_size - 1}",
                field=field_name,
            )
    if request.sparse.token_budget is not None:
        _check_token_budget(request.sparse.token_budget, page_size=page_size)


def _check_token_budget(token_budget: int, *, page_size: int) -> None:
    spec = KNOBS_BY_NAME["token_budget"]
    spec.check(token_budget)
    if token_budget < 4 * page_size:
        raise InputError(
            f"sparse.token_budget={token_budget} holds fewer than four pages of {page_size} "
            "tokens; raise it",
            field="sparse.token_budget",
        )


def seed_of(request: AddRequest, *, engine_seed: int) -> int:
    """The request's seed, or one that a restarted engine will find again."""
    if request.sampling.seed is not None:
        return request.sampling.seed
    text = f"{engine_seed}/{request.request_id}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest())
