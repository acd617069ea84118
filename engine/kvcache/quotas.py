"""Blocks of a request divided among its lanes, by what each would gain of further ones.

Shape legend: L lanes.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MIN_KEPT: Final = 0.7  # of its blocks that a lane keeps in a round
MAX_GROWN: Final = 1.5  # times its blocks that it has after a round
_EXPONENTS: Final = (0.05, 20.0)  # of the slots, with which misses fall
_MOST_SHARED: Final = 0.9  # of a lane's slots that two steps in a row are taken to use
_HALVINGS: Final = 40


class Demand(NamedTuple):
    """What the lanes of a request did in ``num_steps`` steps that select: pages missed, and hits
    on pages not used in the step before, both (L,)."""

    misses_L: Ints
    returns_L: Ints
    num_steps: int

    def of(self, lanes: slice) -> Demand:
        """That of some lanes."""
        return Demand(self.misses_L[lanes], self.returns_L[lanes], self.num_steps)


def divide_blocks(
    demand: Demand,
    blocks_L: Ints,
    *,
    pages_per_block: int,
    selected_pages: int,
    least: int,
    most: int,
) -> Ints:
    """Blocks of every lane after a round, (L,), in all as many as before.

    Two points of the curve of a lane's misses are known: what it missed with its slots, and what
    it would have missed with those alone that two steps in a row use (one selection, and what is
    new in the next). Misses are taken to fall with a power of the slots, and blocks go where a
    further one saves the most.

    A lane keeps 70 % of its blocks and grows to 150 % of them at most. It is not brought below
    ``least`` nor above ``most``; beyond these already, it stays as it is or comes nearer.
    """
    slots_L: Floats = np.maximum(blocks_L * pages_per_block - 1.0, 1.0)  # the partial page has one
    misses_L = (
        demand.misses_L.astype(np.float64) + 1.0
    )  # none at all says little: the time was short
    exponent_L = fall_exponent(
        misses_L, misses_L + demand.returns_L, slots_L, selected_pages, num_steps=demand.num_steps
    )
    kept_L = np.maximum(np.ceil(MIN_KEPT * blocks_L), np.minimum(blocks_L, least))
    grown_L = np.minimum(np.floor(MAX_GROWN * blocks_L), np.maximum(blocks_L, most))
    gain_L = np.log(exponent_L * misses_L / slots_L)
    return _fill(gain_L, exponent_L + 1, blocks_L, (kept_L, grown_L))


def fall_exponent(
    misses_L: Floats, wanted_L: Floats, slots_L: Floats, selected_pages: float, *, num_steps: float
) -> Floats:
    """Power of its slots with which a lane's misses fall, (L,), from two points of its curve:
    ``misses`` with the ``slots`` it had, and ``wanted`` with those alone that two steps in a row
    use, both in ``num_steps`` steps."""
    shared_L = np.minimum(selected_pages + wanted_L / num_steps, _MOST_SHARED * slots_L)
    exponent_L = np.log(wanted_L / misses_L) / np.log(slots_L / shared_L)
    clipped_L: Floats = np.clip(exponent_L, *_EXPONENTS)
    return clipped_L


def _fill(gain_L: Floats, fall_L: Floats, blocks_L: Ints, bounds: tuple[Floats, Floats]) -> Ints:
    """As many blocks as before, within bounds, so that lanes between theirs gain the same.
    ``gain`` is the logarithm of what a lane gains of a further block, which falls with the power
    ``fall`` of its blocks."""
    kept_L, grown_L = bounds
    total = int(blocks_L.sum())
    log_L = np.log(np.maximum(blocks_L, 1))

    def blocks_at(gain: float) -> Floats:
        return np.clip(np.exp(log_L + (gain_L - gain) / fall_L), kept_L, grown_L)

    low = float((gain_L - fall_L * np.log(MAX_GROWN)).min())
    high = float((gain_L - fall_L * np.log(MIN_KEPT / 2)).max())
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if blocks_at(middle).sum() > total:
            low = middle
        else:
            high = middle
    return round_blocks(blocks_at(high), total, grown_L)


def round_blocks(blocks_L: Floats, total: int, most_L: Floats) -> Ints:
    """Whole numbers next to ``blocks``, ``total`` in all and none above ``most``."""
    whole_L = np.floor(blocks_L)
    order_L = np.argsort(-np.where(whole_L < most_L, blocks_L - whole_L, -1.0), kind="stable")
    whole_L[order_L[: total - int(whole_L.sum())]] += 1
    assert whole_L.sum() == total and (whole_L <= most_L).all()
    return whole_L.astype(np.int64)


def level(blocks_L: Ints, total: int, *, least: int, most: int) -> Ints:
    """``total`` blocks, every lane given or taken the same number (the first ones one more) unless
    that took it past ``least`` or ``most``. Equal lanes stay equal where the total allows it, and
    no lane changes the other way.

    Errors: AssertionError if so many do not fit between the bounds.
    """
    kept_L, grown_L = np.minimum(blocks_L, least), np.maximum(blocks_L, most)
    assert kept_L.sum() <= total <= grown_L.sum(), "no such division"
    low, high = -int(blocks_L.max()), most + 1
    while high - low > 1:
        middle = (low + high) // 2
        if np.clip(blocks_L + middle, kept_L, grown_L).sum() <= total:
            low = middle
        else:
            high = middle
    level_L = np.clip(blocks_L + low, kept_L, grown_L)
    next_L = np.clip(blocks_L + low + 1, kept_L, grown_L)
    level_L[np.flatnonzero(next_L > level_L)[: total - int(level_L.sum())]] += 1
    assert level_L.sum() == total
    return level_L
