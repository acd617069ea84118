"""Bad input to the real process: at the start one line and a code, later a typed refusal."""

from __future__ import annotations

import json
import os
import re
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow

StartDaemon = Callable[..., Any]
SMALL = ("--kv-hbm-gib", "0.05", "--kv-dram-gib", "0.1", "--token-budget", "256")
PATH = "/v1/completions"
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d .* INFO ")


@pytest.fixture(scope="module", autouse=True)
def served(daemon: StartDaemon) -> Any:
    """One daemon for all tests, whose disk is full from the start: the kernel lets it write no
    file beyond a size that leaves room for its log, but for no page of its database. There before
    the first test: it has a minute's measurements to write by the last one."""
    running = daemon(*SMALL)
    size = running.log.stat().st_size + 3000
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (size, size))
    return running


def sparsed(*arguments: str, state_dir: Path) -> subprocess.CompletedProcess[str]:
    """A verb that ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "sparsed", *arguments, "--state-dir", str(state_dir)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def ask(daemon: Any, body: dict[str, object] | bytes) -> httpx.Response:
    """POST a completion; a body of bytes goes out as it is."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{daemon.url}{PATH}", content=content, headers=headers, timeout=300.0)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of stderr that is no progress."""
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if not LOG_LINE.match(line)]
    return line


# ---- starts --------------------------------------------------------------------------------


def cut_weights(target: Path, smollm2: Path) -> Path:
    """The real model, whose download ended after a megabyte."""
    target.mkdir()
    for file in smollm2.iterdir():
        (target / file.name).symlink_to(file)
    (target / "model.safetensors").unlink()
    with (smollm2 / "model.safetensors").open("rb") as whole:
        (target / "model.safetensors").write_bytes(whole.read(1 << 20))
    return target


def garbage_gguf(target: Path, _: Path) -> Path:
    file = target.with_suffix(".gguf")
    file.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 4096)
    return file


def short_gguf(target: Path, _: Path) -> Path:
    file = target.with_suffix(".gguf")
    file.write_bytes(b"GGUF\x03\x00\x00\x00")
    return file


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (cut_weights, 65, "model.safetensors is damaged or incomplete"),
        (garbage_gguf, 65, "no readable GGUF file"),
        (short_gguf, 65, "no readable GGUF file"),
    ],
)
def test_a_damaged_model_is_named(
    tmp_path: Path,
    smollm2: Path,
    free_port: Callable[[], int],
    make: Callable[[Path, Path], Path],
    code: int,
    says: str,
) -> None:
    model = make(tmp_path / "model", smollm2)
    flags = ("--device", "cpu", "--port", str(free_port()), *SMALL)
    done = sparsed("start", "--model", str(model), *flags, state_dir=tmp_path / "state")
    assert done.returncode == code
    line = refusal(done)
    assert says in line and str(model) in line


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--token-budget", "-5"], "256 to 8192"),
        (["--page-size", "7"], "8, 16, 32, 64, 128"),
        (["--kv-hbm-gib", "nan"], "0.001 to 4096"),
        (["--kv-dram-gib", "60000"], "lower it"),
        (["--max-model-len", "16000000"], "8192 positions"),
        (["--config", "CONFIG"], "did you mean 'token_budget'"),
    ],
)
def test_absurd_settings_never_start(tmp_path: Path, flags: list[str], says: str) -> None:
    config = tmp_path / "sparsed.toml"
    config.write_text("config_version = 1\ntoken_budgets = 512\n")
    flags = [flag.replace("CONFIG", str(config)) for flag in flags]
    command = ("start", "--model", "dummy:tiny", "--device", "cpu", *flags)
    done = sparsed(*command, state_dir=tmp_path / "state")
    assert done.returncode == (78 if "--config" in flags else 64)
    assert says in refusal(done)


def newer_database(directory: Path) -> Path:
    directory.mkdir()
    with sqlite3.connect(directory / "sparsed.db") as database:
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("INSERT INTO alembic_version VALUES ('9999')")
    database.close()
    return directory


def below_a_file(directory: Path) -> Path:
    directory.write_text("a regular file")
    return directory / "state"


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [(newer_database, 65, "upgrade sparsed"), (below_a_file, 77, "--state-dir")],
)
def test_a_state_directory_that_cannot_be_used(
    tmp_path: Path,
    free_port: Callable[[], int],
    make: Callable[[Path], Path],
    code: int,
    says: str,
) -> None:
    state_dir = make(tmp_path / "state")
    flags = ("--device", "cpu", "--port", str(free_port()))
    done = sparsed("start", "--model", "dummy:tiny", *flags, state_dir=state_dir)
    assert done.returncode == code
    line = refusal(done)
    assert says in line and str(state_dir) in line


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A state directory whose database has a wrong byte every 97."""
    sparsed("profile", "list", state_dir=tmp_path)
    database = tmp_path / "sparsed.db"
    content = bytearray(database.read_bytes())
    content[4096::97] = bytes(byte ^ 255 for byte in content[4096::97])
    database.write_bytes(content)
    return tmp_path


