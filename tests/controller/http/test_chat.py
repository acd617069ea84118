from dataclasses import replace
from typing import Any

import pytest

from sparsed.controller.tokenizer import Tokenizer
from sparsed.core import SparseMode

pytestmark = pytest.mark.anyio
PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}


async def test_whole_answer(open_edge: Any, engine: Any) -> None:
    async with open_edge() as edge:
        answer = await edge.post(
            PATH, model="alias", messages=[USER], max_completion_tokens=5, sparse={"mode": "off"}
        )
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "alias"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 5
    assert bytes(engine.received[0].prompt_tokens) == b"user: Hi\nassistant: "
    assert engine.received[0].sparse.mode is SparseMode.OFF


async def test_stream(open_edge: Any) -> None:
    async with open_edge() as edge:
        events = await edge.events(
            PATH, messages=[USER], max_tokens=3, n=2, stream_options={"include_usage": True}
        )
    *chunks, last = events
    for index in (0, 1):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        deltas = [choice["delta"] for choice in choices]
        assert [delta.get("role") for delta in deltas] == ["assistant", None, None]
        assert "".join(delta["content"] for delta in deltas) == "Hel"
        assert [choice["finish_reason"] for choice in choices] == [None, None, "length"]
    assert {chunk["object"] for chunk in events} == {"chat.completion.chunk"}
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6


async def test_messages_reach_the_template(open_edge: Any, engine: Any) -> None:
    sent_back = {
        "role": "assistant",
        "content": "B",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    parts = [{"type": "text", "text": "C"}, {"type": "text", "text": "D"}]
    messages = [
        {"role": "developer", "content": "A"},
        sent_back,
        {"role": "user", "content": parts, "type": "text"},
    ]
    async with open_edge() as edge:
        await edge.post(PATH, messages=messages, add_generation_prompt=False)
    assert bytes(engine.received[0].prompt_tokens) == b"system: A\nassistant: B\nuser: C\nD\n"


async def test_logprobs(open_edge: Any, engine: Any) -> None:
    engine.text = "a"
    async with open_edge() as edge:
        plain = await edge.post(PATH, messages=[USER], logprobs=True)
        best = await edge.post(PATH, messages=[USER], logprobs=True, top_logprobs=2)
    own = {"token": "a", "logprob": -1.5, "bytes": [97]}
    assert plain["choices"][0]["logprobs"] == {"content": [own | {"top_logprobs": []}]}
    assert best["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == [
        {"token": "X", "logprob": -0.5, "bytes": [88]},
        {"token": "bytes:\\xe2", "logprob": -1.0, "bytes": [0xE2]},
    ]


async def test_a_model_without_a_template_says_so(open_edge: Any) -> None:
    tokenizer = replace(Tokenizer.of_bytes(vocab_size=512), chat_template=None)
    async with open_edge(tokenizer=tokenizer) as edge:
        error = await edge.refused(PATH, 400, messages=[USER])
    assert "no chat template" in error["message"]
    assert error["param"] == "messages"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({}, "messages"),
        ({"messages": [USER | {"role": "tool"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [USER | {"content": None}]}, "messages[0].content"),
        ({"messages": [USER | {"content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [USER | {"tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [USER | {"mood": "good"}]}, "messages[0].mood"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"max_completion_tokens": 1000}, "max_completion_tokens"),
        ({"messages": [USER | {"content": "x" * 1000}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"echo": True}, "echo"),
    ],
)
async def test_refused_fields_are_named(body: Any, param: str, open_edge: Any) -> None:
    async with open_edge() as edge:
        messages = {"messages": [USER]} if body and "messages" not in body else {}
        error = await edge.refused(PATH, 400, **messages, **body)
    assert error["param"] == param
    assert error["type"] == "BadRequestError"


async def test_harmless_fields_are_taken(open_edge: Any) -> None:
    harmless = {
        "user": "u",
        "safety_identifier": "s",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "parallel_tool_calls": True,
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "min_tokens": 0,
        "stream_options": None,
        "temperature": None,
        "stop": None,
    }
    async with open_edge() as edge:
        await edge.post(PATH, messages=[USER], **harmless)
