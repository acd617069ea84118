"""What a client sees of the soak: answers, and whether they are those of each request alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sparsed.core import AddRequest, FinishReason, SamplingParams, SparseMode, TokenBatch
from sparsed.engine.engine import Engine

NEAR_TIE = 1e-3  # logits closer than this may change places with the batch a token is drawn in
ADJUSTMENTS = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")


@dataclass(kw_only=True, slots=True)
class Answer:
    """A request as it was first asked and what came of it. ``tokens`` begin with those it brought.
    A request that was sent again goes on in the same answer."""

    request: AddRequest
    tokens: list[int]
    reason: FinishReason | None = None
    num_resent: int = 0

    def is_comparable(self, strides: Sequence[int]) -> bool:
        """Its text depends on nothing but the request. Where it keeps what it selects, a change of
        ``strides`` and being sent again show in the text."""
        sparse, params = self.request.sparse, self.request.sampling
        ranks_alike = set(strides) == {1} or (len(strides) == 1 and not self.num_resent)
        own = sparse.mode is SparseMode.OFF or (sparse.token_budget is not None and ranks_alike)
        drawn = len(self.tokens) > len(self.request.generated_tokens)
        return own and drawn and params.temperature == 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A text that is not that of the request alone, from token ``index`` on. ``gap``: of the two
    best logits there; None where they are adjusted before a token is chosen."""

    request_id: str
    index: int
    gap: float | None

    @property
    def is_near_tie(self) -> bool:
        return self.gap is not None and self.gap < NEAR_TIE


class Ledger:
    """What was asked and what came, as a client sees it."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.num_tokens = 0
        self._open: dict[str, Answer] = {}
        self._closing: dict[str, int] = {}  # indices of closing outputs that are still to come

    @property
    def unfinished(self) -> list[Answer]:
        return list(self._open.values())

    def add(self, request: AddRequest) -> None:
        answer = Answer(request=request, tokens=list(request.generated_tokens))
        self.answers.append(answer)
        self._open[request.request_id] = answer

    def send_again(self, answer: Answer) -> AddRequest:
        """The aborted request with the tokens it has; its closing output is not there yet."""
        answer.num_resent += 1
        self._closing[answer.request.request_id] = len(answer.tokens)
        return replace(answer.request, generated_tokens=tuple(answer.tokens))

    def take(self, batch: TokenBatch) -> None:
        """AssertionError for an output that is not the next one of an unfinished request."""
        for output in batch.outputs:
            answer = self._open[output.request_id]
            assert output.index == len(answer.tokens), output
            if output.request_id in self._closing:
                del self._closing[output.request_id]
                assert output.finish_reason is FinishReason.ABORT, output
                continue
            if output.token_id is not None:
                answer.tokens.append(output.token_id)
                self.num_tokens += 1
            if output.finish_reason is not None:
                answer.reason = output.finish_reason
                del self._open[output.request_id]


def compare_texts(answers: list[Answer], engine: Engine) -> Iterator[Difference]:
    """Those whose text is not what the request gets alone, on an idle engine with room for it; an
    aborted one has its beginning."""
    for answer in answers:
        alone = run_alone(engine, answer.request)
        expected = alone.tokens[: len(answer.tokens)]
        ended = answer.reason is FinishReason.ABORT or answer.reason is alone.reason
        if answer.tokens == expected and ended:
            continue
        pairs = enumerate(zip(answer.tokens, expected, strict=False))
        index = next((i for i, (mine, other) in pairs if mine != other), len(expected))
        name = answer.request.request_id
        yield Difference(request_id=name, index=index, gap=gap_at(engine, alone, index))


def run_alone(engine: Engine, request: AddRequest) -> Answer:
    ledger = Ledger()
    ledger.add(request)
    engine.add(request)
    while engine.has_work:
        ledger.take(engine.step())
    return ledger.answers[0]


def gap_at(engine: Engine, alone: Answer, index: int) -> float | None:
    """Between the best two logits of a token, all those before it as they are."""
    params = SamplingParams(max_tokens=index + 1, temperature=0.0, logprobs=2)
    known, asked = tuple(alone.tokens[:index]), alone.request.sampling
    if any(getattr(asked, name) != getattr(params, name) for name in ADJUSTMENTS):
        return None
    engine.add(replace(alone.request, sampling=params, generated_tokens=known))
    best: list[float] = []
    while engine.has_work:
        for output in engine.step().outputs:
            best = [entry.logprob for entry in output.top_logprobs]
    return best[0] - best[1] if len(best) > 1 else None
