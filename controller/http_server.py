"""The HTTP server on the daemon's own event loop, under the daemon's own signals."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from sparsed.core import ExitCode, StartError

BACKLOG = 2048
STOP_GRACE_S = 2


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the daemon."""
        yield


def bind_port(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet, so that a port in use shows before any work.

    Errors: StartError UNAVAILABLE naming host and port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise _refusal(host, port, error) from error
    return bound


def _refusal(host: str, port: int, error: OSError) -> StartError:
    return StartError(
        f"cannot listen on {host}:{port}: {error.strerror or error}; "
        "choose another --port or --host",
        code=ExitCode.UNAVAILABLE,
    )


class HttpServer:
    """Serves ``app`` on ``bound`` from ``start`` to ``stop``."""

    def __init__(self, app: FastAPI, *, bound: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=STOP_GRACE_S,
        )
        self._server = _Server(config)
        self._bound = bound
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        """Begin to answer; returns the task, which ends only by ``stop`` or a fault.

        Errors: StartError UNAVAILABLE when another process took the port since ``bind_port``.
        """
        try:
            self._bound.listen(BACKLOG)
        except OSError as error:
            host, port = self._bound.getsockname()[:2]
            raise _refusal(host, port, error) from error
        self._task = asyncio.create_task(self._server.serve(sockets=[self._bound]), name="http")
        return self._task

    async def stop(self) -> None:
        """Stop listening, let open answers end within a short grace, close."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait({self._task})
