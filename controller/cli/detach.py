"""A daemon in the background: the same command in a session of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from sparsed.controller.client import AdminClient, CallFailed, DaemonUnreachable
from sparsed.controller.control import DaemonState
from sparsed.controller.state_dir import StateDir
from sparsed.core import ExitCode, StartError

POLL_S = 0.2
_READY_STATES = (DaemonState.SERVING, DaemonState.DEGRADED)


def start_detached(place: StateDir) -> int:
    """Start this process's command again without ``--detach``, and wait until it serves.

    What the daemon writes goes to the log of ``place``, and here while we wait. Returns 0, or
    the exit status of a daemon that could not start. Ctrl-C ends the daemon too.
    """
    command = [sys.executable, "-m", "sparsed"]
    command += [argument for argument in sys.argv[1:] if argument != "--detach"]
    with _open_log(place) as log, place.log_file.open("rb") as reader:
        reader.seek(0, os.SEEK_END)
        daemon = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            return _wait_until_ready(daemon, place, reader)
        except KeyboardInterrupt:
            daemon.terminate()
            raise


def _open_log(place: StateDir) -> BinaryIO:
    try:
        place.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        return place.log_file.open("ab")
    except OSError as error:
        raise StartError(
            f"cannot write {place.log_file}: {error.strerror}; choose another --state-dir",
            code=ExitCode.NO_PERMISSION,
        ) from None


def _wait_until_ready(daemon: subprocess.Popen[bytes], place: StateDir, log: BinaryIO) -> int:
    while True:
        code = daemon.poll()
        is_ready = code is None and _serves(place.read_socket, pid=daemon.pid)
        time.sleep(POLL_S)  # what it said about it reaches the log
        sys.stdout.write(log.read().decode(errors="replace"))
        sys.stdout.flush()
        if code is not None:
            return code if code > 0 else ExitCode.SOFTWARE
        if is_ready:
            print(f"pid {daemon.pid}, log {place.log_file}")
            return ExitCode.OK


def _serves(socket: Path, *, pid: int) -> bool:
    with suppress(DaemonUnreachable, CallFailed), AdminClient(socket) as client:
        status = client.status()
        return status.pid == pid and status.state in _READY_STATES
    return False
