"""What must hold before load is sent: a server answers, and has the model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from sparsed.controller.bench.connection import (
    BadAnswer,
    ConnectFailed,
    Server,
    exchange,
    in_words,
    look_up,
)
from sparsed.controller.bench.token_stream import error_message
from sparsed.core import ExitCode, InputError, StartError, WorkloadRequest

TIMEOUT_S: Final = 30.0
MODELS_PATH: Final = "/v1/models"
VERSION_PATH: Final = "/version"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """``max_model_len``: longest prompt plus output in tokens. None: the server does not say."""

    name: str
    max_model_len: int | None = None
    server_version: str | None = None


class _Entry(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Listing(msgspec.Struct):
    data: list[_Entry]


async def reach(server: Server) -> Server:
    """The server with its address looked up; StartError (69) if nobody listens there."""
    with _answer_expected(server):
        async with asyncio.timeout(TIMEOUT_S):
            return await look_up(server)


async def find_model(server: Server, *, wanted: str | None) -> ServedModel:
    """The model to ask for: ``wanted``, or the first one the server has.

    StartError (69) if nobody answers as a model server does; InputError naming the API key or the
    model. A server without a list of models is believed if ``wanted`` is given.
    """
    status, body = await _get(server, MODELS_PATH)
    model = _choose(status, body, server=server, wanted=wanted)
    return replace(model, server_version=await _server_version(server))


def _choose(status: int, body: bytes, *, server: Server, wanted: str | None) -> ServedModel:
    if status in (401, 403):
        raise InputError(
            f"{server.url} refuses the API key (status {status}); give the right one with "
            "--api-key, or in SPARSED_API_KEY",
            field="api-key",
        )
    if status == 404 and wanted is not None:
        return ServedModel(name=wanted)
    models = _models(body) if status == 200 else []
    if not models:
        raise StartError(
            f"{server.url}{MODELS_PATH} lists no model (status {status}: "
            f"{error_message(body, max_chars=120)}); is it the right --url?",
            code=ExitCode.UNAVAILABLE,
        )
    if wanted is None:
        return models[0]
    if found := next((model for model in models if model.name == wanted), None):
        return found
    known = ", ".join(model.name for model in models)
    raise InputError(f"{server.url} has no model {wanted!r}; it has: {known}", field="model")


def check_lengths(requests: tuple[WorkloadRequest, ...], *, model: ServedModel, url: str) -> None:
    """InputError if the server could never answer some of the requests."""
    limit = model.max_model_len
    if limit is None:
        return
    over = [item for item in requests if item.input_tokens + item.output_tokens > limit]
    if over:
        longest = max(over, key=lambda item: item.input_tokens + item.output_tokens)
        output_tokens = max(item.output_tokens for item in requests)
        remedy = (
            f"--max-input-len {limit - output_tokens}"
            if output_tokens < limit
            else "--max-input-len and --max-output-len"
        )
        raise InputError(
            f"{len(over)} of {len(requests)} requests are longer than the {limit} tokens that "
            f"{model.name} at {url} takes, prompt and output together (the longest: "
            f"{longest.input_tokens} + {longest.output_tokens}); clip them with {remedy}",
            field="input-len",
        )


class _Version(msgspec.Struct):
    version: str


async def _get(server: Server, path: str) -> tuple[int, bytes]:
    """Status and body; StartError if there is no answer."""
    with _answer_expected(server):
        async with (
            asyncio.timeout(TIMEOUT_S),
            exchange(server, method="GET", path=path) as response,
        ):
            return response.status, await response.body()


@contextmanager
def _answer_expected(server: Server) -> Iterator[None]:
    """Turns what can go wrong into one line for the user."""
    try:
        yield
        return
    except TimeoutError:
        reason = f"no answer in {TIMEOUT_S:.0f} s"
    except (ConnectFailed, BadAnswer, OSError, EOFError) as error:
        reason = in_words(error)
    raise StartError(
        f"no server answers at {server.url} ({reason}); start one with: sparsed start, or give "
        "another --url",
        code=ExitCode.UNAVAILABLE,
    )


async def _server_version(server: Server) -> str | None:
    status, body = await _get(server, VERSION_PATH)
    try:
        return msgspec.json.decode(body, type=_Version).version if status == 200 else None
    except msgspec.DecodeError:
        return None


def _models(body: bytes) -> list[ServedModel]:
    try:
        listing = msgspec.json.decode(body, type=_Listing)
    except msgspec.DecodeError:
        return []
    return [ServedModel(name=entry.id, max_model_len=entry.max_model_len) for entry in listing.data]
