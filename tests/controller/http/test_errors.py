import asyncio
from typing import Any

import pytest

from sparsed.controller.control import DaemonState
from sparsed.controller.http.protocol import CompletionBody
from sparsed.core import RefusalReason

pytestmark = pytest.mark.anyio
PATH = "/v1/completions"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True, 1]}, "prompt"),
        ({"prompt": [512]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "x" * 1000}, "prompt"),
        ({"prompt": "x" * 900, "max_tokens": 101}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"512": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": [512]}, "stop_token_ids"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"usage": True}}, "stream_options.usage"),
        ({"sparse": {"mode": "on"}}, "sparse.mode"),
        ({"sparse": {"token_budget": 1}}, "sparse.token_budget"),
        ({"sparse": {"mode": "off", "token_budget": 512}}, "sparse.token_budget"),
        ({"sparse": {"budget": 512}}, "sparse.budget"),
        ({"suffix": "end"}, "suffix"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"store": True}, "store"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"guided_json": {}}, "guided_json"),
        ({"model": 5}, "model"),
    ],
)
async def test_a_wrong_field_is_named(body: Any, param: str, open_edge: Any, engine: Any) -> None:
    async with open_edge() as edge:
        error = await edge.refused(PATH, 400, **({"prompt": "x"} | body))
    assert error["param"] == param
    assert param.split(".")[-1].split("[")[0] in error["message"]
    assert error["type"] == "BadRequestError"
    assert engine.received == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"),
        (b"", "JSON object"),
        (b"[]", "JSON object"),
        (b"3", "JSON object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"prompt": []}', "empty"),
        (b'{"prompt": "x", "stop": "\\ud800"}', "stop: a stop string is not valid Unicode"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, ""),
    ],
)
async def test_bodies_that_are_no_request(content: bytes, words: str, open_edge: Any) -> None:
    async with open_edge() as edge:
        headers = {"Content-Type": "application/json"}
        response = await edge.client.post(PATH, content=content, headers=headers)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


async def test_a_body_of_another_type_is_refused(open_edge: Any) -> None:
    async with open_edge() as edge:
        response = await edge.client.post(PATH, data={"prompt": "x"})
    assert response.status_code == 400
    assert "application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        (PATH, {"prompt": "x", "stop": 5}, "stop: must be a string or a list of strings"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": 5}]},
            'messages[0].content: must be a string or a list of {"type": "text", "text": "..."}',
        ),
    ],
)
async def test_every_form_of_a_field_is_named(
    path: str, body: Any, says: str, open_edge: Any
) -> None:
    async with open_edge() as edge:
        error = await edge.refused(path, 400, **body)
    assert error["message"] == says


@pytest.mark.parametrize(
    ("body", "num_refused"),
    [
        ({"prompt": "x" * 1000}, 1),
        ({"prompt": "x" * 900, "max_tokens": 101}, 1),
        ({"prompt": ["x", "x" * 1000]}, 1),
        ({"prompt": "x", "max_tokens": -1}, 0),
    ],
)
async def test_who_is_too_long_is_counted(body: Any, num_refused: int, open_edge: Any) -> None:
    async with open_edge() as edge:
        await edge.refused(PATH, 400, **body)
    assert edge.refused_for == [RefusalReason.TOO_LONG] * num_refused


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (PATH, {"prompt": "x" * 1_000_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 1_000_000}]}),
        ("/tokenize", {"prompt": "x" * 1_000_000}),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * 1_000_000}]}),
    ],
)
async def test_a_text_that_is_not_even_tokenized_is_counted(
    path: str, body: Any, open_edge: Any
) -> None:
    async with open_edge() as edge:
        error = await edge.refused(path, 400, **body)
    assert "characters" in error["message"]
    assert edge.refused_for == [RefusalReason.TOO_LONG]


async def test_long_prompt_names_the_limit(open_edge: Any) -> None:
    async with open_edge() as edge:
        error = await edge.refused(PATH, 400, prompt="x" * 1234)
    assert "1234 tokens" in error["message"]
    assert "1000" in error["message"]


