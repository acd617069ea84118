"""A calibration of the link by a process that may load torch, kept in the state directory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Final, NamedTuple

import msgspec

from sparsed.controller.bench.process import Progress, run_measurement
from sparsed.controller.links import link_key
from sparsed.controller.startup import find_device
from sparsed.controller.state_dir import StateDir, StateLock
from sparsed.core import (
    CalibrateLink,
    CopyPath,
    Direction,
    ExitCode,
    LinkCalibration,
    LinkEntry,
    StartError,
)
from sparsed.db import open_store
from sparsed.db.store import LinkStore, StoreError
from sparsed.engine.kvcache.link_policy import RUN_TIME_PATHS, choose_copy, merge_calibrations

COMMAND: Final = (sys.executable, "-P", "-m", "sparsed.engine.calibrate")


class Calibrated(NamedTuple):
    """What was measured, and what came of keeping it: ``fault`` is why it could not be."""

    calibration: LinkCalibration
    is_kept: bool = False
    fault: StartError | None = None


def calibrate_link(
    device: str,
    *,
    sizes_bytes: tuple[int, ...],
    quick: bool,
    state_dir: StateDir,
    on_progress: Progress,
) -> Calibrated:
    """Measure, and on a GPU keep the result, with what is known of other sizes.

    Errors: InputError for a device that is not there; StartError, TEMPORARY beside a daemon of
    the same state directory, else as the measuring process says, or a database that cannot be
    opened. One that cannot be written is a ``fault`` of the result: it costs no measurement.
    """
    found, machine = find_device(device)
    key = None if found == "cpu" else link_key(machine)
    wanted = CalibrateLink(device=found, key=key, sizes_bytes=sizes_bytes, quick=quick)
    with StateLock(state_dir, verb="bench link"):
        if key is None:
            return Calibrated(run_calibration(wanted, on_progress=on_progress))
        with closing(open_store(state_dir.database)) as store:
            return _keep(store, run_calibration(wanted, on_progress=on_progress))


def _keep(store: LinkStore, found: LinkCalibration) -> Calibrated:
    try:
        merged = merge_calibrations(store.find_calibration(found.key), found)
        store.save_calibration(replace(merged, measured_at=found.measured_at))
    except StoreError as error:
        message = f"the calibration was measured but not kept: {error}"
        return Calibrated(found, fault=StartError(message, code=ExitCode.UNAVAILABLE))
    return Calibrated(found, is_kept=True)


def run_calibration(wanted: CalibrateLink, *, on_progress: Progress) -> LinkCalibration:
    """What the measuring process found, and when. StartError with its words, or with its exit
    status."""
    request = msgspec.json.encode(wanted)
    found = run_measurement(COMMAND, request, answer=LinkCalibration, on_progress=on_progress)
    return replace(found, measured_at=time.time())


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
