"""GET /health, /ready, /version and /metrics: open to probes, without a key."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from sparsed.controller.control import DaemonState
from sparsed.controller.http.context import Context

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"})
READY_STATES = frozenset({DaemonState.SERVING, DaemonState.DEGRADED})
RETRY_AFTER_S = 5

router = APIRouter()


@router.get("/health")
async def health(context: Context) -> Response:
    """200 while the daemon can come to serve without help, 503 once it has stopped."""
    state = context.state()
    return _state_response(state, good=state is not DaemonState.STOPPED)


@router.get("/ready")
async def ready(context: Context) -> Response:
    """200 while new requests are taken, else 503."""
    state = context.state()
    return _state_response(state, good=state in READY_STATES)


@router.get("/version")
async def version(context: Context) -> dict[str, str]:
    return {"version": context.version}


@router.get("/metrics")
async def metrics(context: Context) -> Response:
    """Prometheus text."""
    return Response(context.metrics(), media_type=CONTENT_TYPE_LATEST)


def _state_response(state: DaemonState, *, good: bool) -> Response:
    return Response(
        msgspec.json.encode({"status": state}),
        status_code=200 if good else 503,
        media_type="application/json",
        headers=None if good else {"Retry-After": str(RETRY_AFTER_S)},
    )
