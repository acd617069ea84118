"""Many clients, rude clients, and processes that die at the wrong moment: nothing is lost."""

from __future__ import annotations

import asyncio
import collections
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import psutil
import pytest

from sparsed.controller.client import AdminClient
from sparsed.core import EngineStats

pytestmark = pytest.mark.slow

StartDaemon = Callable[..., Any]
FLAGS = ("--kv-hbm-gib", "0.05", "--kv-dram-gib", "0.1", "--token-budget", "256", "--page-size")
PATH = "/v1/completions"
PATIENCE_S = 300.0


@pytest.fixture(scope="module")
def served(daemon: StartDaemon) -> Any:
    return daemon(*FLAGS, "16")


def wait_for(condition: Callable[[], bool], *, what: str) -> None:
    """Patience is counted in looks, not in seconds: the whole machine may stand still."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail(what)


def engines(daemon: Any) -> list[psutil.Process]:
    children = psutil.Process(daemon.process.pid).children()
    return [child for child in children if "sparsed.engine.worker" in child.cmdline()]


def wait_for_engine(daemon: Any) -> psutil.Process:
    """The engine, once it has been sent what the last one left."""
    wait_for(lambda: bool(engines(daemon)), what="no engine was started")
    (engine,) = engines(daemon)
    wait_for(daemon.is_ready, what="the engine did not load")
    return engine


def kill_engine(daemon: Any) -> None:
    """SIGKILL, as soon as there is one that is loaded; returns when the daemon has noticed."""
    engine = wait_for_engine(daemon)
    engine.kill()
    wait_for(lambda: not engine.is_running(), what="the engine's death was not noticed")


def stats_of(daemon: Any) -> EngineStats | None:
    with AdminClient(daemon.state_dir / "run" / "sparsed.sock") as admin:
        return admin.status().stats


def is_empty(daemon: Any) -> bool:
    """Whether the engine says that it holds nothing of any request."""
    now = stats_of(daemon)
    held = now and (now.num_running, now.num_waiting, now.hot_used_bytes, now.dram_used_bytes)
    return held == (0, 0, 0, 0)


class Reader(threading.Thread):
    """Reads one greedy stream to its end, or until the connection breaks; parses it later, so
    that it keeps up with the engine."""

    def __init__(self, daemon: Any, prompt: list[int], *, num_tokens: int) -> None:
        super().__init__(daemon=True)
        self._url = f"{daemon.url}{PATH}"
        self._body = {"prompt": prompt, "max_tokens": num_tokens, "stream": True}
        self._body |= {"temperature": 0, "ignore_eos": True}
        self.pieces: list[str] = []
        self.broken = False
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=PATIENCE_S) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        self.pieces.append(line.removeprefix("data: "))
        except httpx.TransportError:
            self.broken = True

    def wait_for_piece(self, number: int) -> None:
        wait_for(
            lambda: len(self.pieces) >= number or not self.is_alive(),
            what=f"{len(self.pieces)} pieces of {number}",
        )

    def failure(self) -> str | None:
        """The error that ended the stream."""
        self.join(PATIENCE_S)
        error = json.loads(self.pieces[-1]).get("error")
        return error and str(error["message"])

    def text(self) -> str:
        assert self.failure() is None and not self.broken
        return "".join(json.loads(piece)["choices"][0]["text"] for piece in self.pieces)


# ---- load ----------------------------------------------------------------------------------


@asynccontextmanager
async def http(daemon: Any) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=daemon.url, limits=limits, timeout=PATIENCE_S) as client:
        yield client


def test_streams_that_are_left_at_random_leave_nothing_behind(served: Any) -> None:
    choose = random.Random(7)
    ends: collections.Counter[str] = collections.Counter()

    async def stream(client: httpx.AsyncClient, stop_s: float) -> None:
        while time.monotonic() < stop_s:
            body = {
                "prompt": [choose.randrange(500) for _ in range(choose.randrange(1, 900))],
                "max_tokens": choose.randrange(1, 60),
                "n": choose.choice((1, 1, 3)),
                "stop": choose.choice(([], ["a", "e"])),
                "stream": True,
                "ignore_eos": True,
            }
            leave_at = choose.randrange(1, 40)
            async with client.stream("POST", PATH, json=body) as answer:
                assert answer.status_code == 200
                num_lines = 0
                async for line in answer.aiter_lines():
                    num_lines += bool(line)
                    if num_lines == leave_at:
                        break
                ends["left" if num_lines == leave_at else "read"] += 1

    async def stream_all() -> None:
        async with http(served) as client:
            stop_s = time.monotonic() + 12.0
            await asyncio.gather(*(stream(client, stop_s) for _ in range(30)))

    asyncio.run(stream_all())
    assert ends["left"] > 10 and ends["read"] > 10
    wait_for(lambda: is_empty(served), what=f"still held: {stats_of(served)}")


def test_two_hundred_clients_that_do_not_try_again(served: Any) -> None:
    async def ask_all() -> collections.Counter[int]:
        body = {"prompt": "x", "max_tokens": 4, "n": 8, "ignore_eos": True}
        async with http(served) as client:
            answers = await asyncio.gather(*(client.post(PATH, json=body) for _ in range(200)))
        for answer in answers:
            if answer.status_code != 200:
                assert answer.json()["error"]["type"] == "ServiceUnavailableError"
                assert int(answer.headers["retry-after"]) > 0
        return collections.Counter(answer.status_code for answer in answers)

    statuses = asyncio.run(ask_all())
    assert statuses.keys() == {200, 503}  # 1600 choices: more than may wait
    wait_for(lambda: is_empty(served), what=f"still held: {stats_of(served)}")


def test_a_stop_string_tells_what_was_read(served: Any) -> None:
    body = {"prompt": [5] * 700, "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    text = httpx.post(f"{served.url}{PATH}", json=body, timeout=PATIENCE_S).json()["choices"][0][
        "text"
    ]
    stopped = httpx.post(
        # A long one: a short one may come in the first token, and stop before any sparse step.
        f"{served.url}{PATH}",
        json=body | {"stop": text[:120]},
        timeout=PATIENCE_S,
    )
    details = stopped.json()["usage"]["sparse_details"]
    assert 0 < details["sparse_steps"] <= details["decode_steps"] < 400
    assert 0 < details["tokens_read"] < details["tokens_dense"]


# ---- deaths --------------------------------------------------------------------------------


def test_an_engine_that_was_held_up_for_a_moment_goes_on(served: Any) -> None:
    (engine,) = engines(served)
    reader = Reader(served, [3] * 400, num_tokens=200)
    reader.wait_for_piece(20)
    engine.suspend()
    time.sleep(2.0)
    engine.resume()
    assert reader.text()
    assert engines(served) == [engine]


def test_an_engine_that_dies_idle_is_replaced(served: Any) -> None:
    kill_engine(served)
    wait_for_engine(served)
    assert Reader(served, [1, 2, 3], num_tokens=5).text()


def test_a_killed_daemon_leaves_no_engine_and_the_next_one_starts(daemon: StartDaemon) -> None:
    first = daemon(*FLAGS, "16")
    (engine,) = engines(first)
    reader = Reader(first, [1] * 300, num_tokens=2000)
    reader.wait_for_piece(5)
    first.process.kill()
    first.process.wait()
    reader.join(PATIENCE_S)
    assert reader.broken
    wait_for(lambda: not engine.is_running(), what="the engine outlived the daemon")
    stale = set((first.state_dir / "run").iterdir())
    assert stale  # what the next start has to clear away
    second = daemon(*FLAGS, "16", "--shutdown-timeout", "3600", state_dir=first.state_dir)
    assert Reader(second, [1, 2], num_tokens=5).text()
    assert len(list((first.state_dir / "run").glob("engine.*"))) == 1
    with httpx.Client() as idle:  # keeps its connection, for which no end waits
        assert idle.get(f"{second.url}/health").status_code == 200
        assert second.stop() == 0
    assert not list((first.state_dir / "run").iterdir())


def test_clients_are_told_when_the_engine_is_lost_for_good(daemon: StartDaemon) -> None:
    """An engine that dies too often ends the daemon, and no stream ends without a word."""
    lost = daemon(*FLAGS, "16")
    readers = [Reader(lost, [number] * 200, num_tokens=3000) for number in range(1, 9)]
    for reader in readers:
        reader.wait_for_piece(1)
    while lost.process.poll() is None:
        for engine in engines(lost):
            engine.kill()
        time.sleep(0.1)
    assert lost.process.returncode != 0
    assert all(reader.failure() for reader in readers)
    assert not any(reader.broken for reader in readers)
