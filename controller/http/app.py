"""The HTTP application: endpoints, guards and error bodies around one context."""

from __future__ import annotations

from fastapi import FastAPI

from sparsed.controller.http import chat, completions, health, models, tokens
from sparsed.controller.http.context import HttpContext
from sparsed.controller.http.errors import install_handlers
from sparsed.controller.http.guards import BodyGuard, KeyGuard


def create_app(context: HttpContext) -> FastAPI:
    """The application for one daemon; it starts nothing and keeps no state of its own."""
    app = FastAPI(
        title="sparsed",
        version=context.version,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.state.context = context
    for endpoints in (completions, chat, models, tokens, health):
        app.include_router(endpoints.router)
    install_handlers(app)
    app.add_middleware(BodyGuard, max_model_len=context.max_model_len)
    if context.api_key is not None:
        app.add_middleware(KeyGuard, api_key=context.api_key)
    return app
