"""``sparsed bench serve`` from its arguments to its files."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsed.controller.bench.serve import ABOUT_TOKEN_IDS
from sparsed.controller.cli.bench_serve import _command
from sparsed.controller.cli.main import run
from sparsed.core import ExitCode

PNG = b"\x89PNG\r\n\x1a\n"
Bench = Callable[..., int]


@pytest.fixture
def bench(server: Any) -> Bench:
    """The verb on the fake server; returns the exit status."""

    def run_verb(*arguments: str) -> int:
        return run(["bench", "serve", "--url", server.url, *arguments])

    return run_verb


def test_files_and_tables(
    bench: Bench,
    server: Any,
    make_script: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = tmp_path / "new" / "result"
    server.default = make_script(gap_s=0.02)
    arguments = "--num-prompts 5 --input-len 4:9 --output-len 3 --slo-ttft-ms 5000 --seed 3"
    assert bench(*arguments.split(), "--output-dir", str(directory)) == 0
    text = capsys.readouterr().out
    for part in ("5 of 5", "TTFT", "TPOT", "ITL", "E2E", "client lag", "goodput", "(100.0%)"):
        assert part in text
    result = json.loads((directory / "result.json").read_text())
    assert result["summary"]["output_tokens"] == 15
    assert (result["model"], result["endpoint"]) == ("fake", "/v1/completions")
    assert result["workload"]["input_lengths"] == {"low": 4, "high": 9}
    assert (result["workload"]["seed"], result["slo"]["ttft_s"]) == (3, 5.0)
    assert result["versions"]["sparsed"] and result["time_series"] and not result["interrupted"]
    with (directory / "requests.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["number"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert {row["output_tokens"] for row in rows} == {"3"}
    assert all(float(row["ttft_ms"]) > 0 and row["meets_slo"] == "1" for row in rows)
    for name in ("latency.png", "time-series.png"):
        assert (directory / name).read_bytes().startswith(PNG)


def test_bodies_of_completions(bench: Bench, server: Any) -> None:
    options = "--num-prompts 3 --input-len 5 --output-len 2 --shared-prefix-len 4 --warmup 2"
    sparse = "--sparse-mode auto --token-budget 512 --max-concurrency 1"
    assert bench(*options.split(), *sparse.split()) == 0
    assert set(server.paths) == {"/v1/completions"}
    assert len(server.bodies) == 5
    measured = server.bodies[2:]
    for body in measured:
        prompt = body.pop("prompt")
        assert len(prompt) == 9
        assert prompt[:4] == measured[0].get("first", prompt)[:4]
        measured[0].setdefault("first", prompt)
        assert all(1000 <= token < 9000 for token in prompt)
    first = measured[0].pop("first")
    assert first[:4] not in [body["prompt"][:4] for body in server.bodies[:2]]
    assert (
        measured
        == [
            {
                "model": "fake",
                "temperature": 0.0,
                "stream": True,
                "stream_options": {"include_usage": True},
                "ignore_eos": True,
                "sparse": {"mode": "auto", "token_budget": 512},
                "max_tokens": 2,
            }
        ]
        * 3
    )


def test_bodies_of_chats(bench: Bench, server: Any) -> None:
    options = "--endpoint chat --num-prompts 1 --input-len 5 --output-len 2 --no-ignore-eos"
    assert bench(*options.split()) == 0
    assert set(server.paths) == {"/v1/chat/completions"}
    body = server.bodies[-1]
    ((message,), max_tokens) = body["messages"], body["max_tokens"]
    assert (message["role"], len(message["content"].split()), max_tokens) == ("user", 5, 2)
    assert "ignore_eos" not in body and "sparse" not in body


def test_failures_are_counted(
    bench: Bench, server: Any, make_script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.scripts = [make_script(), make_script(status=503), make_script(ending="cut")]
    assert bench("--num-prompts", "4", "--output-len", "2", "-o", "json") == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)["summary"]
    assert summary["errors"] == {"http_503": 1, "disconnected": 1}
    assert summary["num_complete"] == 2
    assert (summary["num_cut_off"], summary["ttft"]["count"], summary["tpot"]["count"]) == (1, 3, 2)
    assert "cut off in the middle of the answer: 1" in captured.err
    assert "failed with http_503: 1; the first: status 503, as told" in captured.err


def test_all_failed(bench: Bench, server: Any, make_script: Any) -> None:
    server.default = make_script(status=500)
    assert bench("--num-prompts", "2", "--warmup", "0") == ExitCode.UNAVAILABLE


def test_short_outputs_and_clipped_prompts_are_told(
    bench: Bench, server: Any, make_script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.default = make_script(num_tokens=2)
    arguments = "--num-prompts 3 --input-len 20 --max-input-len 10 --output-len 4 -o json"
    assert bench(*arguments.split()) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["summary"]["num_short"] == 3
    assert "shorter outputs than asked for: 3" in captured.err
    assert "clipped to the maximal lengths: 3" in captured.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("--model other", ExitCode.USAGE, "has no model 'other'; it has: fake, fake-2"),
        ("--api-key wrong", ExitCode.USAGE, "--api-key"),
        ("--input-len 90 --output-len 20", ExitCode.USAGE, "--max-input-len 80"),
        ("--input-len 9 --output-len 200", ExitCode.USAGE, "--max-output-len"),
        ("--input-len abc", ExitCode.USAGE, "--input-len 'abc': 'abc' is not a whole number"),
        ("--input-len lognormal:9:x", ExitCode.USAGE, "'x' is not a number"),
        ("--sparse-mode off --token-budget 9", ExitCode.USAGE, "--token-budget"),
        ("--trace /nowhere.jsonl", ExitCode.USAGE, "--trace /nowhere.jsonl"),
        ("--output-dir /dev/null/x", ExitCode.USAGE, "--output-dir /dev/null/x"),
        ("--num-prompts 0", ExitCode.USAGE, "--num-prompts"),
        ("--url http://no-such-host.invalid", ExitCode.UNAVAILABLE, "no server answers at"),
        ("--url http://127.0.0.1:1", ExitCode.UNAVAILABLE, "start one with: sparsed start"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(
    bench: Bench,
    server: Any,
    arguments: str,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.models = [{"id": "fake", "max_model_len": 100}, {"id": "fake-2"}]
    server.api_key = "wrong-not" if "wrong" in arguments else None
    assert bench(*arguments.split()) == code
    assert message in capsys.readouterr().err
    assert server.bodies == []


def test_the_key_is_sent_and_not_told(
    bench: Bench, server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.api_key = "secret"
    monkeypatch.setenv("SPARSED_API_KEY", "secret")
    assert bench("--num-prompts", "1", "-o", "json") == 0
    captured = capsys.readouterr()
    assert "secret" not in captured.out
    assert "1 requests" not in captured.err, "progress where nobody looks on"
    for typed in (["bench", "--api-key", "secret", "-o", "json"], ["bench", "--api-key=secret"]):
        assert "secret" not in _command(typed)
        assert "***" in _command(typed)
    for typed in (["--url", "http://me:secret@h"], ["--url=http://me:secret@h", "-o", "json"]):
        assert "secret" not in _command(typed)
        assert "***@h" in _command(typed)


@pytest.mark.parametrize("models", [[], [{"name": "odd"}]])
def test_a_server_without_models(
    bench: Bench, server: Any, models: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    server.models = models
    assert bench() == ExitCode.UNAVAILABLE
    assert "lists no model" in capsys.readouterr().err


def test_names_are_looked_up_once(
    bench: Bench, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    real = socket.getaddrinfo

    def look_up(host: Any, *arguments: Any, **more: Any) -> Any:
        asked.append(host)
        return real(host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    url = server.url.replace("127.0.0.1", "localhost")
    assert bench("--url", url, "--num-prompts", "5") == 0
    assert asked.count("localhost") == 1


def test_a_refused_warm_up_is_explained(
    bench: Bench, server: Any, make_script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.default = make_script(status=400)
    assert bench("--num-prompts", "2") == ExitCode.UNAVAILABLE
    assert "no request of the warm-up: http_400, status 400" in capsys.readouterr().err
    assert len(server.bodies) == 1


def test_a_vocabulary_that_is_too_small_is_found_out_by_the_warm_up(
    bench: Bench, server: Any, make_script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """By one id of many: which ids the prompts themselves hold is left to chance."""

    def reply(body: dict[str, Any]) -> Any:
        return make_script(status=400 if max(body["prompt"]) >= 8999 else 200)

    server.script_of = reply
    small = "--num-prompts", "2", "--input-len", "3", "--warmup", "3"
    assert bench(*small) == ExitCode.UNAVAILABLE
    assert "no request of the warm-up" in capsys.readouterr().err
    assert len(server.bodies) == 3, "nothing but the warm-up"
    assert bench(*small, "--vocab-size", "8999") == 0


@pytest.mark.parametrize(
    ("words", "is_hinted"),
    [
        ("prompt: token id 8999 is outside of the vocabulary, 0 to 511", True),
        ("Token id 8999 is out of vocabulary", True),
        ("sparse.token_budget: unknown field 'sparse'", False),
        ("max_tokens is too large", False),
    ],
)
def test_the_vocabulary_is_blamed_only_where_it_is_meant(words: str, is_hinted: bool) -> None:
    assert bool(ABOUT_TOKEN_IDS.search(words)) == is_hinted


def test_ctrl_c_keeps_what_was_measured(server: Any, make_script: Any, tmp_path: Path) -> None:
    server.scripts = [make_script(), make_script(), make_script(gap_s=30.0)]
    command = [sys.executable, "-m", "sparsed", "bench", "serve", "--url", server.url]
    command += ["--num-prompts", "2", "--output-len", "2", "--output-dir", str(tmp_path)]
    command += ["--max-concurrency", "1", "-o", "json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        deadline_s = time.monotonic() + 60
        while len(server.sent_s) < 3 or not server.sent_s[2]:
            assert time.monotonic() < deadline_s and process.poll() is None
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    printed = json.loads(out)
    assert printed == json.loads((tmp_path / "result.json").read_text())
    assert printed["interrupted"]
    summary = printed["summary"]
    assert (summary["num_complete"], summary["num_interrupted"]) == (1, 1)
    assert (summary["num_cut_off"], summary["ttft"]["count"], summary["e2e"]["count"]) == (1, 2, 1)
    assert "Traceback" not in err and "interrupted; not answered completely: 1" in err
    assert len((tmp_path / "requests.csv").read_text().splitlines()) == 3


def test_ctrl_c_before_anything_was_measured(server: Any, make_script: Any) -> None:
    server.default = make_script(first_s=30.0)
    command = [sys.executable, "-m", "sparsed", "bench", "serve", "--url", server.url]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline_s = time.monotonic() + 60
        while not server.bodies:
            assert time.monotonic() < deadline_s and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "sparsed: interrupted before anything was measured"
