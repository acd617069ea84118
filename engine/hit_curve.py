"""How many pages a request misses in a step, by the slots it has: known from two points.

Pages and slots are of all lanes of a request together; misses are of one step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from sparsed.engine.kvcache.quotas import fall_exponent

# Before anything is measured: 30, 13.4 and 6.7 % of a selection at once, twice and four times its
# slots (HiSparse, arXiv 2608.07009).
START_MISS_FRAC: Final = 0.3
START_EXPONENT: Final = 1.08
START_RATIO: Final = 2.0  # pages of the newest 12 steps per page of a selection: ours
LEARNING_RATE: Final = 0.1  # share of the newest request in what is learned


@dataclass(frozen=True, kw_only=True, slots=True)
class MissCurve:
    """``misses`` with ``slots``; they fall with the power ``exponent`` of the slots, are never more
    than ``selected`` and none where ``total`` pages, all of the request, have slots. With
    ``reads_all`` every page is read in every step, and those without a slot are missed."""

    slots: float
    misses: float
    exponent: float
    selected: float
    total: float
    reads_all: bool = False

    def at(self, slots: float) -> float:
        """Misses of a step with so many slots."""
        if slots >= self.total:
            return 0.0
        if self.reads_all:
            return self.total - slots
        if self.misses <= 0 or slots <= 0:
            return 0.0 if slots > 0 else self.selected
        log = math.log(self.misses) + self.exponent * (math.log(self.slots) - math.log(slots))
        return math.exp(min(log, math.log(max(self.selected, 1e-9))))


def measured_curve(
    *,
    slots: float,
    selected: float,
    total: float,
    misses: float,
    returns: float,
    num_steps: float,
) -> MissCurve:
    """The curve of a request that missed ``misses`` pages, and hit ``returns`` that the step before
    had not used, in ``num_steps`` steps."""
    known = np.array([misses + 1.0])  # none at all says little: the time was short
    exponent = fall_exponent(
        known, known + returns, np.array([slots]), selected, num_steps=num_steps
    )
    return MissCurve(
        slots=slots,
        misses=float(known[0]) / num_steps,
        exponent=float(exponent[0]),
        selected=selected,
        total=total,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """What the requests of this engine have shown on average, for those that have shown nothing
    yet. ``ratio``: of the working set (12 steps) to the selection; ``miss_frac``: of a selection
    with as many slots as it has pages."""

    ratio: float = START_RATIO
    miss_frac: float = START_MISS_FRAC

    def learn(self, *, ratio: float, curve: MissCurve) -> Learned:
        """With one request more; both are averages of logarithms."""
        at_once = curve.misses / curve.selected * (curve.slots / curve.selected) ** START_EXPONENT
        return replace(
            self,
            ratio=_drift(self.ratio, max(1.0, ratio)),
            miss_frac=_drift(self.miss_frac, min(max(at_once, 1e-3), 1.0)),
        )

    def curve(self, *, slots: float, selected: float, total: float) -> MissCurve:
        """Of a request that is like the others."""
        fraction = self.miss_frac * (selected / max(slots, 1.0)) ** START_EXPONENT
        return MissCurve(
            slots=max(slots, 1.0),
            misses=min(fraction, 1.0) * selected,
            exponent=START_EXPONENT,
            selected=selected,
            total=total,
        )

    def working_set(self, *, selected: float, total: float) -> float:
        """Pages that such a request uses in 12 steps."""
        return min(self.ratio * selected, total)


def _drift(old: float, new: float) -> float:
    return math.exp((1 - LEARNING_RATE) * math.log(old) + LEARNING_RATE * math.log(new))
