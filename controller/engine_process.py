"""One engine process: its pipe, its messages, its signs of life."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import zmq.asyncio

from sparsed.core import EngineReady, EngineSpec, FailureCause, Heartbeat, Shutdown
from sparsed.engine.wire import FromEngine, ToEngine, decode, encode
from sparsed.profiler.cgroup import read_oom_kills

WATCH_PERIOD_S = 0.5
BUSY_LOAD_FRAC = 0.5  # of the cores: with more to run, spinning threads hurt (ADR 5)
DRY_MS = 200  # a dead engine's socket that is silent for so long has nothing left


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchLimits:
    """How long an engine may be silent, and how long one step may take, before it is killed."""

    silence_s: float = 10.0
    loading_silence_s: float = 300.0
    step_s: float = 300.0


class Ending(NamedTuple):
    """Why a process is gone: in words, and as far as the words tell, what kind of reason."""

    reason: str
    cause: FailureCause


class EngineProcess:
    """From ``spawn`` to ``run``'s return, after which the process is gone and all is closed.

    Lives on the event loop. The engine has a process group of its own, so that Ctrl-C reaches
    only the controller; a worker dies with its parent by itself.
    """

    def __init__(
        self,
        process: Process,
        socket: zmq.asyncio.Socket,
        *,
        endpoint: Path,
        on_message: Callable[[FromEngine], None],
        limits: WatchLimits,
    ) -> None:
        self._process = process
        self._socket = socket
        self._endpoint = endpoint
        self._on_message = on_message
        self._limits = limits
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._num_oom_kills = read_oom_kills()  # of this group, at the start of the process
        self._ready = False
        self._silent_s = 0.0
        self._step_age_s = 0.0

    @classmethod
    async def spawn(
        cls,
        spec: EngineSpec,
        *,
        context: zmq.asyncio.Context,
        endpoint: Path,
        pool_fd: int,
        on_message: Callable[[FromEngine], None],
        limits: WatchLimits,
    ) -> EngineProcess:
        """Bind ``endpoint``, start a worker on it, and queue ``spec`` as its first message."""
        socket = context.socket(zmq.PAIR)
        socket.set_hwm(0)  # tokens are never dropped, and sending never waits
        socket.bind(f"ipc://{endpoint}")
        command = ("-P", "-m", "sparsed.engine.worker", "--endpoint", f"ipc://{endpoint}")
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            "--parent",
            str(os.getpid()),
            "--pool-fd",
            str(pool_fd),
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=(pool_fd,),
            process_group=0,
            env=worker_environment(),
        )
        engine = cls(process, socket, endpoint=endpoint, on_message=on_message, limits=limits)
        engine.send(spec)
        return engine

    def send(self, message: ToEngine) -> None:
        self._outbox.put_nowait(encode(message))

    async def run(self) -> Ending:
        """Pass messages both ways until the process is gone, killing it if it hangs.

        Returns why it ended. All it said before is delivered first.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read())
                writer = group.create_task(self._write())
                ending = await self._watch()
                writer.cancel()
            return ending
        finally:
            self._kill()
            self._socket.close(linger=0)
            self._endpoint.unlink(missing_ok=True)  # ZeroMQ leaves the file

    async def stop(self, timeout_s: float) -> None:
        """Ask the worker to end, and kill it after ``timeout_s``; ``run`` then returns."""
        self.send(Shutdown())
        try:
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
        except TimeoutError:
            self._kill()

    async def _read(self) -> None:
        while True:
            gone = self._process.returncode is not None
            if await self._socket.poll(DRY_MS):
                self._receive(decode(await self._socket.recv()))
            elif gone:
                return

    async def _write(self) -> None:
        while True:
            await self._socket.send(await self._outbox.get())

    def _receive(self, message: FromEngine | ToEngine) -> None:
        self._silent_s = 0.0
        if isinstance(message, Heartbeat):
            self._step_age_s = message.step_age_s
            return
        assert not isinstance(message, ToEngine), f"the engine sent {message}"
        self._ready |= isinstance(message, EngineReady)
        self._on_message(message)

    async def _watch(self) -> Ending:
        ticked_s = time.monotonic()
        while not await self._gone_within(WATCH_PERIOD_S):
            now_s = time.monotonic()
            # If the controller itself was stopped, the engine's words are waiting unread.
            self._silent_s += min(now_s - ticked_s, 2 * WATCH_PERIOD_S)
            ticked_s = now_s
            if hang := self._hang():
                self._kill()
                await self._process.wait()
                return Ending(hang, FailureCause.HANG)
        assert self._process.returncode is not None
        return ending_of(
            self._process.returncode, oom_kills=(self._num_oom_kills, read_oom_kills())
        )

    async def _gone_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
        except TimeoutError:
            return False
        return True

    def _hang(self) -> str | None:
        limits = self._limits
        silence_s = limits.silence_s if self._ready else limits.loading_silence_s
        if self._silent_s > silence_s:
            return f"it was silent for {self._silent_s:.0f} s"
        if self._step_age_s > limits.step_s:
            return f"one step took longer than {limits.step_s:.0f} s"
        return None

    def _kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()


def worker_environment() -> dict[str, str]:
    """Of a process that runs the engine: beside other work its threads sleep, not spin."""
    environment = dict(os.environ)
    environment.pop("NOTIFY_SOCKET", None)  # only the controller reports to systemd
    if os.getloadavg()[0] > BUSY_LOAD_FRAC * (os.cpu_count() or 1):
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return environment


def ending_of(returncode: int, *, oom_kills: tuple[int | None, int | None]) -> Ending:
    """Why a process is gone. The kernel ends one that takes too much memory by SIGKILL, as an
    operator may; ``oom_kills``, counted at its start and at its end, tell them apart, and None,
    where nobody counts, blames no memory."""
    if returncode >= 0:
        return Ending(f"it exited with status {returncode}", FailureCause.OTHER)
    by = signal.Signals(-returncode)
    if by is not signal.SIGKILL:
        return Ending(f"it was killed by {by.name}", FailureCause.OTHER)
    before, after = oom_kills
    if before is not None and after is not None and after > before:
        return Ending("the kernel killed it: out of host memory", FailureCause.HOST_MEMORY)
    return Ending(f"it was killed by {by.name}", FailureCause.KILLED)
