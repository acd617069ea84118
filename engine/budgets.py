"""Hot blocks of every request: mandatory ones, and buffering where it saves the most.

``Share`` counts blocks per lane; a rule gives each request its own. ``by_gain`` is what runs with
``hbm_budget`` auto; ``even`` and ``multiple_of`` stand beside it for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from sparsed.engine.hit_curve import MissCurve
from sparsed.engine.kvcache.quotas import round_blocks

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

HALVINGS: Final = 60
LEAST_CHANGE: Final = 1 / 8  # of its blocks, or a request is left as it is


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Bounds of one request in blocks per lane, ``least`` at least 1, and its misses by slots;
    ``slots_per_block``: of all lanes together."""

    least: int
    most: int
    curve: MissCurve
    slots_per_block: int


def by_gain(shares: Sequence[Share], num_blocks: int) -> list[int]:
    """Blocks per lane of each, ``num_blocks`` in all or as many as they can use, so that a further
    block would save as many misses in every request that is between its bounds.

    Misses are m (s / x)^e with x blocks, so a further one saves e m s^e x^-(e + 1): equal gains g
    have x = (e m s^e / g)^(1 / (e + 1)), and g follows from the sum.
    Errors: AssertionError if what they cannot go without is more than there is.
    Source: ours; the power law is that of ``kvcache.quotas``.
    """
    least_R, most_R = _bounds(shares, num_blocks)
    total = min(num_blocks, int(most_R.sum()))
    gain_R = np.array([_log_gain(share) for share in shares])
    fall_R = np.array([share.curve.exponent + 1 for share in shares])

    def blocks_at(gain: float) -> Floats:
        power_R = np.clip((gain_R - gain) / fall_R, -50.0, 50.0)
        clipped_R: Floats = np.clip(np.exp(power_R), least_R, most_R)
        return clipped_R

    ends_R = np.concatenate([gain_R - fall_R * np.log(bound) for bound in (least_R, most_R)])
    low, high = float(ends_R.min(initial=0.0)) - 1, float(ends_R.max(initial=0.0)) + 1
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if blocks_at(middle).sum() > total:
            low = middle
        else:
            high = middle
    return _whole(blocks_at(high), total, most_R)


def even(shares: Sequence[Share], num_blocks: int) -> list[int]:
    """The same for all, within their bounds."""
    least_R, most_R = _bounds(shares, num_blocks)
    total = min(num_blocks, int(most_R.sum()))
    low, high = 0.0, float(num_blocks)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if np.clip(middle, least_R, most_R).sum() > total:
            high = middle
        else:
            low = middle
    return _whole(np.clip(low, least_R, most_R), total, most_R)


def multiple_of(shares: Sequence[Share], num_blocks: int, *, residency: float) -> list[int]:
    """``residency`` times what each cannot go without, as far as the blocks reach: the oldest
    request first."""
    least_R, most_R = _bounds(shares, num_blocks)
    wanted_R = np.clip(np.floor(residency * least_R), least_R, most_R).astype(np.int64)
    left = num_blocks - int(least_R.sum())
    extra_R = wanted_R - least_R
    given_R = np.clip(left - (np.cumsum(extra_R) - extra_R), 0, extra_R)
    return [int(blocks) for blocks in least_R + given_R]


def is_worth_it(now: int, wanted: int) -> bool:
    """Whether to resize a request from ``now`` to ``wanted`` blocks: pages leave with blocks."""
    return abs(wanted - now) >= max(1.0, LEAST_CHANGE * now)


def _bounds(shares: Sequence[Share], num_blocks: int) -> tuple[Ints, Ints]:
    least_R = np.array([share.least for share in shares], dtype=np.int64)
    most_R = np.maximum(least_R, np.array([share.most for share in shares], dtype=np.int64))
    assert least_R.sum() <= num_blocks, "mandatory blocks do not fit"
    return least_R, most_R


def _log_gain(share: Share) -> float:
    """Logarithm of e m s^e, with s in blocks; of next to nothing where nothing is missed."""
    curve = share.curve
    blocks = max(curve.slots / share.slots_per_block, 1e-6)
    misses = max(curve.misses, 1e-9)
    return float(np.log(curve.exponent * misses) + curve.exponent * np.log(blocks))


def _whole(blocks_R: Floats, total: int, most_R: Ints) -> list[int]:
    """Whole numbers next to ``blocks``: a sum of clipped ones may miss ``total`` by a rounding."""
    short = total - int(np.floor(blocks_R).sum())
    assert 0 <= short <= len(blocks_R), "no such division"
    return [int(blocks) for blocks in round_blocks(blocks_R, total, most_R.astype(np.float64))]
