"""A study of caches: every policy at every size, over recordings of one model.

Shape legend: S steps, L lanes, C capacities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import floor
from typing import NamedTuple

import numpy as np

from sparsed.core import (
    WARMUP_STEPS,
    WORST_FRAC,
    CachePolicy,
    CacheReport,
    CacheRow,
    CacheStudy,
    InputError,
    QuotaRule,
)
from sparsed.engine.evaluate.recording import Recording
from sparsed.engine.sim.quotas import divide_slots, hit_curves, pool_curves
from sparsed.engine.sim.replay import Loads, replay
from sparsed.engine.sim.trace import Ints, StepCounts, Trace, count_steps, trace_recording

Progress = Callable[[str, float], None]


class _Cache(NamedTuple):
    policy: CachePolicy
    quotas: QuotaRule
    residency: float
    capacity_L: Ints


class _Judge(NamedTuple):
    """What is common to all caches: the traces, what is counted of them, and the first step that counts."""

    traces: Sequence[Trace]
    counts: Sequence[StepCounts]
    first_steps: Sequence[int]


def simulate(
    recordings: Sequence[Recording], study: CacheStudy, *, on_progress: Progress
) -> CacheReport:
    """Pools the recordings, one or more; each is replayed by itself, through empty caches.

    The first 32 steps of a recording are not counted; with uneven quotas its first half is not,
    which they are learned from, of all recordings together.
    Errors: InputError naming what a recording is too short for, has no ranks for, or has with
    other lanes than the first.
    """
    _check_alike(recordings)
    first_steps = [_first_step(recording, study.quotas) for recording in recordings]
    traces = []
    for index, recording in enumerate(recordings):
        on_progress("selecting", index / len(recordings))
        traces.append(_trace(recording, study))
    judge = _Judge(traces, [count_steps(trace) for trace in traces], first_steps)
    _check_selected(judge)
    uneven = _uneven(judge, study) if study.quotas is QuotaRule.UNEVEN else {}
    caches = tuple(_caches(study, uneven, num_lanes=traces[0].num_lanes))
    rows = []
    for index, cache in enumerate(caches):
        on_progress("simulating", index / len(caches))
        rows.append(_row(judge, cache))
    on_progress("simulating", 1.0)
    return _report(judge, study, rows=tuple(rows), uneven=uneven)


def _check_alike(recordings: Sequence[Recording]) -> None:
    shapes = {
        (recording.ranked_SLR.shape[1], recording.header.num_kv_heads, recording.header.model)
        for recording in recordings
    }
    if len(shapes) > 1:
        words = ", ".join(f"{model} {lanes} lanes" for lanes, _, model in sorted(shapes))
        raise InputError(
            f"recordings of different models or lanes: {words}; give those of one model at a time",
            field="recordings",
        )


def _first_step(recording: Recording, quotas: QuotaRule) -> int:
    num_steps = len(recording.ranked_SLR)
    is_uneven = quotas is QuotaRule.UNEVEN
    least = 2 * (WARMUP_STEPS + 1) if is_uneven else WARMUP_STEPS + 1
    if num_steps < least:
        raise InputError(
            f"the recording of {recording.header.text!r} has {num_steps} steps, {quotas} quotas "
            f"need {least} or more; record more",
            field="quotas" if is_uneven else "recordings",
        )
    return num_steps // 2 if is_uneven else WARMUP_STEPS


def _trace(recording: Recording, study: CacheStudy) -> Trace:
    try:
        return trace_recording(
            recording,
            page_size=study.page_size,
            token_budget=study.token_budget,
            prefetch_pages=study.prefetch_pages,
        )
    except InputError as error:
        name = recording.header.text
        raise InputError(f"the recording of {name!r}: {error}", field=error.field) from None


def _check_selected(judge: _Judge) -> None:
    if not _counted(judge, [one.selected_S for one in judge.counts]).all():
        raise InputError(
            "a recording has steps that select no full page; take a smaller page_size, or record "
            "after more context",
            field="recordings",
        )


def _uneven(judge: _Judge, study: CacheStudy) -> dict[float, Ints]:
    """Slots of each lane by residency, from the steps before those that are counted."""
    hits_LC = pool_curves(
        [
            hit_curves(trace, range(WARMUP_STEPS, first))
            for trace, first in zip(judge.traces, judge.first_steps, strict=True)
        ]
    )
    num_lanes = len(hits_LC)
    return {
        residency: divide_slots(
            hits_LC,
            total=num_lanes * _slots(study, residency),
            least=study.selected_pages,
        )
        for residency in study.residencies
    }


def _slots(study: CacheStudy, residency: float) -> int:
    return floor(residency * study.selected_pages)


def _caches(study: CacheStudy, uneven: dict[float, Ints], *, num_lanes: int) -> Iterator[_Cache]:
    for residency in study.residencies:
        equal_L = np.full(num_lanes, _slots(study, residency), dtype=np.int64)
        for policy in study.policies:
            yield _Cache(policy, QuotaRule.EQUAL, residency, equal_L)
            if residency in uneven:
                yield _Cache(policy, QuotaRule.UNEVEN, residency, uneven[residency])


def _row(judge: _Judge, cache: _Cache) -> CacheRow:
    replays = [replay(t, cache.policy, capacity_L=cache.capacity_L) for t in judge.traces]
    loads = Loads(*(_counted(judge, counts) for counts in zip(*replays, strict=True)))
    selected_S = _counted(judge, [one.selected_S for one in judge.counts])
    selected = selected_S.sum()
    prefetched = loads.prefetched_S.sum()
    return CacheRow(
        policy=cache.policy,
        quotas=cache.quotas,
        residency=cache.residency,
        slots=int(cache.capacity_L.sum()),
        min_slots=int(cache.capacity_L.min()),
        max_slots=int(cache.capacity_L.max()),
        miss_frac=float(loads.missed_S.sum() / selected),
        worst_miss_frac=float(np.quantile(loads.missed_S / selected_S, 1 - WORST_FRAC)),
        prefetched_frac=float(prefetched / selected),
        used_frac=float(loads.used_S.sum() / prefetched) if prefetched else None,
    )


def _counted(judge: _Judge, counts: Sequence[Ints]) -> Ints:
    """The counted steps of all traces, one after the other."""
    return np.concatenate(
        [count_S[first:] for count_S, first in zip(counts, judge.first_steps, strict=True)]
    )


def _report(
    judge: _Judge, study: CacheStudy, *, rows: tuple[CacheRow, ...], uneven: dict[float, Ints]
) -> CacheReport:
    counts = StepCounts(*(_counted(judge, column) for column in zip(*judge.counts, strict=True)))
    selected = counts.selected_S.sum()
    num_lanes = judge.traces[0].num_lanes
    return CacheReport(
        study=study,
        num_lanes=num_lanes,
        num_steps=len(counts.selected_S),
        first_steps=tuple(judge.first_steps),
        mean_selected_pages=float(selected / len(counts.selected_S) / num_lanes),
        overlap_frac=float(counts.repeated_S.sum() / selected),
        window_ratio=float(counts.window_S.sum() / selected),
        first_touch_frac=float(counts.first_touch_S.sum() / selected),
        rows=rows,
        uneven_slots={f"{key:g}": tuple(slots.tolist()) for key, slots in uneven.items()},
    )
