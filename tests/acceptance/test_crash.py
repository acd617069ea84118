"""Engines that die or hang in mid-stream: the text is the same, or the error is typed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest

pytestmark = pytest.mark.slow

StartDaemon = Callable[..., Any]
PROMPT = [(7 * index * index + 3) % 500 for index in range(700)]
NUM_TOKENS = 400
FLAGS = (
    *("--kv-hbm-gib", "0.05", "--kv-dram-gib", "0.1", "--token-budget", "256", "--page-size", "16"),
    *("--dtype", "float32"),
)


def engine_pid(daemon: Any) -> int:
    for child in psutil.Process(daemon.process.pid).children():
        if "sparsed.engine.worker" in child.cmdline():
            return int(child.pid)
    raise AssertionError("no engine")


@pytest.fixture(scope="module")
def running(daemon: StartDaemon) -> Any:
    return daemon(*FLAGS)


@pytest.fixture
def client(running: Any) -> Iterator[openai.OpenAI]:
    with running.client() as client:
        yield client


def read_tokens(
    client: openai.OpenAI, *, at: int | None = None, then: Callable[[], None] | None = None
) -> tuple[str, Any]:
    """The text and the usage of a long greedy completion; calls ``then`` after piece ``at``."""
    pieces, usage = [], None
    for part in client.completions.create(
        model="dummy:tiny",
        prompt=PROMPT,
        max_tokens=NUM_TOKENS,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    ):
        usage = part.usage or usage
        if part.choices:
            pieces.append(part.choices[0].text)
            if len(pieces) == at and then is not None:
                then()
    return "".join(pieces), usage


@pytest.fixture(scope="module")
def undisturbed(running: Any) -> str:
    with running.client() as client:
        text, usage = read_tokens(client)
    assert usage.completion_tokens == NUM_TOKENS
    assert usage.sparse_details["sparse_steps"] > 0  # the prompt is longer than the budget
    return text


def test_a_killed_engine_does_not_show_in_the_text(
    running: Any, client: openai.OpenAI, undisturbed: str
) -> None:
    pid = engine_pid(running)
    text, usage = read_tokens(client, at=60, then=lambda: os.kill(pid, signal.SIGKILL))
    assert engine_pid(running) != pid
    assert text == undisturbed
    assert usage.completion_tokens == NUM_TOKENS
    assert usage.sparse_details["sparse_steps"] == NUM_TOKENS - 1, "replayed steps count again"
    assert 0 < usage.sparse_details["coverage"] <= 1


def test_a_stopped_engine_is_found_by_its_silence(
    running: Any, client: openai.OpenAI, undisturbed: str
) -> None:
    pid = engine_pid(running)
    text, _ = read_tokens(client, at=60, then=lambda: os.kill(pid, signal.SIGSTOP))
    assert not psutil.pid_exists(pid)
    assert text == undisturbed


def test_a_request_that_kills_twice_ends_with_a_typed_error(
    running: Any, client: openai.OpenAI, undisturbed: str
) -> None:
    killed: list[int] = []
    seen = 0

    def kill() -> None:
        killed.append(engine_pid(running))
        os.kill(killed[-1], signal.SIGKILL)

    with pytest.raises(openai.APIError) as caught:
        for part in client.completions.create(
            model="dummy:tiny",
            prompt=PROMPT,
            max_tokens=NUM_TOKENS,
            temperature=0.0,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            seen += len(part.choices)
            if seen in (60, 120) and len(killed) < seen // 60:
                kill()
    assert len(set(killed)) == 2
    assert "died 2 times" in str(caught.value)
    deadline_s = 60.0
    with httpx.Client(timeout=deadline_s) as probe:
        while probe.get(f"{running.url}/ready").status_code != 200:
            pass
    assert read_tokens(client)[0] == undisturbed  # and the daemon serves on
