"""The best pages of one lane without a sort: by search for the lowest score that is selected.

Scores are compared as integers, keys; ``keys`` is a tuple of pieces, one after the other, with -1
for what is no page.

Shape legend: W pages of a piece, K selected pages, X any.
"""

import triton
import triton.language as tl

from sparsed.kernels.reference_select import SMALLEST_SCORE

_SMALLEST = tl.constexpr(SMALLEST_SCORE)
_SMALLEST_BITS = tl.constexpr((127 - 40) << 23)  # of that float32
_FORCED = tl.constexpr(2**31 - 1)  # key of a page that is always selected
_SLACK = tl.constexpr(1.01)  # far more than the rounding of a sum of probabilities
_COUNT_BITS = tl.constexpr(20)  # three counts share 64 bits
_COUNT_MASK = tl.constexpr((1 << 20) - 1)


@triton.jit
def _key(score_X: tl.tensor) -> tl.tensor:
    """An integer in the order of the scores, 0 for those that count as 0."""
    bits_X = score_X.to(tl.int32, bitcast=True)
    return tl.where(score_X >= _SMALLEST, bits_X - (_SMALLEST_BITS - 1), 0)


@triton.jit
def page_keys(
    score_W: tl.tensor,
    id_W: tl.tensor,
    num_full: tl.tensor,
    sink_pages: tl.int32,
    first_recent: tl.tensor,
) -> tl.tensor:
    """Keys with the forced pages above all others, and -1 for what is no page."""
    forced_W = (id_W < sink_pages) | (id_W >= first_recent)
    key_W = tl.where(forced_W, _FORCED, _key(score_W))
    return tl.where(id_W < num_full, key_W, -1)


@triton.jit
def find_threshold(
    keys: tl.tuple,
    count: tl.tensor,
    num_full: tl.tensor,
    num_forced: tl.tensor,
    GROUP: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The highest key that ``count`` pages reach, and how many reach it: more only where some have
    that very key.

    Every round cuts what is left into four. The weights of all pages add up to the group, so n
    pages of score s mean n * s <= GROUP: the search begins there.
    """
    need = count - num_forced
    low, reached = tl.where(need > 0, 0, _FORCED), tl.where(need > 0, num_full, num_forced)
    bound = _SLACK * GROUP / tl.maximum(need, 1).to(tl.float32)
    high = tl.where(need > 0, _key(bound), _FORCED)
    while (low < high) & (reached > count):
        step = ((high - low - 1) >> 2) + 1
        first, second = low + step, tl.minimum(low + step * 2, high)
        third = tl.minimum(second + step, high)
        found = _count_from(keys, first, second, third, PIECE, PIECES)
        for i in tl.static_range(3):
            least = first if i == 0 else (second if i == 1 else third)
            number = ((found >> (i * _COUNT_BITS)) & _COUNT_MASK).to(tl.int32)
            reached = tl.where(number >= count, number, reached)
            low = tl.where(number >= count, least, low)
            high = tl.where(number < count, tl.minimum(high, least - 1), high)
    return low, reached


@triton.jit
def _count_from(
    keys: tl.tuple,
    first: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
) -> tl.tensor:
    """How many keys reach each of three, in one number."""
    first_W = tl.zeros([PIECE], tl.int32)
    second_W, third_W = first_W, first_W
    for i in tl.static_range(PIECES):
        first_W += (keys[i] >= first).to(tl.int32)
        second_W += (keys[i] >= second).to(tl.int32)
        third_W += (keys[i] >= third).to(tl.int32)
    found_W = first_W.to(tl.int64) + (second_W.to(tl.int64) << _COUNT_BITS)
    return tl.sum(found_W + (third_W.to(tl.int64) << (2 * _COUNT_BITS)), axis=0)


@triton.jit
def write_ids(
    keys: tl.tuple,
    threshold: tl.tuple,
    count: tl.tensor,
    out_K: tl.tensor,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
) -> None:
    """Write the ids of ``count`` keys: those above the threshold, and the first of those on it."""
    last, reached = threshold
    if reached == count:
        _write_all(keys, last, out_K, PIECE, PIECES)
    else:
        _write_first(keys, last, count, out_K, PIECE, PIECES)


@triton.jit
def _write_all(
    keys: tl.tuple, last: tl.tensor, out_K: tl.tensor, PIECE: tl.constexpr, PIECES: tl.constexpr
) -> None:
    """Write the ids of all keys from ``last`` on, in the order of their places in a piece."""
    chosen_W = tl.zeros([PIECE], tl.int32)
    for i in tl.static_range(PIECES):
        chosen_W += (keys[i] >= last).to(tl.int32)
    place_W = tl.cumsum(chosen_W, axis=0) - chosen_W
    for i in tl.static_range(PIECES):
        is_chosen_W = keys[i] >= last
        tl.store(out_K + place_W, i * PIECE + tl.arange(0, PIECE), mask=is_chosen_W)
        place_W += is_chosen_W.to(tl.int32)


@triton.jit
def _write_first(
    keys: tl.tuple,
    last: tl.tensor,
    count: tl.tensor,
    out_K: tl.tensor,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
) -> None:
    """Write the ids of all keys above ``last``, and of the first at it, until there are ``count``."""
    above_W = tl.zeros([PIECE], tl.int32)
    for i in tl.static_range(PIECES):
        above_W += (keys[i] > last).to(tl.int32)
    num_last = count - tl.sum(above_W, axis=0)
    place, passed = count * 0, count * 0
    for i in tl.static_range(PIECES):
        is_last_W = (keys[i] == last).to(tl.int32)
        rank_W = passed + tl.cumsum(is_last_W, axis=0) - is_last_W
        is_chosen_W = ((keys[i] > last) | ((is_last_W > 0) & (rank_W < num_last))).to(tl.int32)
        place_W = place + tl.cumsum(is_chosen_W, axis=0) - is_chosen_W
        tl.store(out_K + place_W, i * PIECE + tl.arange(0, PIECE), mask=is_chosen_W > 0)
        passed += tl.sum(is_last_W, axis=0)
        place += tl.sum(is_chosen_W, axis=0)
