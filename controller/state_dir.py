"""Where a daemon keeps its files, and the lock that makes it the only one there."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from sparsed.core import ExitCode, InputError, StartError

MAX_SOCKET_PATH_BYTES = 107  # sun_path holds 108 with its closing zero


@dataclass(frozen=True, kw_only=True, slots=True)
class StateDir:
    """The state directory ``root`` and the directory of sockets; nothing is created yet."""

    root: Path
    run_dir: Path

    @property
    def database(self) -> Path:
        return self.root / "sparsed.db"

    @property
    def pid_file(self) -> Path:
        return self.root / "sparsed.pid"

    @property
    def pending_file(self) -> Path:
        """Knobs that were set live and wait for the next start."""
        return self.root / "pending.toml"

    @property
    def tuner_kill_file(self) -> Path:
        """While it exists the live tuner does nothing."""
        return self.root / "tuner.kill"

    @property
    def log_file(self) -> Path:
        """Output of a detached daemon."""
        return self.root / "sparsed.log"

    @property
    def read_socket(self) -> Path:
        return self.run_dir / "sparsed.sock"

    @property
    def admin_socket(self) -> Path:
        return self.run_dir / "admin.sock"


def resolve_state_dir(explicit: Path | None, *, environment: Mapping[str, str]) -> StateDir:
    """``--state-dir``, else $STATE_DIRECTORY, else $XDG_STATE_HOME/sparsed, else ~/.local/state.

    Sockets live in DIR/run of an explicit directory, else in $RUNTIME_DIRECTORY, else in
    $XDG_RUNTIME_DIR/sparsed, else in the state directory's ``run``.
    Errors: InputError when a socket path would be too long for the kernel, or is no UTF-8, or when
    ``~`` names nobody.
    """
    root = _expanded(explicit) if explicit else _default_root(environment)
    run_dir = root / "run"
    if not explicit and (systemd := environment.get("RUNTIME_DIRECTORY")):
        run_dir = Path(systemd.split(":")[0])
    elif not explicit and (xdg := environment.get("XDG_RUNTIME_DIR")):
        run_dir = Path(xdg) / "sparsed"
    state_dir = StateDir(root=root, run_dir=run_dir)
    _check_socket_length(run_dir / "engine.12345678.sock")  # the longest name
    return state_dir


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise InputError(
            f"state_dir={path} is in the home of a user that is not there; give a full path",
            field="state_dir",
        ) from None


def resolve_cache_dir(environment: Mapping[str, str]) -> Path:
    """Where fetched models live: $CACHE_DIRECTORY, else $XDG_CACHE_HOME/sparsed, else ~/.cache."""
    if systemd := environment.get("CACHE_DIRECTORY"):
        return Path(systemd.split(":")[0])
    home = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "/")) / ".cache"
    return Path(home) / "sparsed"


class StateLock:
    """The state directory, created, writable, and ours alone until ``release``.

    The lock is a flock on the pid file: it ends with the process, however that ends, so a pid
    file alone never means that a daemon runs. Sockets of engines that such an end left are removed.
    Errors: StartError NO_PERMISSION when the directories cannot be made or written,
    StartError TEMPORARY naming the owner's pid when another process holds them.
    """

    def __init__(self, state_dir: StateDir, *, verb: str) -> None:
        self.state_dir = state_dir
        try:
            for directory in (state_dir.root, state_dir.run_dir):
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                if not os.access(directory, os.W_OK | os.X_OK):
                    raise PermissionError(f"no write permission on {directory}")
            self._fd = os.open(state_dir.pid_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartError(
                f"cannot write to the state directory {state_dir.root}: {error.strerror or error}; "
                "choose another one with --state-dir",
                code=ExitCode.NO_PERMISSION,
            ) from error
        self._lock_or_refuse(verb)
        for stale in state_dir.run_dir.glob("engine.*.sock"):
            stale.unlink(missing_ok=True)

    def release(self) -> None:
        os.ftruncate(self._fd, 0)
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _lock_or_refuse(self, verb: str) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(self._fd, 100, 0).decode()
            os.close(self._fd)
            message = _refusal(owner, verb=verb, root=self.state_dir.root)
            raise StartError(message, code=ExitCode.TEMPORARY) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()} {verb}\n".encode(), 0)


def _refusal(owner: str, *, verb: str, root: Path) -> str:
    pid, _, owner_verb = owner.strip().partition(" ")
    held = f"`sparsed {owner_verb or 'start'}` (pid {pid or 'unknown'}) owns {root}"
    if verb == "tune" and owner_verb != "tune":
        return f"{held}; stop it first, or search beside it with: sparsed tuner advise"
    if owner_verb in ("tune", "eval") or owner_verb.startswith("bench "):
        return f"{held}; wait for it to end, or choose another --state-dir"
    return f"{held}; stop it with: sparsed stop, or choose another --state-dir"


def _default_root(environment: Mapping[str, str]) -> Path:
    if systemd := environment.get("STATE_DIRECTORY"):
        return Path(systemd.split(":")[0])
    home = environment.get("XDG_STATE_HOME")
    return Path(home or Path(environment.get("HOME", "/")) / ".local/state") / "sparsed"


def _check_socket_length(socket: Path) -> None:
    try:
        length = len(str(socket).encode())
    except UnicodeEncodeError:
        raise InputError(
            f"the state directory {str(socket.parent)!r} has bytes that are not UTF-8; "
            "choose another --state-dir",
            field="state_dir",
        ) from None
    if length > MAX_SOCKET_PATH_BYTES:
        raise InputError(
            f"the socket path {socket} has {length} bytes, more than the "
            f"{MAX_SOCKET_PATH_BYTES} a unix socket allows; choose a shorter --state-dir",
            field="state_dir",
        )
