"""Which configuration is measured in which window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Slot(NamedTuple):
    """A window of a paired test. ``is_discarded``: it only washes out what the configuration
    before left in the caches, and counts for nothing."""

    pair: int
    is_candidate: bool
    is_discarded: bool


def paired_slots(num_pairs: int) -> Iterator[Slot]:
    """Incumbent A and candidate B as A B B A A B B A ..., which a steady drift favours neither in.

    A discarded window precedes every first one of a configuration that was not running.
    """
    running = None
    for pair in range(num_pairs):
        for is_candidate in (False, True) if pair % 2 == 0 else (True, False):
            if running is not is_candidate:
                yield Slot(pair, is_candidate, is_discarded=True)
            yield Slot(pair, is_candidate, is_discarded=False)
            running = is_candidate


def ranking_slots(num_configs: int, num_rounds: int) -> Iterator[tuple[int, int]]:
    """(round, number of the configuration): all of them in each round, every time another first."""
    for turn in range(num_rounds):
        for place in range(num_configs):
            yield turn, (turn + place) % num_configs
