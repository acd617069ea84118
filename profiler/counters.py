"""Counters of the engine, carried over its restarts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from sparsed.core import CopyTotal, EngineStats, RefusalCount, WaitCount

ReasonT = TypeVar("ReasonT", WaitCount, RefusalCount)

COUNTERS = (
    "steps",
    "step_s",
    "prompt_tokens",
    "generated_tokens",
    "requests_finished",
    "hot_hits",
    "hot_misses",
    "foreseen_pages",
    "wasted_pages",
    "evicted_pages",
    "overflow_pages",
    "h2d_bytes",
    "h2d_s",
    "d2h_bytes",
    "d2h_s",
    "exposed_s",
    "timed_steps",
    "recall_sum",
    "recall_samples",
    "verify_checked_pages",
    "verify_mismatches",
    "spills",
    "restores",
    "quality_raises",
    "quality_dense",
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
    return replace(
        now,
        **grown,
        copies=_combined((totals.copies, 1), (now.copies, 1), (before.copies, -1)),
        waits=_counted((totals.waits, 1), (now.waits, 1), (before.waits, -1)),
        refusals=_counted((totals.refusals, 1), (now.refusals, 1), (before.refusals, -1)),
    )


def difference(before: EngineStats, *, now: EngineStats) -> EngineStats:
    """Growth of every counter between two totals; gauges are of ``now``."""
    growth = {name: getattr(now, name) - getattr(before, name) for name in COUNTERS}
    return replace(
        now,
        **growth,
        copies=_combined((now.copies, 1), (before.copies, -1)),
        waits=_counted((now.waits, 1), (before.waits, -1)),
        refusals=_counted((now.refusals, 1), (before.refusals, -1)),
    )


def _counted(*terms: tuple[Sequence[ReasonT], int]) -> tuple[ReasonT, ...]:
    """Counts of each reason added up, each list as often as its factor says."""
    found: dict[str, ReasonT] = {}
    for counts, factor in terms:
        for item in counts:
            known = found[item.reason].count if item.reason in found else 0
            found[item.reason] = replace(item, count=known + factor * item.count)
    return tuple(found.values())


def _combined(*terms: tuple[Sequence[CopyTotal], int]) -> tuple[CopyTotal, ...]:
    """Copies of each kind added up, each list as often as its factor says."""
    found: dict[tuple[str, str], CopyTotal] = {}
    for copies, factor in terms:
        for item in copies:
            known = found.get((item.direction, item.path))
            found[item.direction, item.path] = replace(
                item,
                num_bytes=factor * item.num_bytes + (known.num_bytes if known else 0),
                seconds=factor * item.seconds + (known.seconds if known else 0.0),
            )
    return tuple(found.values())


def has_restarted(*, before: EngineStats, now: EngineStats) -> bool:
    return any(getattr(now, name) < getattr(before, name) for name in COUNTERS)
