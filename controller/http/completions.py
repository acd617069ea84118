"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import uuid
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from sparsed.controller.http.bodies import body_of
from sparsed.controller.http.context import Context, HttpContext
from sparsed.controller.http.generation import Answer, Delta
from sparsed.controller.http.logprobs import CompletionLogprobs
from sparsed.controller.http.plan import Prompt, encode_text, plan_choices
from sparsed.controller.http.protocol import CompletionBody
from sparsed.controller.http.reply import Reply
from sparsed.controller.http.sampling import OutputLimits, check_model, check_token_ids
from sparsed.controller.http.usage import Tally
from sparsed.controller.tokenizer import Tokenizer

router = APIRouter()
CheckedCompletionBody = Annotated[CompletionBody, Depends(body_of(CompletionBody))]


@router.post("/v1/completions")
async def create_completion(
    body: CheckedCompletionBody, request: Request, context: Context
) -> Response:
    """Continue one or several prompts."""
    model = check_model(body.model, context=context)
    reply_id = f"cmpl-{uuid.uuid4().hex}"
    prompts = await asyncio.to_thread(_encode_prompts, body, context=context)
    plans = plan_choices(body, prompts, limits=_limits(body), reply_id=reply_id, context=context)
    reply = Reply(
        reply_id=reply_id,
        model=model,
        answer=Answer(plans, ledger=context.ledger, tokenizer=context.tokenizer),
        choices=CompletionFormat(num_logprobs=body.logprobs, tokenizer=context.tokenizer),
        tally=Tally(
            sparse_method=context.sparse_method,
            num_prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts),
        ),
    )
    return await reply.respond(body, request=request)


class CompletionFormat:
    """Choices of this endpoint: the same in a chunk and in a whole answer."""

    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, *, num_logprobs: int | None, tokenizer: Tokenizer) -> None:
        self._num_logprobs = num_logprobs
        self._tokenizer = tokenizer
        self._logprobs: dict[int, CompletionLogprobs] = {}  # by choice

    def whole(self, delta: Delta) -> dict[str, object]:
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._take_logprobs(delta),
            "finish_reason": delta.finish_reason,
        }

    def chunk(self, delta: Delta) -> dict[str, object] | None:
        if not delta.text and delta.finish_reason is None and self._num_logprobs is None:
            return None
        return self.whole(delta)

    def _take_logprobs(self, delta: Delta) -> dict[str, object] | None:
        if self._num_logprobs is None:
            return None
        if delta.index not in self._logprobs:
            self._logprobs[delta.index] = CompletionLogprobs(
                num_top=self._num_logprobs, tokenizer=self._tokenizer
            )
        return self._logprobs[delta.index].take(delta)


def _limits(body: CompletionBody) -> OutputLimits:
    return OutputLimits(
        max_tokens=body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )


def _encode_prompts(body: CompletionBody, *, context: HttpContext) -> list[Prompt]:
    return [_encode_prompt(prompt, body=body, context=context) for prompt in body.prompt]


def _encode_prompt(
    prompt: str | list[int], *, body: CompletionBody, context: HttpContext
) -> Prompt:
    if isinstance(prompt, str):
        token_ids = encode_text(
            prompt, field="prompt", add_special_tokens=body.add_special_tokens, context=context
        )
        return Prompt(token_ids=token_ids, echo=prompt if body.echo else None)
    check_token_ids(prompt, context=context, field="prompt")
    skip = body.skip_special_tokens
    echo = context.tokenizer.decode(prompt, skip_special_tokens=skip) if body.echo else None
    return Prompt(token_ids=tuple(prompt), echo=echo)
