"""GET /v1/models."""

from __future__ import annotations

import time

from fastapi import APIRouter

from sparsed.controller.http.context import Context, HttpContext
from sparsed.controller.http.sampling import check_model

router = APIRouter()


@router.get("/v1/models")
async def list_models(context: Context) -> dict[str, object]:
    """Every name the model is served under."""
    return {
        "object": "list",
        "data": [_describe(model, context=context) for model in context.model_ids],
    }


@router.get("/v1/models/{model:path}")
async def get_model(model: str, context: Context) -> dict[str, object]:
    """One of them."""
    return _describe(check_model(model, context=context), context=context)


def _describe(model: str, *, context: HttpContext) -> dict[str, object]:
    return {
        "id": model,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "sparsed",
        "root": context.model_ids[0],
        "parent": None,
        "max_model_len": context.max_model_len,
    }