async def test_a_hopelessly_long_text_is_not_even_tokenized(open_edge: Any) -> None:
    async with open_edge() as edge:
        error = await edge.refused(PATH, 400, prompt="x" * 1_000_000)
    assert "1000000 characters" in error["message"]
    assert error["param"] == "prompt"


async def test_unknown_model_and_path(open_edge: Any) -> None:
    async with open_edge() as edge:
        error = await edge.refused(PATH, 404, prompt="x", model="gpt-4")
        assert error["type"] == "NotFoundError"
        assert error["param"] == "model"
        assert "'gpt-4' is not served; served: tiny, alias" in error["message"]
        assert (await edge.refused("/v1/nothing", 404))["type"] == "NotFoundError"
        assert (await edge.refused("/v1/models", 405))["type"] == "MethodNotAllowedError"


async def test_draining_and_a_full_queue_say_when_to_come_back(open_edge: Any, engine: Any) -> None:
    async with open_edge(max_waiting=0) as edge:
        engine.blocked = True
        others = asyncio.create_task(edge.client.post(PATH, json={"prompt": ["x"] * 2}))
        while edge.ledger.num_unfinished < 2:
            await asyncio.sleep(0)
        full = await edge.client.post(PATH, json={"prompt": ["x"] * 3})
        engine.blocked = False
        assert (await others).status_code == 200
        await edge.ledger.drain(timeout_s=1.0)
        drained = await edge.client.post(PATH, json={"prompt": "x"})
    for response in (full, drained):
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "ServiceUnavailableError"
    assert len(engine.aborted) == 2  # the choices that had been taken


@pytest.mark.parametrize(
    ("body", "param", "asked"),
    [
        ({"prompt": ["x"] * 9}, "prompt", "9 prompts with n=1 would be 9 requests"),
        ({"prompt": ["x"] * 3, "n": 3}, "prompt", "3 prompts with n=3 would be 9 requests"),
        ({"prompt": "x", "n": 9}, "n", "n=9 would be 9 requests"),
    ],
)
async def test_more_choices_than_an_idle_daemon_takes(
    body: Any, param: str, asked: str, open_edge: Any, engine: Any
) -> None:
    async with open_edge(max_waiting=4) as edge:
        error = await edge.refused(PATH, 400, **body)
        assert error["param"] == param
        assert error["message"].startswith(f"{param}: {asked} at once; at most 8 can run or wait")
        assert engine.received == []
        answer = await edge.post(PATH, prompt=["x"] * 4, n=2)
    assert len(answer["choices"]) == 8


@pytest.mark.parametrize("n", [1, 3])
async def test_failure_of_the_engine(n: int, open_edge: Any, engine: Any) -> None:
    engine.failure = "the engine died 2 times while running this request"
    async with open_edge() as edge:
        error = await edge.refused(PATH, 500, prompt="x", n=n)
        *chunks, last = await edge.events(PATH, prompt="x", n=n)
    assert error["type"] == "InternalServerError"
    assert error["message"] == engine.failure
    assert last["error"] == error
    texts = [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"][0]["index"] == 0]
    assert "".join(texts) == "He"


async def test_unforeseen_failure_is_logged_and_not_told(
    open_edge: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> DaemonState:
        raise RuntimeError("secret")

    async with open_edge(state=broken) as edge:
        response = await edge.client.get("/ready")
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "InternalServerError"
    assert "secret" not in response.text
    assert "secret" in caplog.text


async def test_no_field_is_ignored_without_a_reason() -> None:
    """Each field is read by the code, or stands among those the protocol lists as harmless."""
    fields = set(CompletionBody.model_fields)
    harmless = {
        "user",
        "safety_identifier",
        "metadata",
        "store",
        "service_tier",
        "prompt_cache_key",
    }
    refused = {"response_format", "min_tokens", "suffix", "best_of"}
    obeyed = {
        "model", "n", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p",
        "seed", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
        "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
        "skip_special_tokens", "sparse", "prompt", "max_tokens", "echo", "logprobs",
        "add_special_tokens",
    }  # fmt: skip
    assert fields == harmless | refused | obeyed
