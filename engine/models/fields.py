"""Typed reading of a JSON object: each accessor checks and names the key it reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsed.core import InputError


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object whose keys may be absent or null; InputError names a key that is wrong."""

    values: Mapping[str, Any]

    def whole(self, key: str, *, default: int | None = None, minimum: int = 1) -> int:
        """A whole number of at least ``minimum``; required unless there is a default."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise InputError(f"{key} is missing", field="model")
        return _whole(key, value, minimum=minimum)

    def optional_whole(self, key: str, *, absent: int | None = None) -> int | None:
        """A whole number, None where the file says null, ``absent`` where it says nothing."""
        value = self.values.get(key, absent)
        return None if value is None else _whole(key, value, minimum=0)

    def number(self, key: str, *, default: float | None = None) -> float:
        """A finite number; required unless there is a default."""
        value = self.optional_number(key)
        if value is None:
            value = default
        if value is None:
            raise InputError(f"{key} is missing", field="model")
        return value

    def optional_number(self, key: str) -> float | None:
        """A finite number, or None."""
        value = self.values.get(key)
        if value is None:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise InputError(f"{key}={value!r} is no number", field="model")
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """True or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise InputError(f"{key}={value!r} is neither true nor false", field="model")
        return value

    def text(self, key: str, *, default: str) -> str:
        """A string."""
        value = self.values.get(key) or default
        if not isinstance(value, str):
            raise InputError(f"{key}={value!r} is no string", field="model")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them, as a tuple."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
            raise InputError(f"{key}={value!r} holds no token ids", field="model")
        return tuple(ids)


def _whole(key: str, value: object, *, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InputError(f"{key}={value!r} is no whole number from {minimum} up", field="model")
    return value
