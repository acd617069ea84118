"""A server that answers as it is told, on a real socket, and notes when it sent what."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass(frozen=True, kw_only=True)
class Script:
    """One answer. ``ending`` is what comes after the tokens: done, cut, error, garbage, hang,
    no-end; or instead of an answer: not-http, close."""

    status: int = 200
    first_s: float = 0.0
    gap_s: float = 0.0
    num_tokens: int | None = None  # None: as asked for
    tokens_per_chunk: int = 1
    ending: str = "done"
    has_usage: bool = True
    is_chunked: bool = True


@dataclass
class FakeServer:
    """``scripts`` are used up request by request, then the default is."""

    url: str = ""
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "fake"}])
    api_key: str | None = None
    default: Script = field(default_factory=Script)
    scripts: list[Script] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    sent_s: list[list[float]] = field(default_factory=list)  # of chunks, by the monotonic clock
    script_of: Callable[[dict[str, Any]], Script] | None = None  # for any body
    num_open: int = 0
    max_open: int = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.split("\r\n")
            method, path, _ = lines[0].split(" ")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            expected = f"bearer {self.api_key}".lower()
            if self.api_key and headers.get("authorization") != expected:
                await self.reply(writer, 401, {"error": {"message": "no such key"}})
            elif method == "GET" and path.endswith("/v1/models"):
                await self.reply(writer, 200, {"object": "list", "data": self.models})
            elif method == "GET":
                await self.reply(writer, 404, {"detail": "Not Found"})
            else:
                await self.generate(writer, path, json.loads(body))
        except OSError:
            pass
        finally:
            writer.close()

    async def reply(self, writer: asyncio.StreamWriter, status: int, content: object) -> None:
        text = json.dumps(content).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(text)}\r\n\r\n"
        writer.write(head.encode() + text)
        await writer.drain()

    async def generate(self, writer: asyncio.StreamWriter, path: str, body: dict[str, Any]) -> None:
        self.bodies.append(body)
        self.paths.append(path)
        script = self.scripts.pop(0) if self.scripts else self.default
        script = self.script_of(body) if self.script_of else script
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        try:
            if script.ending == "not-http":
                writer.write(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")
            elif script.ending == "close":
                return
            elif script.status != 200:
                error = {"error": {"message": f"status {script.status}, as told"}}
                await self.reply(writer, script.status, error)
            else:
                await _Answer(writer, body, script, chat="chat" in path).run(self.sent_s)
        finally:
            self.num_open -= 1


class _Answer:
    def __init__(
        self, writer: asyncio.StreamWriter, body: dict[str, Any], script: Script, *, chat: bool
    ) -> None:
        self.writer, self.body, self.script, self.chat = writer, body, script, chat

    async def run(self, sent_s: list[list[float]]) -> None:
        coding = b"transfer-encoding: chunked\r\n" if self.script.is_chunked else b""
        self.writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" + coding)
        self.writer.write(b"\r\n")
        if self.chat:
            await self.choice({"role": "assistant", "content": ""})
        script, times = self.script, []
        sent_s.append(times)
        due_s = time.perf_counter() + script.first_s
        wanted = self.body["max_tokens"] if script.num_tokens is None else script.num_tokens
        for start in range(0, wanted, script.tokens_per_chunk):
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            is_last = start + script.tokens_per_chunk >= wanted
            times.append(time.perf_counter())
            await self.choice({"content": "word "}, is_last=is_last and script.ending == "done")
            due_s += script.gap_s
        await self.end(wanted)

    async def choice(self, delta: dict[str, str], *, is_last: bool = False) -> None:
        content: dict[str, Any] = {"delta": delta} if self.chat else {"text": delta["content"]}
        content |= {"index": 0, "finish_reason": "length" if is_last else None}
        await self.event(json.dumps({"choices": [content], "usage": None}))

    async def event(self, text: str) -> None:
        content = f"data: {text}\n\n".encode()
        await self.write(content)

    async def write(self, content: bytes) -> None:
        framed = b"%x\r\n%s\r\n" % (len(content), content) if self.script.is_chunked else content
        self.writer.write(framed)
        await self.writer.drain()

    async def end(self, num_tokens: int) -> None:
        ending = self.script.ending
        if ending == "cut":
            self.writer.transport.abort()
            return
        if ending == "error":
            await self.event(json.dumps({"error": {"message": "out of frames", "code": 500}}))
        if ending == "garbage":
            await self.event("{not json")
        if ending == "hang":
            await asyncio.sleep(60)
        if ending == "done" and self.script.has_usage:
            usage = {
                "prompt_tokens": len(self.body.get("prompt", [])),
                "completion_tokens": num_tokens,
                "prompt_tokens_details": {"cached_tokens": 1},
            }
            await self.event(json.dumps({"choices": [], "usage": usage}))
        if ending in ("done", "error"):
            await self.event("[DONE]")
        if self.script.is_chunked:
            self.writer.write(b"0\r\n\r\n")
            await self.writer.drain()


@pytest.fixture
def make_script() -> type[Script]:
    return Script


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """Runs in a thread of its own, so that the client's loop is the client's alone."""
    fake, loop, is_up = FakeServer(), asyncio.new_event_loop(), threading.Event()

    async def listen() -> asyncio.Server:
        return await asyncio.start_server(fake.handle, "127.0.0.1", 0, backlog=1024)

    def run() -> None:
        asyncio.set_event_loop(loop)
        listener = loop.run_until_complete(listen())
        fake.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        is_up.set()
        loop.run_forever()
        listener.close()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert is_up.wait(10)
    yield fake
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
