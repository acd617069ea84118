"""Slots divided among lanes by what each has of a further one.

Shape legend: S steps, L lanes, C capacities from 0 up, X any.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sparsed.engine.sim.trace import Ints, Trace


class _Stretch(NamedTuple):
    """Further slots of a lane and the hits that each of them is worth."""

    gain: float
    num_slots: int
    lane: int


def hit_curves(trace: Trace, steps: range) -> Ints:
    """Hits of an exact LRU in those steps, empty before the trace, at every capacity from 0 to
    ``num_pages``: (L, C).

    A page is found if fewer others than there are slots were used after it; of one step, the page
    with the higher id is the later one. Steps after the last of ``steps`` are not looked at.
    Source: R. L. Mattson et al., "Evaluation techniques for storage hierarchies", 1970.
    """
    num_lanes, num_pages = trace.num_lanes, trace.num_pages
    pages_X = np.tile(np.arange(num_pages), num_lanes)
    # Sorted by lane, then by last use, then by page: a lane's pages stay where its keys are.
    spread = (trace.num_steps + 1) * num_pages
    order_X = np.repeat(np.arange(num_lanes), num_pages) * spread + pages_X
    is_seen_X = np.zeros(len(order_X), dtype=bool)
    found_LC = np.zeros((num_lanes, num_pages + 1), dtype=np.int64)
    for step in range(steps.stop):
        keys_X = trace.keys(step)
        lanes_X, in_lane_X = np.divmod(keys_X, num_pages)
        if step in steps:
            sorted_X = np.sort(order_X.reshape(num_lanes, num_pages), axis=1).reshape(-1)
            later_X = (lanes_X + 1) * num_pages - 1 - np.searchsorted(sorted_X, order_X[keys_X])
            places_X = (lanes_X * (num_pages + 1) + later_X + 1)[is_seen_X[keys_X]]
            found_LC += np.bincount(places_X, minlength=found_LC.size).reshape(found_LC.shape)
        order_X[keys_X] = lanes_X * spread + (step + 1) * num_pages + in_lane_X
        is_seen_X[keys_X] = True
    return found_LC.cumsum(axis=1)


def pool_curves(curves: Sequence[Ints]) -> Ints:
    """The sum of curves of the same lanes; each stays level after its last capacity."""
    most = max(curve_LC.shape[1] for curve_LC in curves)
    padded = [np.pad(c_LC, ((0, 0), (0, most - c_LC.shape[1])), mode="edge") for c_LC in curves]
    pooled_LC: Ints = np.sum(padded, axis=0)
    return pooled_LC


def divide_slots(hits_LC: Ints, *, total: int, least: int) -> Ints:
    """Slots of each lane, (L,), ``total`` in all, ``least`` or more in each: again and again the
    stretch of slots goes to the lane that has the most hits per slot of it.

    Never fewer hits on these curves than with equal slots: where stretches do not come out even
    it may be no better, and then slots are equal, as far as they can be.
    Errors: AssertionError if the total is less than the lanes need.
    """
    num_lanes = len(hits_LC)
    equal_L = _spread(total, num_lanes)
    slots_L = np.full(num_lanes, least, dtype=np.int64)
    left = total - least * num_lanes
    assert left >= 0, "fewer slots than the lanes select"
    stretches = [s for lane in range(num_lanes) for s in _stretches(hits_LC[lane], lane, least)]
    for stretch in sorted(stretches, key=lambda stretch: -stretch.gain):
        taken = min(stretch.num_slots, left)
        slots_L[stretch.lane] += taken
        left -= taken
    slots_L += _spread(left, num_lanes)
    return slots_L if _hits(hits_LC, slots_L) > _hits(hits_LC, equal_L) else equal_L


def _stretches(hits_C: Ints, lane: int, least: int) -> Iterator[_Stretch]:
    """Of the slots after the first ``least`` ones, each stretch as long as its gain per slot is
    the highest there is: the upper hull of the curve. Gains fall from one to the next."""
    at = least
    while at + 1 < len(hits_C):
        gain_X = (hits_C[at + 1 :] - hits_C[at]) / np.arange(1, len(hits_C) - at)
        best = len(gain_X) - 1 - int(gain_X[::-1].argmax())
        if gain_X[best] <= 0:
            return
        yield _Stretch(gain=float(gain_X[best]), num_slots=best + 1, lane=lane)
        at += best + 1


def _spread(total: int, num_lanes: int) -> Ints:
    each, more = divmod(total, num_lanes)
    return each + (np.arange(num_lanes) < more).astype(np.int64)


def _hits(hits_LC: Ints, slots_L: Ints) -> int:
    at_L = np.minimum(slots_L, hits_LC.shape[1] - 1)
    return int(hits_LC[np.arange(len(at_L)), at_L].sum())
