"""Bodies of requests, parsed and checked away from the event loop when they are large."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sparsed.controller.http.protocol import Body

INLINE_BYTES = 64 << 10  # less is parsed sooner than a thread begins
BASE_BODY_BYTES = 4 << 20  # several prompts, and whatever comes with them
BYTES_PER_TOKEN = 32  # ids take up to 9, texts seldom 24, with every letter escaped

BodyT = TypeVar("BodyT", bound=Body)

logger = logging.getLogger(__name__)


def max_body_bytes(max_model_len: int) -> int:
    """More than a body needs whose prompt fits the model. What is larger is never parsed."""
    return BASE_BODY_BYTES + BYTES_PER_TOKEN * max_model_len


def body_of(kind: type[BodyT]) -> Callable[[Request], Awaitable[BodyT]]:
    """A dependency that gives the checked body of a request.

    Errors: RequestValidationError as FastAPI's own; HTTPException for JSON beyond reading, and
    for a body whose client left before its end.
    """

    async def read(request: Request) -> BodyT:
        data = await _read(request)
        if not data or not _is_json(request):
            raise RequestValidationError([{"type": "missing", "loc": ("body",), "msg": ""}])
        if len(data) <= INLINE_BYTES:
            return _parse(data, kind=kind)
        return await asyncio.to_thread(_parse, data, kind=kind)

    return read


async def _read(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect:
        logger.debug("a client left in the middle of its body")
        raise HTTPException(400, "the body ended too early") from None  # nobody reads it


def _is_json(request: Request) -> bool:
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return media == "application/json" or (
        media.startswith("application/") and media.endswith("+json")
    )


def _parse(data: bytes, *, kind: type[BodyT]) -> BodyT:
    try:
        return kind.model_validate(_decode(data))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise RequestValidationError(
            [{**problem, "loc": ("body", *problem["loc"])} for problem in problems]
        ) from error


def _decode(data: bytes) -> object:
    """The fast parser holds the interpreter's lock a third as long, the slow one takes what the
    fast one does not (NaN, half a surrogate pair) and says where a body is broken."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        problem = {"type": "json_invalid", "loc": ("body", error.pos), "ctx": {"error": error.msg}}
        raise RequestValidationError([problem]) from error
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"the body is not UTF-8: byte {error.start} is wrong") from error
    except RecursionError as error:
        raise HTTPException(400, f"the body cannot be read as JSON: {error}") from error
    except ValueError as error:  # the only other one: Python refuses to convert so many digits
        raise HTTPException(400, "the body has a number with too many digits") from error
