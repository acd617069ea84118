"""The best pages of one lane without a sort: by bisection on the bits of their scores.

Two numbers name them: the lowest key that is selected, and how many of the pages that have it.

``keys`` is the tile itself where one tile holds all of them, else where they are read from; then
there are ``num_keys``, a multiple of what is read at once, -1 for what is no page.

Shape legend: P pages of a request, W pages of a tile, K selected pages, X any.
"""

import triton
import triton.language as tl

from sparsed.kernels.reference_select import SMALLEST_SCORE

_SMALLEST = tl.constexpr(SMALLEST_SCORE)
_SMALLEST_BITS = tl.constexpr((127 - 40) << 23)  # of that float32
_FORCED = tl.constexpr(2**31 - 1)  # key of a page that is always selected
_SLACK = tl.constexpr(1.01)  # far more than the rounding of a sum of probabilities


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
def bisect(
    keys: tl.tensor,
    num_keys: tl.tensor,
    count: tl.tensor,
    num_forced: tl.tensor,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The lowest key that is selected, and how many pages of that key at most.

    It is the highest key that ``count`` pages reach. The weights of all pages add up to the group,
    so n pages of score s mean n * s <= GROUP: the search begins there.
    """
    need = count - num_forced
    low = tl.where(need > 0, 0, _FORCED)
    bound = _SLACK * GROUP / tl.maximum(need, 1).to(tl.float32)
    high = tl.where(need > 0, _key(bound), _FORCED)
    above = count * 0  # pages above ``high``, once it has fallen: before, no page is on it
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        found = _count_from(keys, middle, num_keys, TILE, ONE_TILE)
        above = tl.where(found < count, found, above)
        low = tl.where(found < count, low, middle)
        # Exactly as many as are wanted: done, there is nothing to cut.
        high = tl.where(found < count, middle - 1, tl.where(found == count, middle, high))
    return low, count - above


@triton.jit
def _load_keys(
    keys_P: tl.tensor, start: tl.int32, num_keys: tl.tensor, TILE: tl.constexpr
) -> tl.tensor:
    id_W = start + tl.arange(0, TILE)
    return tl.load(keys_P + id_W, mask=id_W < num_keys, other=-1)


@triton.jit
def _count_from(
    keys: tl.tensor,
    least: tl.tensor,
    num_keys: tl.tensor,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
) -> tl.tensor:
    """How many keys are ``least`` or more."""
    if ONE_TILE:
        found_W = (keys >= least).to(tl.int32)
    else:
        found_W = tl.zeros([TILE], tl.int32)
        for start in range(0, num_keys, TILE):
            found_W += (_load_keys(keys, start, num_keys, TILE) >= least).to(tl.int32)
    return tl.sum(found_W, axis=0)


@triton.jit
def write_ids(
    keys: tl.tensor,
    num_keys: tl.tensor,
    last_key: tl.tensor,
    num_last: tl.tensor,
    out_K: tl.tensor,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
) -> None:
    """Write the ids of all keys above ``last_key`` and of the first ``num_last`` keys at it."""
    if ONE_TILE:
        _write_tile(keys, 0, last_key, num_last, num_keys * 0, num_keys * 0, out_K, TILE)
    else:
        above = num_keys * 0
        equal = num_keys * 0
        for start in range(0, num_keys, TILE):
            key_W = _load_keys(keys, start, num_keys, TILE)
            above, equal = _write_tile(key_W, start, last_key, num_last, above, equal, out_K, TILE)


@triton.jit
def _write_tile(
    key_W: tl.tensor,
    start: tl.int32,
    last_key: tl.tensor,
    num_last: tl.tensor,
    above: tl.tensor,
    equal: tl.tensor,
    out_K: tl.tensor,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Write the selected ids of a tile; return how many keys above and at the last one so far."""
    # Two counts in a word, so that one scan numbers both.
    both_W = (key_W > last_key).to(tl.int32) + ((key_W == last_key).to(tl.int32) << 16)
    before_W = tl.cumsum(both_W, axis=0) - both_W
    above_W, equal_W = above + (before_W & 0xFFFF), equal + (before_W >> 16)
    chosen_W = (key_W > last_key) | ((key_W == last_key) & (equal_W < num_last))
    place_W = above_W + tl.minimum(equal_W, num_last)
    tl.store(out_K + place_W, start + tl.arange(0, TILE), mask=chosen_W)
    total = tl.sum(both_W, axis=0)
    return above + (total & 0xFFFF), equal + (total >> 16)
