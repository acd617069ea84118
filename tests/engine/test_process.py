"""A measuring process ends with whoever started it, and quietly."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

END_S = 30.0
MEASURE = (
    "import sys, time; from sparsed.engine.process import answer\n"
    "def measure(report):\n"
    "    while True:\n"
    "        report('measuring', 0.0)\n"
    "        time.sleep(0.01)\n"
    "sys.exit(answer(measure))"
)
COMMAND = (sys.executable, "-P", "-c", MEASURE)


@contextmanager
def measuring() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has said how far it is."""
    pipe = subprocess.PIPE
    with subprocess.Popen(COMMAND, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert b"LoadProgress" in process.stdout.readline()
        yield process
        process.kill()


def quiet_status(process: subprocess.Popen[bytes]) -> int:
    """How it ended, with nothing on standard error."""
    status = process.wait(END_S)
    assert process.stderr is not None and process.stderr.read() == b""
    return status


def test_ctrl_c_leaves_no_traceback() -> None:
    with measuring() as process:
        process.send_signal(signal.SIGINT)
        assert quiet_status(process) == 130


def test_it_ends_where_nobody_listens() -> None:
    with measuring() as process:
        assert process.stdout is not None
        process.stdout.close()
        assert quiet_status(process) == 130


def test_it_dies_with_its_parent() -> None:
    start = (
        "import subprocess; pipe = subprocess.PIPE\n"
        f"child = subprocess.Popen({COMMAND!r}, stdout=pipe)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "for line in child.stdout: pass"
    )
    with subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    psutil.wait_procs([child], timeout=END_S)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
