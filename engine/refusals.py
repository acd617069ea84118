"""Requests that the engine ended without a token, counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from sparsed.core import CapacityError, InputError, RefusalCount, RefusalReason

# Of a request that is too large, by the limit that says so.
_BY_LIMIT: Final[Mapping[str | None, RefusalReason]] = {
    "max_model_len": RefusalReason.TOO_LONG,
    "kv_dram_gib": RefusalReason.DRAM_TIER,
}


class Refusals:
    """Counts since the engine started."""

    def __init__(self) -> None:
        self._counts: Counter[RefusalReason] = Counter()

    def count(self, reason: RefusalReason) -> None:
        self._counts[reason] += 1

    def count_error(self, error: InputError) -> None:
        """Count what a check of the request has said."""
        is_large = isinstance(error, CapacityError)
        too_large = _BY_LIMIT.get(error.field, RefusalReason.DRAM_TIER)
        self.count(too_large if is_large else RefusalReason.INVALID)

    @property
    def counts(self) -> tuple[RefusalCount, ...]:
        """Of every reason that there was."""
        return tuple(
            RefusalCount(reason=reason, count=self._counts[reason])
            for reason in RefusalReason
            if reason in self._counts
        )
