"""From the engine's tokens to the text of an answer, the same for every endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from sparsed.controller.detokenizer import Detokenizer, StopMatcher
from sparsed.controller.http.errors import GenerationError
from sparsed.controller.ledger import Ledger, Unavailable
from sparsed.controller.request_stream import RequestStream
from sparsed.controller.tokenizer import Tokenizer
from sparsed.core import AddRequest, FinishReason, SparseDetails, TokenOutput

RETRY_S = 30.0  # when a client whose request was cut off may come back


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRules:
    """What becomes text. ``hide_output``: the prompt is scored, the token drawn is not shown."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    hide_output: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoicePlan:
    """One choice of an answer, before it runs. ``echo``: prompt text that goes out first, None if
    the prompt is not part of the answer."""

    index: int
    request: AddRequest
    rules: TextRules
    echo: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """What one choice has gained. ``outputs`` are the tokens behind it, held back ones included;
    the last delta of a choice has a finish reason."""

    index: int
    text: str = ""
    outputs: tuple[TokenOutput, ...] = ()
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    sparse: SparseDetails | None = None
    prompt_tokens: tuple[int, ...] | None = field(default=None, repr=False)  # echoed, first delta

    def then(self, later: Delta) -> Delta:
        """Both together."""
        return replace(
            self,
            text=self.text + later.text,
            outputs=self.outputs + later.outputs,
            num_tokens=self.num_tokens + later.num_tokens,
            finish_reason=later.finish_reason,
            sparse=later.sparse,
        )


class ChoiceText:
    """Turns the outputs of one choice into deltas; GenerationError if the engine gave up."""

    def __init__(self, plan: ChoicePlan, *, tokenizer: Tokenizer) -> None:
        rules = plan.rules
        self._plan = plan
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=rules.skip_special_tokens)
        self._stops = StopMatcher(rules.stops, include_stop=rules.include_stop)
        self._started = False

    def take(self, output: TokenOutput) -> Delta:
        if output.finish_reason is FinishReason.ABORT:
            raise Unavailable(output.error or "the request was cut off", retry_after_s=RETRY_S)
        if output.finish_reason is FinishReason.ERROR:
            raise GenerationError(output.error or "the engine failed")
        delta = self._hidden(output) if self._plan.rules.hide_output else self._shown(output)
        if self._started or self._plan.echo is None:
            return delta
        self._started = True
        prompt_tokens = self._plan.request.prompt_tokens
        return replace(delta, text=self._plan.echo + delta.text, prompt_tokens=prompt_tokens)

    def _hidden(self, output: TokenOutput) -> Delta:
        return Delta(
            index=self._plan.index,
            outputs=(replace(output, token_id=None),),
            finish_reason=FinishReason.LENGTH,
            sparse=output.sparse,
        )

    def _shown(self, output: TokenOutput) -> Delta:
        piece = "" if self._is_quiet_end(output) else self._push(output)
        ended = output.finish_reason is not None
        if ended:
            piece += self._detokenizer.flush()
        match = self._stops.push(piece)
        rest = self._stops.flush() if ended else ""
        return Delta(
            index=self._plan.index,
            text=match.text + rest,
            outputs=(output,),
            num_tokens=int(output.token_id is not None),
            finish_reason=output.finish_reason if match.stop is None else FinishReason.STOP,
            sparse=output.sparse,
        )

    def _push(self, output: TokenOutput) -> str:
        return "" if output.token_id is None else self._detokenizer.push(output.token_id)

    def _is_quiet_end(self, output: TokenOutput) -> bool:
        """A stop token ends the text without being part of it, as a stop string does."""
        return (
            output.finish_reason is FinishReason.STOP
            and output.token_id in self._plan.request.sampling.stop_token_ids
            and not self._plan.rules.include_stop
        )


class Answer:
    """The running choices of one request body. Whoever made it must ``cancel`` it at the end."""

    def __init__(
        self, plans: Sequence[ChoicePlan], *, ledger: Ledger, tokenizer: Tokenizer
    ) -> None:
        """Submit all choices or none; errors as ``Ledger.submit``."""
        self.plans = tuple(plans)
        self._tokenizer = tokenizer
        self._streams: list[RequestStream] = []
        try:
            for plan in plans:
                self._streams.append(ledger.submit(plan.request))
        except Exception:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Stop what still runs; harmless when all is done."""
        for stream in self._streams:
            stream.cancel()

    async def deltas(self) -> AsyncGenerator[Delta]:
        """The deltas of all choices as they come; GenerationError if the engine gave one up."""
        sources = [
            self._follow(plan, stream)
            for plan, stream in zip(self.plans, self._streams, strict=True)
        ]
        async with aclosing(sources[0] if len(sources) == 1 else _merge(sources)) as merged:
            async for delta in merged:
                yield delta

    async def _follow(self, plan: ChoicePlan, stream: RequestStream) -> AsyncGenerator[Delta]:
        text = ChoiceText(plan, tokenizer=self._tokenizer)
        async for output in stream:
            delta = text.take(output)
            if delta.finish_reason is not None and output.finish_reason is None:
                last = await stream.stop()  # a stop string ends it before the engine does
                delta = replace(delta, sparse=last.sparse if last else None)
            yield delta
            if delta.finish_reason is not None:
                return
        raise GenerationError("the request was cancelled")


async def collect(
    deltas: AsyncIterator[Delta], *, observe: Callable[[Delta], None]
) -> dict[int, Delta]:
    """All deltas of each choice as one, by index; ``observe`` sees each of them."""
    whole: dict[int, Delta] = {}
    async for delta in deltas:
        observe(delta)
        before = whole.get(delta.index)
        whole[delta.index] = delta if before is None else before.then(delta)
    return dict(sorted(whole.items()))


async def _merge(sources: Sequence[AsyncGenerator[Delta]]) -> AsyncGenerator[Delta]:
    """The items of all sources in order of arrival; the first failure ends it."""
    waiting = {asyncio.create_task(_next(source)): source for source in sources}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                source = waiting.pop(task)
                item = task.result()
                if item is not None:
                    waiting[asyncio.create_task(_next(source))] = source
                    yield item
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for source in sources:
            await source.aclose()


async def _next(source: AsyncGenerator[Delta]) -> Delta | None:
    return await anext(source, None)
