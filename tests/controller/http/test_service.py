from typing import Any

import pytest

from sparsed.controller.control import DaemonState

pytestmark = pytest.mark.anyio


async def test_models(open_edge: Any) -> None:
    async with open_edge() as edge:
        listing = (await edge.client.get("/v1/models")).json()
        one = (await edge.client.get("/v1/models/alias")).json()
        none = await edge.client.get("/v1/models/org/other")
    assert listing["object"] == "list"
    assert [model["id"] for model in listing["data"]] == ["tiny", "alias"]
    assert {model["max_model_len"] for model in listing["data"]} == {1000}
    assert one["id"] == "alias"
    assert none.status_code == 404
    assert none.json()["error"]["type"] == "NotFoundError"


async def test_tokenize_and_back(open_edge: Any) -> None:
    async with open_edge() as edge:
        answer = await edge.post("/tokenize", model="tiny", prompt="é!", return_token_strs=True)
        text = await edge.post("/detokenize", tokens=[*answer["tokens"], 256])
        messages = [{"role": "user", "content": "Hi"}]
        chat = await edge.post("/tokenize", messages=messages, add_generation_prompt=False)
    assert answer == {
        "count": 3,
        "max_model_len": 1000,
        "tokens": [0xC3, 0xA9, 33],
        "token_strs": ["bytes:\\xc3", "bytes:\\xa9", "!"],
    }
    assert text == {"prompt": "é!<256>"}
    assert bytes(chat["tokens"]) == b"user: Hi\n"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/detokenize", {"tokens": [512]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
async def test_refused_fields_are_named(path: str, body: Any, param: str, open_edge: Any) -> None:
    async with open_edge() as edge:
        error = await edge.refused(path, 400, **body)
    assert error["param"] == param


@pytest.mark.parametrize(
    ("state", "health", "ready"),
    [
        (DaemonState.LOADING, 200, 503),
        (DaemonState.SERVING, 200, 200),
        (DaemonState.DEGRADED, 200, 200),
        (DaemonState.RESTARTING, 200, 503),
        (DaemonState.DRAINING, 200, 503),
        (DaemonState.STOPPED, 503, 503),
    ],
)
async def test_health(state: DaemonState, health: int, ready: int, open_edge: Any) -> None:
    async with open_edge(state=lambda: state) as edge:
        for path, status in (("/health", health), ("/ready", ready)):
            response = await edge.client.get(path)
            assert response.status_code == status
            assert response.json() == {"status": state.value}
            assert ("retry-after" in response.headers) == (status == 503)


async def test_version_and_metrics(open_edge: Any) -> None:
    async with open_edge() as edge:
        assert (await edge.client.get("/version")).json() == {"version": "1.2.3"}
        metrics = await edge.client.get("/metrics")
    assert metrics.text == "sparsed_up 1\n"
    assert metrics.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize("key", [None, "Bearer wrong", "Bearer ", "kéy", "Basic kéy", "Bearer k"])
async def test_a_wrong_key_opens_nothing_but_probes(key: str | None, open_edge: Any) -> None:
    headers = {} if key is None else {"Authorization": key.encode()}
    async with open_edge(api_key="kéy") as edge:
        for path in ("/v1/completions", "/v1/models", "/tokenize", "/nothing"):
            response = await edge.client.post(path, content=b"{", headers=headers)
            assert response.status_code == 401, path
            assert response.json()["error"]["type"] == "AuthenticationError"
        for path in ("/health", "/ready", "/version", "/metrics"):
            assert (await edge.client.get(path)).status_code == 200


@pytest.mark.parametrize("key", ["secret", "kéy"])
async def test_the_right_key_opens(key: str, open_edge: Any) -> None:
    headers = {"Authorization": f"Bearer {key}".encode()}
    async with open_edge(api_key=key) as edge:
        assert (await edge.client.get("/v1/models", headers=headers)).status_code == 200
