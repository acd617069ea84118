"""HTTP/1.1 on one connection per request, close to the socket.

A general HTTP library spends several times as long on a chunk as everything else here together,
and with hundreds of streams the time of the client would be measured for that of the server.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

from sparsed.core import InputError

READ_BYTES: Final = 1 << 16


class ConnectFailed(Exception):
    """Nobody accepted the connection."""


class BadAnswer(Exception):
    """The other side does not speak HTTP as it should."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """Where requests go. ``url`` is for people, without credentials. ``base_path`` precedes every path; ``tls`` None: plain HTTP. ``address``
    is that of ``host``, if it has been looked up."""

    url: str
    host: str
    port: int
    address: str | None = None
    base_path: str = ""
    tls: ssl.SSLContext | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def head(self, method: str, path: str, *, num_bytes: int) -> bytes:
        """Request line and headers, the empty line included."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {self.base_path}{path} HTTP/1.1", f"Host: {host}:{self.port}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if method == "POST":
            lines += ["Content-Type: application/json", f"Content-Length: {num_bytes}"]
        lines += ["Accept-Encoding: identity", "Connection: close", "", ""]
        return "\r\n".join(lines).encode("latin-1")


def parse_server(url: str, *, api_key: str | None = None) -> Server:
    """``http://HOST:PORT``, https too, with or without /v1 at the end; USER:PASSWORD@ before the
    host is sent as basic authentication. InputError if it is not like that."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        parts, port = urlsplit(""), 0
    if not parts.hostname or parts.query or parts.fragment:
        shown = hide_credentials(url)
        raise InputError(f"--url {shown!r} is not like http://127.0.0.1:8000", field="url")
    return Server(
        url=hide_credentials(url),
        host=parts.hostname,
        port=port,
        base_path=parts.path.rstrip("/").removesuffix("/v1"),
        tls=ssl.create_default_context() if parts.scheme == "https" else None,
        headers=_authorization(parts, api_key=api_key),
    )


def _authorization(parts: SplitResult, *, api_key: str | None) -> dict[str, str]:
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise InputError("--api-key has characters that no header may hold", field="api-key")
    if parts.username is None:
        return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    if api_key is not None:
        raise InputError(
            "--url has a user, and there is an API key too; a request carries one of them",
            field="url",
        )
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


def hide_credentials(url: str) -> str:
    """The URL as it may be shown and kept."""
    scheme, mark, rest = url.rpartition("://")
    _, at, place = rest.rpartition("@")
    return f"{scheme}{mark}***@{place}" if at else url


def in_words(failure: Exception) -> str:
    """What happened to a connection, as a person would say it."""
    if isinstance(failure, ConnectionError | EOFError):
        return "the server closed the connection"
    return str(failure)


class Response:
    """The status, and the body as it comes."""

    def __init__(self, reader: asyncio.StreamReader, *, status: int, headers: dict[str, str]):
        self.status = status
        self._reader = reader
        self._headers = headers

    async def blocks(self) -> AsyncIterator[bytes]:
        """The body in the pieces it arrives in. BadAnswer, IncompleteReadError, OSError."""
        if self._headers.get("transfer-encoding", "").lower() == "chunked":
            async for block in self._chunks():
                yield block
            return
        left = int(length) if (length := self._headers.get("content-length")) else None
        while left != 0:
            block = await self._reader.read(READ_BYTES)
            if not block:
                if left:
                    raise asyncio.IncompleteReadError(b"", left)
                return
            left = None if left is None else max(0, left - len(block))
            yield block

    async def body(self, *, max_bytes: int = 1 << 24) -> bytes:
        """All of it, but not much more than ``max_bytes``."""
        whole = bytearray()
        async for block in self.blocks():
            whole += block
            if len(whole) > max_bytes:
                break
        return bytes(whole)

    async def _chunks(self) -> AsyncIterator[bytes]:
        while True:
            line = await self._reader.readline()
            if not line.endswith(b"\n"):
                raise asyncio.IncompleteReadError(line, None)
            try:
                size = int(line.partition(b";")[0], 16)
            except ValueError:
                raise BadAnswer(f"a chunk begins with {line[:40]!r}") from None
            if not size:
                return
            block = await self._reader.readexactly(size + 2)
            yield block[:-2]


@asynccontextmanager
async def exchange(
    server: Server, *, method: str, path: str, body: bytes = b""
) -> AsyncIterator[Response]:
    """Send one request on a connection of its own, which ends with the context.

    Errors: ConnectFailed; BadAnswer, IncompleteReadError and OSError from then on.
    """
    reader, writer = await _connect(server)
    try:
        writer.write(server.head(method, path, num_bytes=len(body)) + body)
        yield await _read_head(reader)
    except (asyncio.LimitOverrunError, ValueError) as error:
        raise BadAnswer(str(error)) from error
    finally:
        writer.transport.abort()


async def look_up(server: Server) -> Server:
    """With the address that accepts connections: names are looked up by a few threads, behind which
    hundreds of requests would queue. ConnectFailed."""
    _, writer = await _connect(server)
    address = writer.get_extra_info("peername")[0]
    writer.transport.abort()
    return replace(server, address=address)


async def _connect(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    try:
        return await asyncio.open_connection(
            server.address or server.host,
            server.port,
            ssl=server.tls,
            server_hostname=server.host if server.tls else None,
        )
    except (OSError, UnicodeError) as error:
        raise ConnectFailed(str(error) or type(error).__name__) from error


async def _read_head(reader: asyncio.StreamReader) -> Response:
    status = 100
    while status < 200:  # 100 Continue is followed by the real one
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.rstrip().split("\r\n")
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1."):
            raise BadAnswer(f"the answer begins with {first[:40]!r}")
        status = int(rest[:3])
    pairs = (line.partition(":") for line in lines)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    return Response(reader, status=status, headers=headers)
