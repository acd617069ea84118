"""A calibration of the link by a process that may load torch, kept in the state directory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

import msgspec

from sparsed.controller.links import keep_calibration, link_key
from sparsed.controller.startup import find_device
from sparsed.controller.state_dir import StateDir, StateLock
from sparsed.core import (
    CalibrateLink,
    CopyPath,
    Direction,
    EngineFailed,
    ExitCode,
    LinkCalibration,
    LinkEntry,
    LoadProgress,
    StartError,
)
from sparsed.db import open_store
from sparsed.engine.kvcache.link_policy import RUN_TIME_PATHS, choose_copy, merge_calibrations

Progress = Callable[[str, float], None]

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
    with subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended already; its status says how
            process.stdin.write(msgspec.json.encode(wanted))
            process.stdin.close()
        for line in process.stdout:
            ((name, body),) = msgspec.json.decode(line, type=dict[str, msgspec.Raw]).items()
            match name:
                case "LoadProgress":
                    progress = msgspec.json.decode(body, type=LoadProgress)
                    on_progress(progress.phase, progress.frac)
                case "LinkCalibration":
                    return msgspec.json.decode(body, type=LinkCalibration)
                case "EngineFailed":
                    failure = msgspec.json.decode(body, type=EngineFailed)
                    raise StartError(failure.message, code=ExitCode(failure.exit_code))
    raise StartError(
        f"the measuring process ended with status {process.returncode}; its words are above",
        code=ExitCode.SOFTWARE,
    )


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
