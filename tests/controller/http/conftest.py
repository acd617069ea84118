"""The HTTP application over a real ledger whose engine plays a script."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

from sparsed.controller.control import DaemonState
from sparsed.controller.http.app import create_app
from sparsed.controller.http.context import HttpContext
from sparsed.controller.ledger import Ledger, LedgerLimits
from sparsed.controller.tokenizer import Tokenizer
from sparsed.core import (
    AbortRequest,
    AddRequest,
    FinishReason,
    SparseDetails,
    TokenBatch,
    TokenLogprob,
    TokenOutput,
)
from sparsed.engine.models.dummy import dummy_config

DETAILS = SparseDetails(
    method="quest",
    token_budget=1024,
    decode_steps=4,
    sparse_steps=2,
    tokens_read=300,
    tokens_dense=400,
    coverage=0.9,
)


@dataclass
class ScriptedEngine:
    """Answers each request with ``text``, a token a byte, one token in each turn of the loop.

    ``blocked``: no token before it is set. ``failure``: the error that ends a request after its
    second token. ``num_aborted`` counts what the ledger stopped.
    """

    text: str | Callable[[AddRequest], str] = "Hello, world"
    finish_reason: FinishReason = FinishReason.LENGTH
    failure: str | None = None
    blocked: bool = False
    received: list[AddRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    on_batch: Callable[[TokenBatch], None] | None = None

    def send(self, message: AddRequest | AbortRequest) -> None:
        if isinstance(message, AbortRequest):
            self.aborted.append(message.request_id)
            return
        self.received.append(message)
        self.tasks.append(asyncio.create_task(self._play(message)))

    async def _play(self, request: AddRequest) -> None:
        for output in self._outputs(request):
            await asyncio.sleep(0)
            while self.blocked:
                await asyncio.sleep(0.001)
            if request.request_id in self.aborted:
                output = _last_word(output)
            assert self.on_batch is not None
            self.on_batch(TokenBatch(outputs=(output,)))
            if output.finish_reason is not None:
                return

    def _outputs(self, request: AddRequest) -> Iterable[TokenOutput]:
        text = self.text if isinstance(self.text, str) else self.text(request)
        tokens = list(text.encode())[: request.sampling.max_tokens]
        for index, token_id in enumerate(tokens):
            if self.failure is not None and index == 2:
                yield TokenOutput(
                    request_id=request.request_id,
                    index=index,
                    token_id=None,
                    finish_reason=FinishReason.ERROR,
                    error=self.failure,
                )
                return
            yield self._output(request, index=index, token_id=token_id, last=len(tokens) - 1)

    def _output(self, request: AddRequest, *, index: int, token_id: int, last: int) -> TokenOutput:
        output = TokenOutput(request_id=request.request_id, index=index, token_id=token_id)
        if request.sampling.logprobs is not None:
            output = replace(output, logprob=_score(token_id), top_logprobs=_best(token_id))
        if request.sampling.prompt_logprobs is not None and index == 0:
            scores = [(_score(token), *_best(token)) for token in request.prompt_tokens]
            output = replace(output, prompt_logprobs=(None, *scores[1:]))
        if index == last:
            output = replace(output, finish_reason=self.finish_reason, sparse=DETAILS)
        return output


def _last_word(output: TokenOutput) -> TokenOutput:
    """Of an aborted request, in the place of ``output``."""
    return replace(output, token_id=None, finish_reason=FinishReason.ABORT, sparse=DETAILS)


def _score(token_id: int) -> TokenLogprob:
    """Even tokens are the best ones, odd ones come third."""
    rank = 1 if token_id % 2 == 0 else 3
    return TokenLogprob(token_id=token_id, logprob=-0.5 * rank, rank=rank)


def _best(token_id: int) -> tuple[TokenLogprob, ...]:
    first = token_id if token_id % 2 == 0 else ord("X")
    return tuple(
        TokenLogprob(token_id=token, logprob=-0.5 * rank, rank=rank)
        for rank, token in ((1, first), (2, 0xE2))
    )


@dataclass
class Edge:
    """A client of the application, and what is behind it."""

    client: httpx.AsyncClient
    engine: ScriptedEngine
    ledger: Ledger

    async def post(self, path: str, **body: object) -> Any:
        """The decoded answer; fails unless the status is 200."""
        response = await self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    async def refused(self, path: str, status: int, **body: object) -> Any:
        """The error object; fails unless the status is ``status``."""
        response = await self.client.post(path, json=body)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert error["code"] == status
        assert error.keys() == {"message", "type", "param", "code"}
        return error

    async def events(self, path: str, **body: object) -> list[Any]:
        """The decoded events of a stream; fails unless it ends with the end mark."""
        response = await self.client.post(path, json={"stream": True, **body})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, end, empty = response.text.split("\n\n")
        assert (end, empty) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


OpenEdge = Callable[..., Any]


@asynccontextmanager
async def _open_edge(
    engine: ScriptedEngine, *, max_waiting: int = 1000, **changes: Any
) -> AsyncIterator[Edge]:
    ledger = Ledger(
        LedgerLimits(max_tokens=1000, max_waiting=max_waiting, num_active=lambda: 4),
        send=engine.send,
        observe=lambda *, ttft_s, tpot_s: None,
        refuse=lambda _reason: None,
        clock=lambda: 0.0,
        draw_seed=lambda: 7,
    )
    engine.on_batch = ledger.on_batch
    ledger.on_engine_ready()
    defaults = HttpContext(
        ledger=ledger,
        tokenizer=Tokenizer.of_bytes(vocab_size=512),
        model_ids=("tiny", "alias"),
        model=dummy_config("dummy:tiny"),
        max_model_len=1000,
        sparse_method="quest",
        state=lambda: DaemonState.SERVING,
        metrics=lambda: b"sparsed_up 1\n",
        api_key=None,
        version="1.2.3",
    )
    app = create_app(replace(defaults, **changes))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield Edge(client=client, engine=engine, ledger=ledger)
    for task in engine.tasks:
        task.cancel()
    outcomes = await asyncio.gather(*engine.tasks, return_exceptions=True)
    assert not [item for item in outcomes if isinstance(item, Exception)]
    assert ledger.num_unfinished == 0, "a request outlived its client"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def open_edge(engine: ScriptedEngine) -> OpenEdge:
    """Opens the application with changes to its context: ``async with open_edge(...) as edge``."""
    return lambda **changes: _open_edge(engine, **changes)
