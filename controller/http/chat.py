"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import uuid
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from sparsed.controller.http.bodies import body_of
from sparsed.controller.http.context import Context
from sparsed.controller.http.generation import Answer, Delta
from sparsed.controller.http.logprobs import chat_logprobs
from sparsed.controller.http.plan import Prompt, encode_chat, plan_choices
from sparsed.controller.http.protocol import ChatBody
from sparsed.controller.http.reply import Reply
from sparsed.controller.http.sampling import OutputLimits, check_model
from sparsed.controller.http.usage import Tally
from sparsed.controller.tokenizer import Tokenizer

router = APIRouter()
CheckedChatBody = Annotated[ChatBody, Depends(body_of(ChatBody))]


@router.post("/v1/chat/completions")
async def create_chat_completion(
    body: CheckedChatBody, request: Request, context: Context
) -> Response:
    """Answer a conversation."""
    model = check_model(body.model, context=context)
    reply_id = f"chatcmpl-{uuid.uuid4().hex}"
    token_ids = await asyncio.to_thread(encode_chat, body, context=context)
    plans = plan_choices(
        body,
        [Prompt(token_ids=token_ids)],
        limits=_limits(body),
        reply_id=reply_id,
        context=context,
    )
    reply = Reply(
        reply_id=reply_id,
        model=model,
        answer=Answer(plans, ledger=context.ledger, tokenizer=context.tokenizer),
        choices=ChatFormat(num_logprobs=_num_logprobs(body), tokenizer=context.tokenizer),
        tally=Tally(sparse_method=context.sparse_method, num_prompt_tokens=len(token_ids)),
    )
    return await reply.respond(body, request=request)


class ChatFormat:
    """Choices of this endpoint: a message, or in a stream what it gains."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, *, num_logprobs: int | None, tokenizer: Tokenizer) -> None:
        self._num_logprobs = num_logprobs
        self._tokenizer = tokenizer
        self._begun: set[int] = set()  # choices whose role has been told

    def whole(self, delta: Delta) -> dict[str, object]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return self._choice(delta, gain={"message": message})

    def chunk(self, delta: Delta) -> dict[str, object] | None:
        if not delta.text and delta.finish_reason is None and self._num_logprobs is None:
            return None
        gain = {"content": delta.text}
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            gain = {"role": "assistant"} | gain
        return self._choice(delta, gain={"delta": gain})

    def _choice(self, delta: Delta, *, gain: dict[str, object]) -> dict[str, object]:
        return {
            "index": delta.index,
            **gain,
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
        }

    def _logprobs(self, delta: Delta) -> dict[str, object] | None:
        if self._num_logprobs is None:
            return None
        return chat_logprobs(delta, num_top=self._num_logprobs, tokenizer=self._tokenizer)


def _num_logprobs(body: ChatBody) -> int | None:
    """Best tokens to list beside the one drawn; None: no log-probabilities at all."""
    return (body.top_logprobs or 0) if body.logprobs else None


def _limits(body: ChatBody) -> OutputLimits:
    new_name = body.max_completion_tokens is not None
    return OutputLimits(
        max_tokens=body.max_completion_tokens if new_name else body.max_tokens,
        max_tokens_field="max_completion_tokens" if new_name else "max_tokens",
        prompt_field="messages",
        logprobs=_num_logprobs(body),
    )
