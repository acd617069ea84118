"""Regimes and drift as ``sparsed tuner status`` and ``sparsed why`` tell them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sparsed.controller.cli.output import values_in_words

if TYPE_CHECKING:
    from sparsed.controller.control import LoadState
    from sparsed.core import Regime


def load_in_words(load: LoadState) -> Iterator[str]:
    """A line for each regime, the one in force marked, and one for what has drifted."""
    for regime in load.regimes:
        place = "regime"
        if regime.regime_id == load.current:
            place = "in regime" if load.is_settled else "leaving regime"
        yield f"{place} {regime.regime_id}: {regime.signature}: {_incumbent(regime)}"
    if load.current is None:
        yield "regime: none yet; the load is too small, or too new"
    if load.drift:
        yield f"drift: {load.drift}"


def _incumbent(regime: Regime) -> str:
    if not regime.incumbent:
        return "nothing verified, the last known good"
    return f"verified {values_in_words(dict(sorted(regime.incumbent.items())))}"
