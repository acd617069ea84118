"""Counters of the engine, carried over its restarts."""

from __future__ import annotations

from dataclasses import replace

from sparsed.core import EngineStats

COUNTERS = (
    "steps",
    "step_s",
    "prompt_tokens",
    "generated_tokens",
    "requests_finished",
    "hot_hits",
    "hot_misses",
    "evicted_pages",
    "overflow_pages",
    "h2d_bytes",
    "h2d_s",
    "d2h_bytes",
    "d2h_s",
    "recall_sum",
    "recall_samples",
    "verify_checked_pages",
    "verify_mismatches",
)


def advance(totals: EngineStats, *, before: EngineStats, now: EngineStats) -> EngineStats:
    """``totals`` grown by what was counted from ``before`` to ``now``; gauges are of ``now``.

    A counter that went back means a new engine: everything it has counted is growth, so totals
    only ever grow.
    """
    if has_restarted(before=before, now=now):
        before = EngineStats()
    grown = {
        name: getattr(totals, name) + getattr(now, name) - getattr(before, name)
        for name in COUNTERS
    }
    return replace(now, **grown)


def difference(before: EngineStats, *, now: EngineStats) -> EngineStats:
    """Growth of every counter between two totals; gauges are of ``now``."""
    growth = {name: getattr(now, name) - getattr(before, name) for name in COUNTERS}
    return replace(now, **growth)


def has_restarted(*, before: EngineStats, now: EngineStats) -> bool:
    return any(getattr(now, name) < getattr(before, name) for name in COUNTERS)
