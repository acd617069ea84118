"""Which way to copy pieces of one size, read off a calibration. Pure; free of torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from sparsed.core import CopyPath, Direction, LinkCalibration, LinkEntry

GOOD_FRAC: Final = 0.97  # of the best idle rate: more programs than this takes buy nothing
MAX_SLOWDOWN: Final = 1.25  # of the work beside a load
SAVE_FRAC: Final = 0.25  # of the best idle rate is more than any prefill produces
SLOWDOWN_STEP: Final = 0.01  # differences below are noise
UNMEASURED: Final = 10.0  # a save that may disturb is not taken before one that does not
NEAR_FACTOR: Final = 1.5  # sizes that far apart behave alike

# What loads is known to the device alone, and a kernel reads it there.
RUN_TIME_PATHS: Final[Mapping[Direction, tuple[CopyPath, ...]]] = {
    Direction.H2D: (CopyPath.KERNEL,),
    Direction.D2H: (CopyPath.KERNEL, CopyPath.COPY_ENGINE, CopyPath.BATCHED, CopyPath.STAGED),
}


class CopyChoice(NamedTuple):
    """A way of copying; ``programs`` and ``tile_bytes`` are 0 where no kernel copies."""

    path: CopyPath
    programs: int
    tile_bytes: int


def choose_copy(
    calibration: LinkCalibration,
    *,
    direction: Direction,
    piece_bytes: int,
    paths: Collection[CopyPath],
) -> LinkEntry | None:
    """The best way among ``paths``; None if none of them was measured in this direction.

    Loads are waited for: the fewest programs near the best idle rate, of those that slow the work
    beside them within bounds. Saves have time: of those fast enough, what disturbs least. Sizes
    that were not measured follow the nearest one that was.
    """
    found = [e for e in calibration.entries if e.direction is direction and e.path in paths]
    if not found:
        return None
    nearest = min(found, key=lambda entry: _distance(entry.piece_bytes, piece_bytes)).piece_bytes
    sized = [entry for entry in found if entry.piece_bytes == nearest]
    return _of_loads(sized) if direction is Direction.H2D else _of_saves(sized)


def choose_load(
    calibration: LinkCalibration, *, piece_bytes: int, programs: int | None = None
) -> LinkEntry | None:
    """How a kernel loads: as ``choose_copy`` says, but with ``programs`` where they are given: what
    was measured of the number next to it. None if no such load was measured."""
    entry = choose_copy(
        calibration, direction=Direction.H2D, piece_bytes=piece_bytes, paths=(CopyPath.KERNEL,)
    )
    if entry is None or programs is None:
        return entry
    alike = (
        other
        for other in calibration.entries
        if _loads(other)
        and (other.piece_bytes, other.tile_bytes) == (entry.piece_bytes, entry.tile_bytes)
    )
    return min(alike, key=lambda other: abs(math.log(other.programs / programs)))


def _loads(entry: LinkEntry) -> bool:
    return entry.direction is Direction.H2D and entry.path is CopyPath.KERNEL


def covers(calibration: LinkCalibration, *, page_bytes: int) -> bool:
    """Whether loads of pages of about that size were measured."""
    return any(
        _loads(entry) and _distance(entry.piece_bytes, page_bytes) <= math.log(NEAR_FACTOR)
        for entry in calibration.entries
    )


def merge_calibrations(old: LinkCalibration | None, new: LinkCalibration) -> LinkCalibration:
    """``new`` with what only ``old`` has measured, if that was on the same link."""
    if old is None or old.key != new.key:
        return new
    measured = {_way(entry) for entry in new.entries}
    kept = tuple(entry for entry in old.entries if _way(entry) not in measured)
    return replace(new, entries=(*kept, *new.entries))


def _way(entry: LinkEntry) -> tuple[object, ...]:
    return entry.direction, entry.piece_bytes, entry.path, entry.programs, entry.tile_bytes


def _distance(measured_bytes: int, wanted_bytes: int) -> float:
    return abs(math.log(measured_bytes / wanted_bytes))


def _of_loads(entries: Sequence[LinkEntry]) -> LinkEntry:
    bounded = [entry for entry in entries if (entry.slowdown or 1.0) <= MAX_SLOWDOWN]
    bounded = bounded or [min(entries, key=lambda entry: entry.slowdown or 1.0)]
    good = max(entry.bytes_per_s for entry in entries) * GOOD_FRAC
    fast = [entry for entry in bounded if entry.bytes_per_s >= good]
    if not fast:
        return max(bounded, key=lambda entry: entry.bytes_per_s)
    return min(fast, key=lambda entry: (entry.programs, -entry.bytes_per_s))


def _of_saves(entries: Sequence[LinkEntry]) -> LinkEntry:
    enough = max(entry.bytes_per_s for entry in entries) * SAVE_FRAC
    fast = [entry for entry in entries if entry.bytes_per_s >= enough]
    return min(fast, key=_disturbance)


def _disturbance(entry: LinkEntry) -> tuple[float, int, float]:
    slowdown = max(1.0, entry.slowdown or UNMEASURED)
    return round(slowdown / SLOWDOWN_STEP), entry.programs, -entry.bytes_per_s
