"""The daemon as an operator meets it: ready line, signals, exit codes, refusals."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from sparsed.controller.client import AdminClient
from sparsed.controller.workload import parse_trace
from sparsed.core import Bound, InputError, WaitReason
from sparsed.engine.evaluate.recording import Recording, RecordingHeader, write_recording

pytestmark = pytest.mark.slow

StartDaemon = Callable[..., Any]
SMALL = ("--kv-hbm-gib", "0.05", "--kv-dram-gib", "0.1")
LONG = {"max_tokens": 2000, "extra_body": {"ignore_eos": True}}  # seconds, on the tiny model


def stream_in_background(daemon: Any, *, answers: list[str | None]) -> threading.Thread:
    """Read one long completion to its end; appends the last finish reason, or
    the error that the stream ended with."""
    started = threading.Event()

    def read() -> None:
        reason = None
        with daemon.client() as client:
            try:
                for part in client.completions.create(
                    model="dummy:tiny", prompt="hello", stream=True, **LONG
                ):
                    started.set()
                    reason = part.choices[0].finish_reason or reason
            except openai.APIError as error:
                reason = f"error: {error.message}"
        answers.append(reason)

    thread = threading.Thread(target=read)
    thread.start()
    assert started.wait(30.0)
    return thread


def refusal(daemon: Any) -> tuple[int, str]:
    """Exit code and last line of a daemon that cannot start."""
    code = daemon.process.wait(timeout=60)
    log = daemon.log.read_text()
    assert "Traceback" not in log
    assert "sparsed ready" not in log
    return code, log.strip().splitlines()[-1]


def test_from_start_to_a_clean_end(daemon: StartDaemon) -> None:
    running = daemon(*SMALL)
    with running.client() as client:
        answer = client.chat.completions.create(
            model="dummy:tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=5
        )
    assert answer.usage is not None and answer.usage.completion_tokens > 0
    running.process.send_signal(signal.SIGUSR1)
    assert running.stop() == 0
    log = running.log.read_text()
    (ready,) = [line for line in log.splitlines() if line.startswith("sparsed ready:")]
    assert f"model=dummy:tiny {running.url} in " in ready
    assert '"state":"serving"' in log  # SIGUSR1
    assert not list((running.state_dir / "run").iterdir())  # sockets are gone
    assert (running.state_dir / "sparsed.pid").read_text() == ""


def write_recording_of_random_pages(path: Path) -> Path:
    """Of 1,000 tokens in pages of 8."""
    rng = np.random.default_rng(1)
    lanes = [rng.permutation(1000 // 8)[:60] for _ in range(5 * 4)]
    header = RecordingHeader(
        model="tiny",
        text="words",
        method="quest",
        commit="0123abc",
        context_tokens=1000,
        page_size=8,
        token_budget=256,
        sink_pages=1,
        recent_pages=1,
        num_kv_heads=2,
        dense_layers=0,
    )
    ranked = np.stack(lanes).reshape(5, 4, 60).astype(np.int32)
    write_recording(path, Recording(header=header, ranked_SLR=ranked))
    return path


def test_replayed_selections_are_labelled_wherever_there_are_figures(
    daemon: StartDaemon, tmp_path: Path
) -> None:
    file = write_recording_of_random_pages(tmp_path / "recording.npz")
    sizes = ("--page-size", "8", "--token-budget", "256")
    running = daemon(*SMALL, *sizes, "--selection-trace", str(file))
    with running.client() as client:
        answer = client.completions.create(model="dummy:tiny", prompt="x" * 3000, max_tokens=5)
    assert answer.usage is not None
    assert answer.usage.sparse_details["replayed"] is True
    metrics = httpx.get(f"{running.url}/metrics").text
    assert 'selections="replayed"' in metrics
    with AdminClient(running.state_dir / "run" / "sparsed.sock") as admin:
        status = admin.status()
    assert status.facts is not None and status.facts.selection_trace == str(file)
    assert running.stop() == 0
    assert f"replayed from {file}" in running.log.read_text()


def test_sigterm_lets_answers_end_and_takes_no_new_ones(daemon: StartDaemon) -> None:
    running = daemon(*SMALL)
    answers: list[str | None] = []
    thread = stream_in_background(running, answers=answers)
    running.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    while (ready := httpx.get(f"{running.url}/ready")).status_code == 200:
        assert time.monotonic() < deadline
    assert ready.status_code == 503
    with running.client() as client, pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="dummy:tiny", prompt="too late", max_tokens=1)
    assert caught.value.status_code == 503
    assert "retry-after" in caught.value.response.headers
    thread.join(60)
    assert answers == ["length"]
    assert running.process.wait(timeout=30) == 0


def test_a_drain_ends_at_its_timeout(daemon: StartDaemon) -> None:
    running = daemon(*SMALL, "--shutdown-timeout", "0.2")
    answers: list[str | None] = []
    thread = stream_in_background(running, answers=answers)
    assert running.stop() == 0
    thread.join(30)
    assert answers == ["error: the daemon is shutting down"]
    assert "Traceback" not in running.log.read_text()


def test_a_second_signal_does_not_wait(daemon: StartDaemon) -> None:
    running = daemon(*SMALL)
    answers: list[str | None] = []
    thread = stream_in_background(running, answers=answers)
    running.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(timeout=20) == 0
    thread.join(30)
    assert answers == ["error: the daemon is shutting down"]
    assert "Traceback" not in running.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ready", [True, False], ids=["serving", "loading"])
def test_signals_without_end_change_nothing(
    daemon: StartDaemon, number: signal.Signals, ready: bool
) -> None:
    running = daemon(*SMALL, wait=ready)
    deadline = time.monotonic() + 60
    while "loading torch" not in running.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    while running.process.poll() is None:
        assert time.monotonic() < deadline
        running.process.send_signal(number)
        time.sleep(0.002)
    assert running.process.returncode == 0
    assert "Traceback" not in running.log.read_text()


def test_knobs_change_now_or_at_the_next_start(daemon: StartDaemon) -> None:
    running = daemon(*SMALL)
    with AdminClient(running.state_dir / "run" / "admin.sock") as admin:
        with pytest.raises(InputError, match="max_num_active_seqs"):
            admin.set_knobs({"max_num_active_seqs": 1000}, validate_only=False, reason="test")
        with pytest.raises(InputError, match="kv_hbm_gib=4000 does not fit"):
            admin.set_knobs({"kv_hbm_gib": 4000}, validate_only=False, reason="test")
        change = {"token_budget": 512, "page_size": 64}
        preview = admin.set_knobs(change, validate_only=True, reason="test")
        assert admin.status().knobs.token_budget == 2048
        assert admin.set_knobs(change, validate_only=False, reason="test") == preview
        assert admin.status().knobs.token_budget == 512
        assert admin.status().knobs.page_size == 8
    assert running.stop() == 0
    again = daemon(*SMALL, state_dir=running.state_dir)
    with AdminClient(again.state_dir / "run" / "sparsed.sock") as admin:
        knobs = {state.spec.name: state for state in admin.list_knobs()}
        assert (knobs["page_size"].value, knobs["page_size"].source) == (64, "live")
        assert knobs["token_budget"].value == 2048


def test_why_follows_what_the_daemon_does(daemon: StartDaemon) -> None:
    running = daemon(*SMALL, "--max-num-active-seqs", "1", "--max-num-seqs", "1")
    with AdminClient(running.state_dir / "run" / "sparsed.sock") as admin:
        deadline = time.monotonic() + 60
        while admin.explain().verdict.bound is not Bound.IDLE:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        answers: list[str | None] = []
        threads = [stream_in_background(running, answers=answers)]
        second = threading.Thread(target=lambda: answers.append(long_answer(running)))
        second.start()
        while (found := admin.explain()).verdict.limit is not WaitReason.ACTIVE_LIMIT:
            assert time.monotonic() < deadline and any(one.is_alive() for one in threads)
            time.sleep(0.1)
        assert found.verdict.bound is Bound.CAPACITY
        assert found.remedies[0].knob == "max_num_seqs" and found.tried == ()
        numbers = {item.name: item.value for item in found.verdict.evidence}
        assert numbers["waiting"] == 1 and numbers["mean step"] > 0
        assert numbers["calibrated rate of the link"] > 0
    for thread in (*threads, second):
        thread.join(60)
    assert answers == ["length", "length"]


def long_answer(daemon: Any) -> str | None:
    """Finish reason of one more long completion."""
    with daemon.client() as client:
        answer = client.completions.create(model="dummy:tiny", prompt="hello", **LONG)
        return str(answer.choices[0].finish_reason)


def test_a_store_that_cannot_be_opened_degrades(daemon: StartDaemon, tmp_path: Path) -> None:
    (tmp_path / "sparsed.db").mkdir()
    running = daemon(*SMALL, state_dir=tmp_path)
    with AdminClient(tmp_path / "run" / "sparsed.sock") as admin:
        status = admin.status()
    assert status.state == "degraded"
    assert "sparsed.db" in status.reasons[0]
    with running.client() as client:
        assert client.completions.create(model="dummy:tiny", prompt="hello", max_tokens=2).choices


def test_probes_answer_while_the_model_loads(daemon: StartDaemon) -> None:
    running = daemon(*SMALL, wait=False)
    deadline = time.monotonic() + 30
    while True:
        try:
            ready = httpx.get(f"{running.url}/ready")
            break
        except httpx.TransportError:
            assert time.monotonic() < deadline
    assert ready.status_code == 503
    assert httpx.get(f"{running.url}/health").json() == {"status": "loading"}
    assert running.stop() == 0  # also before it was ready


def test_one_daemon_per_state_directory_and_port(
    daemon: StartDaemon, free_port: Callable[[], int]
) -> None:
    first = daemon(*SMALL, wait=False)
    lock = first.state_dir / "sparsed.pid"
    deadline = time.monotonic() + 30
    while not (lock.exists() and lock.read_text()):
        assert time.monotonic() < deadline
    code, line = refusal(daemon(*SMALL, state_dir=first.state_dir, wait=False))
    assert code == 75
    assert str(first.process.pid) in line
    assert first.stop() == 0 or first.process.returncode == -signal.SIGTERM
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port))
        taken.listen()
        code, line = refusal(daemon(*SMALL, port=port, wait=False))
    assert code == 69
    assert f"127.0.0.1:{port}" in line and "--port" in line


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"state_dir": Path("/proc/sparsed")}, 77, "--state-dir"),
        ({"model": "/nowhere/at/all"}, 64, "/nowhere/at/all"),
    ],
)
def test_a_start_that_cannot_be(
    daemon: StartDaemon, options: dict[str, Any], code: int, says: str
) -> None:
    found, line = refusal(daemon(*SMALL, wait=False, **options))
    assert found == code
    assert says in line


def test_a_damaged_database_is_not_overwritten(daemon: StartDaemon, tmp_path: Path) -> None:
    (tmp_path / "sparsed.db").write_bytes(b"no database at all" * 1000)
    code, line = refusal(daemon(*SMALL, state_dir=tmp_path, wait=False))
    assert code == 65
    assert "sparsed.db" in line
    assert (tmp_path / "sparsed.db").read_bytes().startswith(b"no database")


def test_the_load_is_known_again_after_a_restart(daemon: StartDaemon) -> None:
    flags = (*SMALL, "--regime-dwell", "2")

    def serve_until_known(running: Any) -> Any:
        deadline = time.monotonic() + 60
        with (
            running.client() as client,
            AdminClient(running.state_dir / "run" / "sparsed.sock") as admin,
        ):
            while (load := admin.tuner().load).current is None and time.monotonic() < deadline:
                client.completions.create(model="dummy:tiny", prompt="hello", max_tokens=2)
        return load

    running = daemon(*flags)
    (first,) = serve_until_known(running).regimes
    assert "prompts of 5 (p95 5) tokens" in first.signature and first.incumbent == {}
    assert running.stop() == 0
    again = daemon(*flags, state_dir=running.state_dir)
    load = serve_until_known(again)
    assert load.current == first.regime_id and len(load.regimes) == 1
    assert load.regimes[0].seen_s > 0


def test_what_is_served_is_recorded_without_text(daemon: StartDaemon, tmp_path: Path) -> None:
    running, file = daemon(*SMALL), tmp_path / "trace.jsonl"
    command = [sys.executable, "-m", "sparsed", "record", "--output", str(file)]
    command += ["--max-requests", "2", "--state-dir", str(running.state_dir)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as recording:
        assert recording.stderr is not None
        assert "recording 1" in recording.stderr.readline()
        with running.client() as client:
            for extra in ({"max_tokens": 5}, {"max_tokens": 7}):
                client.completions.create(
                    model="dummy:tiny",
                    prompt="a text that nobody else may read",
                    extra_body={"ignore_eos": True},
                    **extra,
                )
        assert recording.wait(timeout=30) == 0
    text = file.read_text()
    first, second = parse_trace(text.splitlines())
    assert (first.output_tokens, second.output_tokens) == (5, 7)
    assert first.input_tokens == second.input_tokens > 1
    assert first.block_ids == second.block_ids == (0,)
    keys = {"timestamp", "input_length", "output_length", "max_tokens", "hash_ids"}
    assert all(json.loads(line).keys() == keys for line in text.splitlines())
