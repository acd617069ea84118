"""What kind of error ended the engine, by its type, else by how its message begins. Loads nothing of what raises it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from sparsed.core import FailureCause

# By name, for the module that defines one may be what failed to load.
_CAUSES: Final[Mapping[str, FailureCause]] = MappingProxyType(
    {
        "OutOfMemoryError": FailureCause.DEVICE_MEMORY,  # of torch's allocator on the device
        "MemoryError": FailureCause.HOST_MEMORY,
        "AcceleratorError": FailureCause.DEVICE,  # of torch, any call of the runtime
        "CudaError": FailureCause.DEVICE,
    }
)
# Errors that libraries raise as plain RuntimeErrors, by how their messages begin.
_PREFIXES: Final[Mapping[str, FailureCause]] = MappingProxyType(
    {
        "CUDA error: ": FailureCause.DEVICE,
        "Triton Error [CUDA]: ": FailureCause.DEVICE,
        "CUDA out of memory": FailureCause.DEVICE_MEMORY,
        "[enforce fail at alloc_cpu": FailureCause.HOST_MEMORY,
    }
)
_NO_MEMORY: Final = ("out of memory", "OUT_OF_MEMORY")  # the runtime's words, and the driver's


def cause_of(error: BaseException) -> FailureCause:
    """OTHER for whatever says nothing of memory or of the device."""
    cause = _by_type(error) or _by_message(error) or FailureCause.OTHER
    if cause is FailureCause.DEVICE and any(words in str(error) for words in _NO_MEMORY):
        return FailureCause.DEVICE_MEMORY
    return cause


def in_words(error: BaseException) -> str:
    """One line for the user."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


def _by_type(error: BaseException) -> FailureCause | None:
    names = (kind.__name__ for kind in type(error).__mro__)
    return next((_CAUSES[name] for name in names if name in _CAUSES), None)


def _by_message(error: BaseException) -> FailureCause | None:
    message = str(error)
    return next((cause for text, cause in _PREFIXES.items() if message.startswith(text)), None)
