"""POST /tokenize and /detokenize."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends

from sparsed.controller.http.bodies import body_of
from sparsed.controller.http.context import Context, HttpContext
from sparsed.controller.http.logprobs import token_text
from sparsed.controller.http.plan import check_length, encode_chat
from sparsed.controller.http.protocol import DetokenizeBody, TokenizeBody
from sparsed.controller.http.sampling import check_model, check_token_ids

router = APIRouter()
CheckedDetokenizeBody = Annotated[DetokenizeBody, Depends(body_of(DetokenizeBody))]
CheckedTokenizeBody = Annotated[TokenizeBody, Depends(body_of(TokenizeBody))]


@router.post("/tokenize")
async def tokenize(body: CheckedTokenizeBody, context: Context) -> dict[str, object]:
    """The token ids of a text or of a conversation."""
    check_model(body.model, context=context)
    token_ids = await asyncio.to_thread(_encode, body, context=context)
    texts = None
    if body.return_token_strs:
        texts = [token_text(token_id, tokenizer=context.tokenizer) for token_id in token_ids]
    return {
        "count": len(token_ids),
        "max_model_len": context.max_model_len,
        "tokens": token_ids,
        "token_strs": texts,
    }


@router.post("/detokenize")
async def detokenize(body: CheckedDetokenizeBody, context: Context) -> dict[str, object]:
    """The text of token ids, special ones included."""
    check_model(body.model, context=context)
    check_token_ids(body.tokens, context=context, field="tokens")
    text = await asyncio.to_thread(context.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return {"prompt": text}


def _encode(body: TokenizeBody, *, context: HttpContext) -> list[int]:
    if body.prompt is None:
        return list(encode_chat(body, context=context))
    check_length(body.prompt, field="prompt", context=context)
    special = True if body.add_special_tokens is None else body.add_special_tokens
    return context.tokenizer.encode(body.prompt, add_special_tokens=special)
