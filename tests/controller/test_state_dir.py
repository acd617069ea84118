"""The state directory and its lock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsed.controller.state_dir import StateDir, StateLock, resolve_cache_dir, resolve_state_dir
from sparsed.core import ExitCode, InputError, StartError

HOLDER = """
import sys
from pathlib import Path
from sparsed.controller.state_dir import StateLock, resolve_state_dir
lock = StateLock(resolve_state_dir(Path(sys.argv[1]), environment={}), verb=sys.argv[2])
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("explicit", "environment", "root", "run_dir"),
    [
        (Path("/data"), {"STATE_DIRECTORY": "/s", "RUNTIME_DIRECTORY": "/r"}, "/data", "/data/run"),
        (None, {"STATE_DIRECTORY": "/s:/t", "RUNTIME_DIRECTORY": "/r:/q"}, "/s", "/r"),
        (None, {"HOME": "/h", "XDG_RUNTIME_DIR": "/x"}, "/h/.local/state/sparsed", "/x/sparsed"),
        (None, {"HOME": "/h", "XDG_STATE_HOME": "/y"}, "/y/sparsed", "/y/sparsed/run"),
    ],
)
def test_where_state_lives(
    explicit: Path | None, environment: dict[str, str], root: str, run_dir: str
) -> None:
    state_dir = resolve_state_dir(explicit, environment=environment)
    assert state_dir == StateDir(root=Path(root), run_dir=Path(run_dir))


def test_where_models_live() -> None:
    assert resolve_cache_dir({"CACHE_DIRECTORY": "/c:/d", "HOME": "/h"}) == Path("/c")
    assert resolve_cache_dir({"XDG_CACHE_HOME": "/x", "HOME": "/h"}) == Path("/x/sparsed")
    assert resolve_cache_dir({"HOME": "/h"}) == Path("/h/.cache/sparsed")


def test_a_socket_path_too_long_for_the_kernel_is_refused() -> None:
    with pytest.raises(InputError, match="shorter --state-dir") as caught:
        resolve_state_dir(Path("/" + "d" * 90), environment={})
    assert caught.value.field == "state_dir"


def test_a_path_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not UTF-8") as caught:
        resolve_state_dir(tmp_path / "a\udc80b", environment={})
    assert caught.value.field == "state_dir"


def test_a_directory_that_cannot_be_made() -> None:
    state_dir = resolve_state_dir(Path("/proc/sparsed"), environment={})
    with pytest.raises(StartError, match=r"/proc/sparsed.*--state-dir") as caught:
        StateLock(state_dir, verb="start")
    assert caught.value.code is ExitCode.NO_PERMISSION


@pytest.mark.parametrize(
    ("holder", "comer", "remedy"),
    [
        ("start", "start", "sparsed stop"),
        ("start", "tune", "sparsed tuner advise"),
        ("tune", "start", "wait for it"),
        ("tune", "tune", "wait for it"),
    ],
)
def test_the_second_is_told_who_the_first_is(
    tmp_path: Path, holder: str, comer: str, remedy: str
) -> None:
    state_dir = resolve_state_dir(tmp_path, environment={})
    command = [sys.executable, "-c", HOLDER, str(tmp_path), holder]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(StartError, match=f"pid {process.pid}.*{remedy}") as caught:
            StateLock(state_dir, verb=comer)
        assert caught.value.code is ExitCode.TEMPORARY
        process.kill()
        process.wait()
        with StateLock(state_dir, verb=comer):  # a lock ends with its process
            assert state_dir.pid_file.read_text() == f"{os.getpid()} {comer}\n"
    assert state_dir.pid_file.read_text() == ""
