"""The unmodified ``openai`` client against the real process, which runs a tiny random model."""

import asyncio
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

pytestmark = pytest.mark.slow
API_KEY = "secret"
BUDGET = 256  # tokens; a longer prompt is attended sparsely
LONG_PROMPT = [index * 7 % 251 for index in range(1500)]
MESSAGES: Any = [{"role": "user", "content": "Tell me about pages."}]


@pytest.fixture(scope="module")
def served(daemon: Any) -> Any:
    """One daemon for all tests of this file."""
    flags = ("--api-key", API_KEY, "--served-model-name", "tiny", "--token-budget", str(BUDGET))
    return daemon(*flags)


@pytest.fixture
def client(served: Any) -> Iterator[openai.OpenAI]:
    with served.client(api_key=API_KEY, max_retries=5) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == "tiny"
    assert model.model_dump()["max_model_len"] >= 2048


def test_chat_streams_what_it_answers_whole(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "model": "tiny"}
    whole = client.chat.completions.create(messages=MESSAGES, **options)
    *chunks, last = client.chat.completions.create(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **options
    )
    assert whole.choices[0].message.content
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and last.usage is not None
    assert last.usage.model_dump() == whole.usage.model_dump()
    assert whole.usage.completion_tokens == 40


def test_seed_decides(client: openai.OpenAI) -> None:
    def draw(seed: int, n: int = 1) -> list[str]:
        answer = client.completions.create(
            model="tiny", prompt="x", seed=seed, n=n, max_tokens=30, temperature=1.0
        )
        return [choice.text for choice in answer.choices]

    first, second = draw(5, n=2)
    assert first != second
    assert draw(5) == [first]
    assert draw(6) == [second]


def test_scoring_agrees_with_generation(client: openai.OpenAI) -> None:
    """Greedy tokens scored as a prompt have the log-probabilities they were drawn with."""
    drawn = client.completions.create(
        model="tiny", prompt=[1, 2, 3], max_tokens=8, temperature=0, logprobs=1
    )
    assert drawn.choices[0].logprobs is not None
    tokens = _ids_of(drawn.choices[0].logprobs.tokens or [])
    scored = client.completions.create(
        model="tiny", prompt=[1, 2, 3, *tokens], max_tokens=0, echo=True, logprobs=1
    )
    assert scored.choices[0].logprobs is not None
    logprobs = scored.choices[0].logprobs.token_logprobs
    assert logprobs is not None and logprobs[0] is None
    assert logprobs[3:] == pytest.approx(drawn.choices[0].logprobs.token_logprobs, abs=1e-3)
    assert scored.usage is not None and scored.usage.completion_tokens == 0


def test_sparse_details(client: openai.OpenAI) -> None:
    def details(**sparse: Any) -> dict[str, Any]:
        answer = client.completions.create(
            model="tiny",
            prompt=LONG_PROMPT,
            max_tokens=20,
            extra_body={"sparse": sparse, "ignore_eos": True},
        )
        assert answer.usage is not None
        found: dict[str, Any] = answer.usage.model_dump()["sparse_details"]
        return found

    sparse, wider, off = details(), details(token_budget=512), details(mode="off")
    assert sparse["method"] == "mean-key"
    assert sparse["token_budget"] == BUDGET
    assert sparse["sparse_steps"] > 0
    assert sparse["tokens_read"] < wider["tokens_read"] < off["tokens_read"]
    assert off["tokens_read"] == off["tokens_dense"] == sparse["tokens_dense"]


def test_stop_string_ends_the_text(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "x", "temperature": 0, "max_tokens": 50}
    text = client.completions.create(**options).choices[0].text
    stop = text[10:13]
    stopped = client.completions.create(stop=[stop], **options).choices[0]
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"


def test_failures(served: Any, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    assert bad.value.param == "temperature"
    limit = client.models.list().data[0].model_dump()["max_model_len"]
    with pytest.raises(openai.BadRequestError, match=f"{limit}") as long:
        client.completions.create(model="tiny", prompt=[1] * limit)
    assert long.value.param == "prompt"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with served.client(api_key="wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    assert served.is_ready()


def test_a_client_that_leaves_frees_its_place(served: Any, client: openai.OpenAI) -> None:
    endless: dict[str, Any] = {"model": "tiny", "prompt": "x", "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(stream=True, **endless)
    next(iter(stream))
    _wait_for(lambda: _num_running(served) == 1)
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1.0, max_retries=0).completions.create(**endless)
    _wait_for(lambda: _num_running(served) == 0, timeout_s=4.0)  # before they end by themselves


def test_a_slow_reader_holds_up_nobody(served: Any, client: openai.OpenAI) -> None:
    body = {"model": "tiny", "prompt": "x", "stream": True, "ignore_eos": True, "max_tokens": 2000}
    content = json.dumps(body).encode()
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Authorization: Bearer {API_KEY}\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        connection.recv(1)
        answer = client.completions.create(model="tiny", prompt="y", max_tokens=5)
    assert answer.usage is not None and answer.usage.completion_tokens == 5
    _wait_for(lambda: _num_running(served) == 0)


def test_two_hundred_clients_at_once(served: Any) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> int:
        answer = await client.completions.create(
            model="tiny", prompt=f"client {number}", max_tokens=4, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    async def ask_all() -> list[int]:
        async with openai.AsyncOpenAI(
            api_key=API_KEY, base_url=f"{served.url}/v1", max_retries=10, timeout=120.0
        ) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(200)))

    assert asyncio.run(ask_all()) == [4] * 200


def test_a_real_model_answers(daemon: Any, smollm2: Path) -> None:
    with daemon(model=str(smollm2)).client() as client:
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_tokens=40,
        )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"


def _ids_of(tokens: list[str]) -> list[int]:
    """Ids from the texts of the byte-level vocabulary: ``<300>``, ``bytes:\\xc3`` or one byte."""
    ids = []
    for token in tokens:
        number = re.fullmatch(r"<(\d+)>", token)
        raw = re.fullmatch(r"bytes:\\x(..)", token)
        ids.append(int(number[1]) if number else int(raw[1], 16) if raw else ord(token))
    return ids


def _num_running(served: Any) -> int:
    metrics = httpx.get(f"{served.url}/metrics").text
    (value,) = re.findall(r"^sparsed_requests_running(?:{.*})? (\S+)$", metrics, re.MULTILINE)
    return int(float(value))


def _wait_for(condition: Callable[[], bool], *, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)
