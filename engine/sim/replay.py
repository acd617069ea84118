"""A trace through one cache.

Shape legend: S steps, L lanes, X any.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sparsed.core import CachePolicy
from sparsed.engine.sim.belady import belady_hits
from sparsed.engine.sim.slots import Slots
from sparsed.engine.sim.trace import Ints, Trace

_NOT_AHEAD = -1


class Loads(NamedTuple):
    """Pages of all lanes by step, (S,)."""

    missed_S: Ints  # loaded on demand
    prefetched_S: Ints  # loaded after the step
    used_S: Ints  # of these, by the step of their load: selected before they were evicted


def replay(trace: Trace, policy: CachePolicy, *, capacity_L: Ints) -> Loads:
    """What a cache of so many slots a lane, empty at first, loads.

    After a step the pages ranked next are used as if they were selected: those not there are
    loaded, the best first, as far as there are slots without a page of the step. Belady has
    none of it: it stays the bound on what can be had without loads ahead.
    Errors: AssertionError if a lane cannot hold all its pages of a step.
    """
    if policy is CachePolicy.BELADY:
        selected_S = np.array([trace.count(step).sum() for step in range(trace.num_steps)])
        nothing_S = np.zeros_like(selected_S)
        return Loads(selected_S - belady_hits(trace, capacity_L), nothing_S, nothing_S)
    slots = Slots(
        capacity_L,
        num_pages=trace.num_pages,
        num_steps=trace.num_steps,
        exact=policy is CachePolicy.LRU,
    )
    return _replay(trace, slots, capacity_L=capacity_L)


def _replay(trace: Trace, slots: Slots, *, capacity_L: Ints) -> Loads:
    loads = Loads(*np.zeros((3, trace.num_steps), dtype=np.int64))
    ahead_since_X = np.full(trace.num_lanes * trace.num_pages, _NOT_AHEAD)
    for step in range(trace.num_steps):
        keys_X = trace.keys(step)
        is_hit_X = slots.bring(keys_X, step=step)
        loads.missed_S[step] = len(keys_X) - np.count_nonzero(is_hit_X)
        if not trace.ahead_SLM.shape[2]:
            continue
        since_X = ahead_since_X[keys_X]
        used_X = since_X[is_hit_X & (since_X != _NOT_AHEAD)]
        loads.used_S[:] += np.bincount(used_X, minlength=trace.num_steps)
        ahead_since_X[keys_X] = _NOT_AHEAD
        ahead_X = trace.keys_ahead(step, room_L=capacity_L - trace.count(step))
        loaded_X = ahead_X[~slots.bring(ahead_X, step=step)]
        ahead_since_X[loaded_X] = step
        loads.prefetched_S[step] = len(loaded_X)
    return loads
