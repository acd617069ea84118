"""Messages between the controller and the engine as bytes: msgpack, tagged by class name."""

from __future__ import annotations

from functools import cache
from typing import get_args

import msgspec

from sparsed.core import (
    AbortRequest,
    AddRequest,
    ApplyKnobs,
    EngineFailed,
    EngineReady,
    EngineSpec,
    EngineStats,
    Heartbeat,
    KnobsApplied,
    LoadProgress,
    Shutdown,
    TokenBatch,
)

ToEngine = EngineSpec | AddRequest | AbortRequest | ApplyKnobs | Shutdown
FromEngine = (
    LoadProgress | EngineReady | EngineFailed | TokenBatch | EngineStats | Heartbeat | KnobsApplied
)
Message = ToEngine | FromEngine

_TYPES: dict[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}
_ENVELOPE = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])


class WireError(ValueError):
    """Bytes that are no message of this version; the peer runs other code."""


def encode(message: Message) -> bytes:
    """The bytes of one message. Integers beyond 64 bits: OverflowError."""
    return msgspec.msgpack.encode((type(message).__name__, message))


def decode(data: bytes) -> Message:
    """The message in ``data``, equal to the one encoded. WireError on anything else."""
    try:
        tag, body = _ENVELOPE.decode(data)
        return _decoder(tag).decode(body)
    except msgspec.DecodeError as error:
        raise WireError(f"not a message: {error}") from error


@cache
def _decoder(tag: str) -> msgspec.msgpack.Decoder[Message]:
    if tag not in _TYPES:
        raise WireError(
            f"unknown message {tag!r}: the controller and the engine are of different versions"
        )
    return msgspec.msgpack.Decoder(_TYPES[tag])
