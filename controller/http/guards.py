"""What every request passes before a handler sees it: the key, and a bound on its body."""

from __future__ import annotations

import hmac

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparsed.controller.http.bodies import max_body_bytes
from sparsed.controller.http.errors import error_response
from sparsed.controller.http.health import OPEN_PATHS


class KeyGuard:
    """Asks for ``Authorization: Bearer KEY`` on every path that is not open."""

    def __init__(self, app: ASGIApp, *, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        response = error_response(
            "the API key is missing or wrong; send 'Authorization: Bearer KEY'",
            status=401,
            headers={"WWW-Authenticate": "Bearer"},
        )
        await response(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


class BodyGuard:
    """Stops reading a body that no prompt of ``max_model_len`` tokens needs: 413."""

    def __init__(self, app: ASGIApp, *, max_model_len: int) -> None:
        self._app = app
        self._max_bytes = max_body_bytes(max_model_len)
        self._message = (
            f"the body is larger than {self._max_bytes} bytes, which no prompt of the model's "
            f"{max_model_len} tokens needs; shorten it"
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = 0

        async def bounded_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise HTTPException(413, self._message)
            return message

        await self._app(scope, bounded_receive if scope["type"] == "http" else receive, send)
