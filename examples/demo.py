"""The whole of sparsed in a few minutes, on whatever machine this is; started by `make demo`.

Standard library only: every step is a command of `sparsed` or a request to its HTTP interface.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STATE_DIR = ROOT / ".demo"
MODEL = "smollm2-135m"
TUNED = STATE_DIR / "tuned.toml"
MEMORY = ("--kv-hbm-gib", "0.25", "--kv-dram-gib", "1")  # small, so that pages have to move
DOCUMENT_TOKENS = 6000
TOKEN_BUDGET = 1024
NUM_TRIALS = 3
TRIAL_S = 8
MAX_TUNE_S = 240
PROGRESS_S = 3.0
ENVIRONMENT = os.environ | {"PYTHONSAFEPATH": "1"}


class DemoError(Exception):
    """A step did not do what it should."""


class Daemon:
    """`sparsed start --detach` on a free port, and what the demo asks of it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._url = f"http://127.0.0.1:{port}"
        self._log = STATE_DIR / "sparsed.log"
        self._log_offset = 0

    def start(self, *options: str) -> None:
        self._log_offset = self._log.stat().st_size if self._log.exists() else 0
        port = ("--port", str(self._port))
        sparsed("start", "--model", MODEL, *MEMORY, *port, "--detach", *options, *state_dir())

    def stop(self) -> None:
        sparsed("stop", *state_dir())

    def new_log_lines(self) -> list[str]:
        """What the daemon has logged since its last start."""
        with self._log.open() as log:
            log.seek(self._log_offset)
            return log.read().splitlines()

    def count_tokens(self, text: str) -> int:
        with self._post("/tokenize", {"prompt": text}) as response:
            return int(json.load(response)["count"])

    def chat(self, question: str, **options: object) -> dict[str, Any]:
        """Print the answer as it comes; returns the usage."""
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **options,
        }
        usage: dict[str, Any] = {}
        with (
            self._prefill_shown() as stop_showing,
            self._post("/v1/chat/completions", body) as response,
        ):
            for event in events(response):
                if "error" in event:
                    raise DemoError(f"the server answered {event['error']}")
                for choice in event["choices"]:
                    if text := choice["delta"].get("content"):
                        stop_showing()
                        print(text, end="", flush=True)
                usage = event.get("usage") or usage
        print()
        if not usage:
            raise DemoError("the stream ended without a usage record")
        return usage

    @contextmanager
    def _prefill_shown(self) -> Iterator[Callable[[], None]]:
        """Tell every few seconds how far the prompt is, until the block or the yielded call ends
        it."""
        done = threading.Event()

        def watch() -> None:
            shown = before = self._prompt_tokens()
            while not done.wait(PROGRESS_S):
                if (now := self._prompt_tokens()) > shown:
                    print(f"  ... {now - before} prompt tokens read", flush=True)
                    shown = now

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield done.set
        finally:
            done.set()
            thread.join()

    def _prompt_tokens(self) -> int:
        with urllib.request.urlopen(f"{self._url}/metrics", timeout=30) as response:
            found = re.search(
                r"^sparsed_prompt_tokens_total (\S+)", response.read().decode(), re.MULTILINE
            )
        return int(float(found[1])) if found else 0

    def _post(self, path: str, body: dict[str, Any]) -> HTTPResponse:
        request = urllib.request.Request(
            f"{self._url}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        response: HTTPResponse = urllib.request.urlopen(request, timeout=300)
        return response


def events(response: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Server-sent events, decoded, up to the closing one."""
    for line in response:
        payload = line.decode().removeprefix("data:").strip()
        if payload and payload != "[DONE]":
            yield json.loads(payload)


def sparsed(*arguments: str) -> None:
    """Run a command of sparsed where the reader sees it."""
    print(f"$ sparsed {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "sparsed", *arguments]
    code = subprocess.run(command, env=ENVIRONMENT, check=False).returncode
    if code:
        raise DemoError(f"`sparsed {arguments[0]}` ended with status {code}")


def state_dir() -> tuple[str, str]:
    return "--state-dir", str(STATE_DIR)


# --------------------------------------------------------------------------------------------
# The steps
# --------------------------------------------------------------------------------------------


def fetch_model(daemon: Daemon) -> None:
    sparsed("model", "fetch", MODEL)


def start_daemon(daemon: Daemon) -> None:
    daemon.start()


def stream_an_answer(daemon: Daemon) -> None:
    print("> Name three things a map can show.")
    usage = daemon.chat("Name three things a map can show.", max_tokens=80)
    print(f"[{usage['completion_tokens']} tokens]")


def ask_about_a_long_document(daemon: Daemon) -> None:
    document = cut_to_tokens(daemon, "\n\n".join(topics[name] for name in sorted(topics)))
    question = "Which programming language does the text above describe? Answer in one sentence."
    print(f"> (Python's own reference, about {DOCUMENT_TOKENS} tokens) {question}")
    usage = daemon.chat(
        f"{document}\n\n{question}",
        max_tokens=60,
        sparse={"mode": "auto", "token_budget": TOKEN_BUDGET},
    )
    details = usage.get("sparse_details")
    if not details or not details["sparse_steps"]:
        raise DemoError(f"no step was sparse: {usage}")
    print(f"prompt tokens     {usage['prompt_tokens']}")
    for name, value in details.items():
        print(f"{name:<17} {in_words(value)}")
    share = details["tokens_read"] / details["tokens_dense"]
    print(f"K/V read          {share:.0%} of what dense attention reads")


def in_words(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def cut_to_tokens(daemon: Daemon, text: str) -> str:
    """The first DOCUMENT_TOKENS tokens of ``text``, or a little less."""
    text = text[: 6 * DOCUMENT_TOKENS]
    return text[: len(text) * DOCUMENT_TOKENS // max(daemon.count_tokens(text), DOCUMENT_TOKENS)]


def show_status(daemon: Daemon) -> None:
    sparsed("status", *state_dir())
    print("rates and quantiles are those of the last second; '-': nothing of the kind ended in it")


def tune(daemon: Daemon) -> None:
    print(
        "tuning owns the machine, so the daemon stops first; a study this short proves nothing: a"
    )
    print(f"profile is verified only by a test of 32 pairs, which {MAX_TUNE_S} s may not hold")
    print(
        f"a line per trial: the default, {NUM_TRIALS} of each arm (bayes and random, which is its"
    )
    print("control), then the default and the best of all again, ranked, then in pairs")
    daemon.stop()
    sparsed(
        *("tune", "--model", MODEL, *MEMORY, "--workload", "chat"),
        *("--trials", str(NUM_TRIALS), "--trial-seconds", str(TRIAL_S), "--seed", "1"),
        *("--max-seconds", str(MAX_TUNE_S)),
        *("--export", str(TUNED), *state_dir()),
    )


def show_the_export(daemon: Daemon) -> None:
    sparsed("profile", "list", *state_dir())
    print(f"$ cat {TUNED.relative_to(ROOT)}\n{TUNED.read_text().strip()}")
    print(f"\n{what_was_exported(TUNED.read_text())}")


def what_was_exported(text: str) -> str:
    """What the file holds, in words; a start with it proves no more than that."""
    if tomllib.loads(text)["tuned_for"]["status"] == "verified":
        return "the file holds a verified profile, which a start without the file takes as well"
    return (
        "nothing was verified, so no profile is kept: the file holds the default, as a draft, to\n"
        "look at and to edit; a longer `sparsed tune` may find something better"
    )


def restart(daemon: Daemon) -> None:
    daemon.start("--config", str(TUNED))
    lines = [line for line in daemon.new_log_lines() if "profile" in line]
    if not lines:
        raise DemoError("the log does not say which profile was picked")
    print("from its log:", *lines, sep="\n  ")


def stop_daemon(daemon: Daemon) -> None:
    daemon.stop()


STEPS: tuple[tuple[str, Callable[[Daemon], None]], ...] = (
    ("fetch a small real model", fetch_model),
    ("start the daemon in the background", start_daemon),
    ("stream a chat answer", stream_an_answer),
    ("ask about a long document with sparse attention", ask_about_a_long_document),
    ("look at the daemon's status", show_status),
    ("tune offline, briefly", tune),
    ("see what was exported", show_the_export),
    ("restart with the exported file", restart),
    ("stop", stop_daemon),
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def run_steps(daemon: Daemon) -> None:
    for number, (title, step) in enumerate(STEPS, start=1):
        print(f"\n=== {number}/{len(STEPS)} {title}", flush=True)
        started_s = time.monotonic()
        try:
            step(daemon)
        except Exception as error:
            raise SystemExit(f"demo: step {number} ({title}) failed: {error}") from error
        print(f"--- {time.monotonic() - started_s:.1f} s", flush=True)


def main() -> None:
    shutil.rmtree(STATE_DIR, ignore_errors=True)
    STATE_DIR.mkdir()
    started_s = time.monotonic()
    try:
        run_steps(Daemon(free_port()))
    finally:  # a step may have failed with the daemon running
        subprocess.run(
            [sys.executable, "-m", "sparsed", "stop", *state_dir()],
            env=ENVIRONMENT,
            capture_output=True,
            check=False,
        )
    print(f"\nAll steps done in {time.monotonic() - started_s:.0f} s. State is in .demo/.")


if __name__ == "__main__":
    main()
