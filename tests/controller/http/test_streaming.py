import asyncio
import json
import logging
from typing import Any
from unittest.mock import AsyncMock

import pytest

pytestmark = pytest.mark.anyio
PATH = "/v1/completions"


class Connection:
    """A client at the level of ASGI messages, which can go away and read slowly."""

    def __init__(self, app: Any, body: dict[str, object]) -> None:
        self.app = app
        self.sent: list[Any] = []
        self.left = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()
        self._body: bytes | None = json.dumps(body).encode()

    async def receive(self) -> dict[str, object]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.reading.wait()
        if not self.left.is_set():
            self.sent.append(message)
        elif self.sent:  # a server may drop messages to a client that left, or raise
            raise OSError("connection lost")

    async def run(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": PATH,
            "raw_path": PATH.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json")],
            "server": ("test", 80),
            "client": ("test", 1),
        }
        async with asyncio.timeout(5):
            await self.app(scope, self.receive, self.send)


async def _until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def _app_of(edge: Any) -> Any:
    return edge.client._transport.app


async def test_a_client_that_leaves_in_the_middle_of_its_body(
    open_edge: Any, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    messages = [
        {"type": "http.request", "body": b'{"prompt": ', "more_body": True},
        {"type": "http.disconnect"},
    ]
    async with open_edge() as edge:
        connection = Connection(_app_of(edge), {})
        connection.receive = AsyncMock(side_effect=messages)  # type: ignore[method-assign]
        with caplog.at_level(logging.INFO):
            await connection.run()
    assert connection.sent[0]["status"] == 400
    assert caplog.records == [] and engine.received == []


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_the_first_token(
    stream: bool, n: int, open_edge: Any, engine: Any
) -> None:
    engine.blocked = True
    async with open_edge() as edge:
        connection = Connection(_app_of(edge), {"prompt": "x", "stream": stream, "n": n})
        running = asyncio.create_task(connection.run())
        await _until(lambda: len(engine.received) == n)
        connection.left.set()
        await running
        assert edge.ledger.num_unfinished == 0
    assert len(engine.aborted) == n


async def test_a_client_that_leaves_in_mid_stream(open_edge: Any, engine: Any) -> None:
    engine.text = "x" * 900
    async with open_edge() as edge:
        connection = Connection(_app_of(edge), {"prompt": "x", "stream": True})
        running = asyncio.create_task(connection.run())
        await _until(lambda: len(connection.sent) > 3)
        connection.left.set()
        await running
        assert edge.ledger.num_unfinished == 0
    assert len(engine.aborted) == 1


async def test_a_slow_reader_holds_up_nobody(open_edge: Any, engine: Any) -> None:
    engine.text = "x" * 500
    async with open_edge() as edge:
        slow = Connection(_app_of(edge), {"prompt": "a", "stream": True})
        slow.reading.clear()
        running = asyncio.create_task(slow.run())
        await edge.post(PATH, prompt="b")
        await _until(lambda: edge.ledger.num_unfinished == 0)  # its engine work is over too
        assert slow.sent == []
        slow.reading.set()
        await running
    body = b"".join(message.get("body", b"") for message in slow.sent)
    assert body.count(b'"text":"x"') == 500
    assert body.endswith(b"data: [DONE]\n\n")
    assert engine.aborted == []


async def test_two_hundred_clients_at_once(open_edge: Any, engine: Any) -> None:
    engine.text = lambda request: bytes(request.prompt_tokens).decode() * 3
    async with open_edge() as edge:
        answers = await asyncio.gather(
            *(edge.events(PATH, prompt=f"<{client}>") for client in range(200))
        )
    for client, events in enumerate(answers):
        text = "".join(event["choices"][0]["text"] for event in events)
        assert text == f"<{client}>" * 3
