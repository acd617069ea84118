"""A calibration of the link by a process that may load torch, kept in the state directory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Final

import msgspec

from sparsed.controller.bench.process import Progress, run_measurement
from sparsed.controller.links import keep_calibration, link_key
from sparsed.controller.startup import find_device
from sparsed.controller.state_dir import StateDir, StateLock
from sparsed.core import (
    CalibrateLink,
    CopyPath,
    Direction,
    LinkCalibration,
    LinkEntry,
)
from sparsed.db import open_store
from sparsed.engine.kvcache.link_policy import RUN_TIME_PATHS, choose_copy, merge_calibrations

COMMAND: Final = (sys.executable, "-P", "-m", "sparsed.engine.calibrate")


def calibrate_link(
    device: str,
    *,
    sizes_bytes: tuple[int, ...],
    quick: bool,
    state_dir: StateDir,
    on_progress: Progress,
) -> LinkCalibration:
    """Measure, and on a GPU keep the result, with what is known of other sizes.

    Errors: InputError for a device that is not there; StartError, TEMPORARY beside a daemon of
    the same state directory, else as the measuring process or the database says.
    """
    found, machine = find_device(device)
    key = None if found == "cpu" else link_key(machine)
    wanted = CalibrateLink(device=found, key=key, sizes_bytes=sizes_bytes, quick=quick)
    with StateLock(state_dir, verb="bench link"):
        calibration = run_calibration(wanted, on_progress=on_progress)
        if key is None:
            return calibration
        store = open_store(state_dir.database)
        try:
            merged = merge_calibrations(store.find_calibration(key), calibration)
            keep_calibration(store, merged)
        finally:
            store.close()
    return calibration


def run_calibration(wanted: CalibrateLink, *, on_progress: Progress) -> LinkCalibration:
    """What the measuring process found. StartError with its words, or with its exit status."""
    request = msgspec.json.encode(wanted)
    return run_measurement(COMMAND, request, answer=LinkCalibration, on_progress=on_progress)


def best_of_each_way(calibration: LinkCalibration) -> Iterator[tuple[LinkEntry, bool]]:
    """For every direction, size and path that was measured what the policy takes of it, and
    whether an engine would take it before all other paths."""
    places = dict.fromkeys((e.direction, e.piece_bytes) for e in calibration.entries)
    for direction, piece_bytes in places:
        chosen = _choose(calibration, direction, piece_bytes, RUN_TIME_PATHS[direction])
        for path in CopyPath:
            entry = _choose(calibration, direction, piece_bytes, (path,))
            if entry is not None and entry.piece_bytes == piece_bytes:
                yield entry, entry == chosen


def _choose(
    calibration: LinkCalibration,
    direction: Direction,
    piece_bytes: int,
    paths: tuple[CopyPath, ...],
) -> LinkEntry | None:
    return choose_copy(calibration, direction=direction, piece_bytes=piece_bytes, paths=paths)
