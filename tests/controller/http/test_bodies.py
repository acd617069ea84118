"""Large bodies: bounded by what the model takes, and parsed away from the event loop."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sparsed.controller.http import bodies
from sparsed.controller.http.bodies import INLINE_BYTES, max_body_bytes

pytestmark = pytest.mark.anyio
PATH = "/v1/completions"
LIMIT = max_body_bytes(1000)


async def pieces(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), 1 << 20):
        yield content[start : start + (1 << 20)]


@pytest.mark.parametrize(("num_bytes", "status"), [(LIMIT, 400), (LIMIT + 1, 413)])
async def test_a_body_that_no_prompt_needs_is_not_read_to_its_end(
    num_bytes: int, status: int, open_edge: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []
    decode = bodies._decode
    monkeypatch.setattr(bodies, "_decode", lambda data: parsed.append(len(data)) or decode(data))
    text = '{"prompt": "' + "x" * (num_bytes - 14) + '"}'
    async with open_edge() as edge:
        response = await edge.client.post(
            PATH, content=pieces(text.encode()), headers={"Content-Type": "application/json"}
        )
    assert response.status_code == status
    error = response.json()["error"]
    assert "1000 tokens" in error["message"]
    if status == 413:
        assert error["type"] == "RequestTooLargeError"
        assert str(LIMIT) in error["message"]
    assert parsed == ([LIMIT] if status == 400 else [])
    assert engine.received == []


@pytest.mark.parametrize("large", [False, True])
async def test_a_large_body_does_not_hold_up_the_loop(
    large: bool, open_edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    parse = bodies._parse

    def watched(data: bytes, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return parse(data, **options)

    monkeypatch.setattr(bodies, "_parse", watched)
    prompt = [7] * (INLINE_BYTES if large else 3)
    async with open_edge() as edge:
        response = await edge.client.post(PATH, json={"prompt": prompt})
    assert response.status_code == (400 if large else 200), "longer than the model"
    assert [thread is threading.main_thread() for thread in threads] == [not large]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/vnd.x+json"])
async def test_json_by_other_names(kind: str, open_edge: Any) -> None:
    async with open_edge() as edge:
        headers = {"Content-Type": kind}
        response = await edge.client.post(PATH, content=b'{"prompt": "x"}', headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "x"', "character 14"),
        (b'{"prompt": "x",}', "character 15"),
        (b'{"prompt": "x", "seed": 12345678901234567890123}', "seed"),
        (b'{"prompt": "x", "temperature": Infinity}', "temperature"),
    ],
)
async def test_what_the_fast_parser_refuses_is_explained(
    content: bytes, words: str, open_edge: Any
) -> None:
    async with open_edge() as edge:
        headers = {"Content-Type": "application/json"}
        response = await edge.client.post(PATH, content=content, headers=headers)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