def test_a_damaged_database_is_named(damaged: Path, free_port: Callable[[], int]) -> None:
    says = f"{damaged / 'sparsed.db'} is not a readable database; move it away"
    listed = sparsed("profile", "list", state_dir=damaged)
    assert listed.returncode == 1
    assert says in listed.stderr.splitlines()[-1] and "Traceback" not in listed.stderr
    flags = ("--device", "cpu", "--port", str(free_port()))
    started = sparsed("start", "--model", "dummy:tiny", *flags, state_dir=damaged)
    assert started.returncode == 65
    assert says in refusal(started)


def test_a_database_that_cannot_be_asked_is_no_bug(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """The file opens, but lacks what the start looks up."""
    sparsed("profile", "list", state_dir=tmp_path)
    with sqlite3.connect(tmp_path / "sparsed.db") as database:
        database.execute("DROP TABLE profile")
        database.execute("CREATE TABLE profile (id INTEGER PRIMARY KEY)")
    database.close()
    flags = ("--device", "cpu", "--port", str(free_port()))
    started = sparsed("start", "--model", "dummy:tiny", *flags, state_dir=tmp_path)
    assert started.returncode == 65
    assert "no such column" in refusal(started)


def test_a_search_beside_a_daemon_points_to_the_live_one(served: Any) -> None:
    done = sparsed("tune", "--model", "dummy:tiny", state_dir=served.state_dir)
    assert done.returncode == 75
    line = refusal(done)
    assert f"pid {served.process.pid}" in line and "sparsed tuner advise" in line


# ---- requests ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"temperature": float("nan")}, "temperature"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"logit_bias": {"512": 1}}, "logit_bias"),
        ({"prompt": [512]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "half a pair: \ud800"}, "prompt"),
        ({"sparse": {"token_budget": -1}}, "sparse.token_budget"),
        ({"sparse": {"token_budget": 10**40}}, "sparse.token_budget"),
        ({"sparse": []}, "sparse"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_a_wrong_field_is_named(served: Any, change: dict[str, object], param: str) -> None:
    answer = ask(served, {"prompt": "x"} | change)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert param in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b'{"prompt": "\xff"}', 400),
        (b'{"prompt":' + b"[" * 100_000, 400),
        (b'{"prompt": [' + b"1," * 300_000 + b"1]}", 400),
        (b'{"prompt": "' + b"a" * (33 << 20) + b'"}', 413),
    ],
    ids=["empty", "list", "bytes", "deep", "long", "huge"],
)
def test_a_wrong_body_is_refused(served: Any, content: bytes, status: int) -> None:
    answer = ask(served, content)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == status
    assert served.is_ready()


def test_extremes_that_mean_something_are_served(served: Any) -> None:
    nothing_else = {str(token): -100 for token in range(512) if token != 7}
    for change in (
        {"logit_bias": {"7": 100}},
        {"logit_bias": nothing_else, "temperature": 2},
        {"top_p": 1e-300, "max_tokens": 1},
        {"temperature": 5e-324, "repetition_penalty": 0.01},
        {"prompt": "\x00\u202e\U0010ffff", "n": 3, "stop": ["a", "e"], "max_tokens": 30},
        {"max_tokens": 0, "echo": True, "logprobs": 20},
    ):
        answer = ask(served, {"prompt": "x", "max_tokens": 2, "seed": 1} | change)
        assert answer.status_code == 200, answer.text
        if "logit_bias" in change:
            assert answer.json()["choices"][0]["text"] == "\x07\x07"


def test_a_prompt_beyond_the_tiers_names_the_limit(daemon: StartDaemon) -> None:
    """The model takes 8192 tokens; these tiers hold fewer of any one request."""
    tight = daemon("--kv-hbm-gib", "0.05", "--kv-dram-gib", "0.001", "--token-budget", "256")
    limit = httpx.get(f"{tight.url}/v1/models").json()["data"][0]["max_model_len"]
    assert limit < 8192
    for body in ({"prompt": [1] * limit}, {"prompt": [1] * 9000}):
        answer = ask(tight, body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "prompt"
        assert str(limit) in answer.json()["error"]["message"]
    answer = ask(tight, {"prompt": [1] * (limit - 2), "max_tokens": 2, "ignore_eos": True})
    assert answer.json()["usage"]["completion_tokens"] == 2
    assert tight.stop() == 0


# ---- control -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "assignment", ["token_budget=-1", "token_budget=many", "page_size=7", "tokens=5", "=", "x"]
)
def test_an_absurd_knob_changes_nothing(served: Any, assignment: str) -> None:
    before = sparsed("knobs", "list", "-o", "json", state_dir=served.state_dir).stdout
    done = sparsed("knobs", "set", assignment, state_dir=served.state_dir)
    assert done.returncode in (1, 2)
    assert assignment.split("=")[0] in done.stderr
    assert "Traceback" not in done.stderr
    assert sparsed("knobs", "list", "-o", "json", state_dir=served.state_dir).stdout == before


def test_a_full_disk_costs_measurements_and_not_answers(served: Any) -> None:
    deadline = time.monotonic() + 90  # a minute's measurements are written together
    while (done := sparsed("status", state_dir=served.state_dir)).returncode == 0:
        assert time.monotonic() < deadline, done.stdout
        time.sleep(1.0)
    assert done.returncode == 4
    assert "degraded" in done.stdout and re.search(r"the store lost \d+ writes", done.stdout)
    assert "the store lost a write" in served.log.read_text()
    assert ask(served, {"prompt": "x", "max_tokens": 2}).status_code == 200
    assert served.is_ready()
