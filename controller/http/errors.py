"""Every failure as the error object that OpenAI clients know."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from sparsed.controller.ledger import Unavailable
from sparsed.core import InputError, RefusalReason

ERROR_TYPES: Mapping[int, str] = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}

logger = logging.getLogger(__name__)


class GenerationError(Exception):
    """The engine gave a request up; the message says why."""


class ModelNotFoundError(InputError):
    """The body names a model that is not served."""


class TextTooLongError(InputError):
    """A text has more characters than all tokens that the model takes: it is not tokenized, and
    counts as a request that was too long."""


def error_body(message: str, *, status: int, param: str | None = None) -> dict[str, object]:
    """The error object; ``code`` is the status, ``param`` the field at fault."""
    kind = ERROR_TYPES.get(status, HTTPStatus(status).phrase.title().replace(" ", "") + "Error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error_response(
    message: str,
    *,
    status: int,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    return Response(
        msgspec.json.encode(error_body(message, status=status, param=param)),
        status_code=status,
        media_type="application/json",
        headers=headers,
    )


def status_of(error: Exception) -> int:
    """The status an exception means; 500 for those nobody foresaw."""
    if isinstance(error, HTTPException):
        return error.status_code
    if isinstance(error, ModelNotFoundError):
        return 404
    if isinstance(error, InputError):
        return 400
    return 503 if isinstance(error, Unavailable) else 500


def describe(error: Exception) -> dict[str, object]:
    """The error object of an exception; an unforeseen one is logged and not told."""
    status = status_of(error)
    if isinstance(error, InputError):
        return error_body(str(error), status=status, param=error.field)
    if isinstance(error, HTTPException):
        return error_body(str(error.detail), status=status)
    if isinstance(error, Unavailable | GenerationError):
        return error_body(str(error), status=status)
    logger.error("unexpected failure in a request", exc_info=error)
    return error_body("internal error; the daemon's log has the details", status=status)


def field_path(location: Sequence[int | str]) -> str | None:
    """``("body", "messages", 0, "role")`` as ``messages[0].role``; None for the whole body."""
    path = ""
    for part in location[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or None


def install_handlers(app: FastAPI) -> None:
    """Answer every exception of a handler with an error object."""
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    for kind in (HTTPException, InputError, Unavailable, GenerationError, Exception):
        app.add_exception_handler(kind, _on_error)


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, TextTooLongError):
        request.app.state.context.ledger.refuse(RefusalReason.TOO_LONG)
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, Unavailable):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return Response(
        msgspec.json.encode(describe(error)),
        status_code=status_of(error),
        media_type="application/json",
        headers=headers,
    )


async def _on_invalid_body(request: Request, error: Exception) -> Response:
    """The first thing wrong with the body; FastAPI found it."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    kind, location, context = first["type"], first["loc"], first.get("ctx", {})
    if kind == "json_invalid":
        where = f"{context['error']} at character {location[-1]}"
        return error_response(f"the body is not valid JSON: {where}", status=400)
    cause = context.get("error")
    if isinstance(cause, InputError) and cause.field is not None:  # about fields together
        param = field_path((*location, cause.field))
        return error_response(str(cause), status=400, param=param)
    param = field_path(location)
    return error_response(_explain(first, param=param), status=400, param=param)


def _explain(problem: Mapping[str, object], *, param: str | None) -> str:
    if param is None:
        return "the body must be a JSON object, sent as application/json"
    if problem["type"] == "extra_forbidden":
        return f"unknown field '{param}'; remove it"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{param}: {message[:1].lower()}{message[1:]}"
