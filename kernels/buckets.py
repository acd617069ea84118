"""Bucketed LRU on the slots of one lane: classes of slots, and victims without a sort.

Shape legend: N slots of the arena (blocks of a lane), S slots of a lane (a tile of them), P pages
that get a slot, C classes.
"""

from typing import Final

import triton
import triton.language as tl

from sparsed.kernels.tables import FREE_STEP, LOCKED_STEP

WINDOW_STEPS: Final = 12
OLDEST_AGE: Final = 63
USED_CLASS: Final = OLDEST_AGE + 1
NUM_CLASSES: Final = 128  # a power of two

_FREE_STEP = tl.constexpr(FREE_STEP)
_LOCKED_STEP = tl.constexpr(LOCKED_STEP)
_OLDEST_AGE = tl.constexpr(OLDEST_AGE)
_USED_CLASS = tl.constexpr(USED_CLASS)
_FIRST_RECENT_CLASS = tl.constexpr(USED_CLASS - WINDOW_STEPS + 1)
_CLASSES = tl.constexpr(NUM_CLASSES)


@triton.jit
def _slots(
    start: tl.tensor,
    blocks_N: tl.tensor,
    num_slots: tl.tensor,
    block_pages: tl.tensor,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The slots ``start`` and on of a lane, and whether they are."""
    s = start + tl.arange(0, TILE)
    block_S = tl.load(blocks_N + s // block_pages, mask=s < num_slots, other=0)
    return block_S * block_pages + s % block_pages, s < num_slots


@triton.jit
def warm_slots(
    slot_page_N: tl.tensor,
    slots: tl.tuple,
    TILE: tl.constexpr,
) -> None:
    """Have the slots come near while the pages are looked up; volatile, or it would be dropped."""
    blocks_N, num_slots, slot_step_N, _, block_pages = slots
    for start in range(0, num_slots, TILE):
        slot_S, is_slot_S = _slots(start, blocks_N, num_slots, block_pages, TILE)
        tl.load(slot_step_N + slot_S, mask=is_slot_S, volatile=True)
        tl.load(slot_page_N + slot_S, mask=is_slot_S, volatile=True)


@triton.jit
def _classes(
    slot_S: tl.tensor, is_slot_S: tl.tensor, slot_step_N: tl.tensor, step: tl.tensor
) -> tl.tensor:
    step_S = tl.load(slot_step_N + slot_S, mask=is_slot_S, other=_LOCKED_STEP)
    age_S = tl.maximum(tl.minimum(step - step_S, _OLDEST_AGE), -1)
    return tl.where(step_S == _FREE_STEP, 0, _USED_CLASS - age_S)


@triton.jit
def count_classes(slots: tl.tuple, TILE: tl.constexpr) -> tl.tensor:
    """How many slots of the lane there are of each class."""
    blocks_N, num_slots, slot_step_N, step, block_pages = slots
    count_C = tl.zeros([_CLASSES], tl.int32)
    for start in range(0, num_slots, TILE):
        slot_S, is_slot_S = _slots(start, blocks_N, num_slots, block_pages, TILE)
        count_C += tl.histogram(_classes(slot_S, is_slot_S, slot_step_N, step), _CLASSES)
    return count_C


@triton.jit
def slots_between(count_C: tl.tensor, first: tl.constexpr, last: tl.constexpr) -> tl.tensor:
    """Slots of the classes from ``first`` to before ``last``."""
    c = tl.arange(0, _CLASSES)
    return tl.sum(tl.where((c >= first) & (c < last), count_C, 0), 0)


@triton.jit
def give_away(
    count_C: tl.tensor,
    num_given: tl.tensor,
    victims_P: tl.tensor,
    slots: tl.tuple,
    TILE: tl.constexpr,
) -> None:
    """Write the slots to be given away: those of every class before the cut, then the first of
    the class that is cut, both in slot order."""
    blocks_N, num_slots, slot_step_N, step, block_pages = slots
    until_C = tl.cumsum(count_C, 0)
    place_C = (tl.arange(0, _CLASSES) + 1) << 16
    cut = tl.max(tl.where(until_C < num_given, place_C + until_C, 0), 0)
    cut, num_before = cut >> 16, cut & 0xFFFF
    passed = num_given * 0
    for start in range(0, num_slots, TILE):
        slot_S, is_slot_S = _slots(start, blocks_N, num_slots, block_pages, TILE)
        class_S = _classes(slot_S, is_slot_S, slot_step_N, step)
        both_S = ((class_S < cut).to(tl.int32) << 16) + (class_S == cut).to(tl.int32)
        rank_S = passed + tl.cumsum(both_S, 0) - both_S
        rank_S = tl.where(class_S < cut, rank_S >> 16, num_before + (rank_S & 0xFFFF))
        passed += tl.sum(both_S, 0)
        tl.store(victims_P + rank_S, slot_S, mask=(class_S <= cut) & (rank_S < num_given))


@triton.jit
def recent_slots(count_C: tl.tensor, num_given: tl.tensor) -> tl.tensor:
    """Slots in use for the last steps that were not given away now."""
    num_older = slots_between(count_C, 0, _FIRST_RECENT_CLASS)
    num_lost = tl.maximum(num_given - num_older, 0)
    return slots_between(count_C, _FIRST_RECENT_CLASS, _USED_CLASS + 1) - num_lost
