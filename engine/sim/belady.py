"""Belady's choice, which no policy that must load what a step selects can beat.

Shape legend: S steps, L lanes, K selected pages, X any.
"""

from __future__ import annotations

import numpy as np

from sparsed.engine.sim.trace import Ints, Trace


def belady_hits(trace: Trace, capacity_L: Ints) -> Ints:
    """Pages of all lanes found in each step, (S,), if the page used furthest ahead gives way.

    A page is worth keeping from one use to the next alone. What a cache keeps is therefore told
    by how many pages it keeps for each step to come; when others than the selected pages exceed
    the slots left, those for the last steps go first. Source: L. A. Belady, "A study of
    replacement algorithms for a virtual-storage computer", IBM Systems Journal 5 (2), 1966.
    Errors: AssertionError if a lane cannot hold all its pages of a step.
    """
    num_steps, num_lanes = trace.num_steps, trace.num_lanes
    next_uses = _next_uses(trace)
    kept_LS = np.zeros((num_lanes, num_steps), dtype=np.int64)
    hits_S = np.zeros(num_steps, dtype=np.int64)
    for step in range(num_steps):
        hits_S[step] = kept_LS[:, step].sum()
        room_L1 = (capacity_L - trace.count(step))[:, None]
        assert room_L1.min() >= 0, "a lane selects more than it holds"
        later_LS = kept_LS[:, step + 1 :]
        upto_LS = np.minimum(later_LS.cumsum(axis=1), room_L1)
        later_LS[:] = np.diff(upto_LS, axis=1, prepend=0)
        next_X = next_uses[step]
        is_used_X = next_X < num_steps
        places_X = (trace.keys(step) // trace.num_pages * num_steps + next_X)[is_used_X]
        kept_LS += np.bincount(places_X, minlength=kept_LS.size).reshape(kept_LS.shape)
    return hits_S


def _next_uses(trace: Trace) -> list[Ints]:
    """Of each step, when each of its keys is used again; the number of steps if never."""
    next_X = np.full(trace.num_lanes * trace.num_pages, trace.num_steps)
    found = []
    for step in reversed(range(trace.num_steps)):
        keys_X = trace.keys(step)
        found.append(next_X[keys_X])
        next_X[keys_X] = step
    return found[::-1]
