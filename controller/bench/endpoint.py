"""The two interfaces of an OpenAI-compatible server that can be measured."""

from __future__ import annotations

from enum import StrEnum


class Endpoint(StrEnum):
    """Which one is used, and with it whether prompts are token ids or text."""

    COMPLETIONS = "completions"
    CHAT = "chat"

    @property
    def path(self) -> str:
        return "/v1/completions" if self is Endpoint.COMPLETIONS else "/v1/chat/completions"
