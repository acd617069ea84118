"""The unmodified ``openai`` client, without a socket; with one: tests/acceptance."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.anyio
MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@asynccontextmanager
async def _client(edge: Any, *, api_key: str = "secret") -> AsyncIterator[openai.AsyncOpenAI]:
    client = openai.AsyncOpenAI(
        api_key=api_key, base_url="http://test/v1", http_client=edge.client, max_retries=0
    )
    yield client


async def test_chat(open_edge: Any) -> None:
    async with open_edge(api_key="secret") as edge, _client(edge) as client:
        answer = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=1
        )
        follow_up = await client.chat.completions.create(
            model="tiny",
            messages=[*MESSAGES, answer.choices[0].message.model_dump(), *MESSAGES],
            extra_body={"sparse": {"mode": "off"}, "ignore_eos": True},
        )
    assert answer.choices[0].message.content == "Hello, world"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert len(answer.choices[0].logprobs.content) == 12
    assert answer.usage is not None
    assert answer.usage.model_dump()["sparse_details"]["tokens_read"] == 300
    assert follow_up.choices[0].finish_reason == "length"


async def test_streams(open_edge: Any) -> None:
    async with open_edge(api_key="secret") as edge, _client(edge) as client:
        chat = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in chat]
        completion = await client.completions.create(model="tiny", prompt="x", stream=True)
        text = "".join([chunk.choices[0].text async for chunk in completion])
    assert text == "Hello, world"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


async def test_failures_have_the_types_of_the_client(open_edge: Any, engine: Any) -> None:
    async with open_edge(api_key="secret") as edge, _client(edge) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model="tiny", prompt="x", temperature=9)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="other", prompt="x")
        async with _client(edge, api_key="wrong") as stranger:
            with pytest.raises(openai.AuthenticationError):
                await stranger.models.list()
        engine.failure = "the engine died"
        with pytest.raises(openai.InternalServerError, match="the engine died"):
            await client.completions.create(model="tiny", prompt="x")
        stream = await client.completions.create(model="tiny", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="the engine died"):
            [chunk async for chunk in stream]


async def test_models(open_edge: Any) -> None:
    async with open_edge(api_key="secret") as edge, _client(edge) as client:
        models = [model async for model in client.models.list()]
        model = await client.models.retrieve("alias")
    assert [item.id for item in models] == ["tiny", "alias"]
    assert model.model_dump()["max_model_len"] == 1000
