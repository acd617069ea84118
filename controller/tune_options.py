"""What ``sparsed tune`` was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsed.controller.config import DaemonConfig
from sparsed.controller.workload import load_workload
from sparsed.controller.writable import check_directory, check_file
from sparsed.core import InputError, Objective, SearchMethod, Workload
from sparsed.tuner.export import FORMAT_BY_SUFFIX


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneOptions:
    """``trials``: of each arm. ``trial_s``: seconds of one trial, None by the device.
    Knobs given in ``config`` are fixed; without ``config.slo.min_recall`` the floor is a little
    below the default's.
    ``resume``: the number of a study, or ``last``; None: begin one. ``output_dir``: for figures, a
    page and data.
    ``devices``: where trials are measured side by side, of one kind; empty: on that of ``config``.
    ``max_s``: seconds that everything together may take; None: as many as it needs."""

    config: DaemonConfig
    workload: str
    trials: int
    objective: Objective = Objective.THROUGHPUT
    method: SearchMethod = SearchMethod.CONSTRAINED
    export: Path | None = None
    output_dir: Path | None = None
    resume: str | None = None
    trial_s: float | None = None
    max_s: float | None = None
    devices: tuple[str, ...] = ()


def check_options(options: TuneOptions) -> Workload:
    """The workload as it was asked for; InputError before anything is started."""
    slo = options.config.slo
    if options.objective is Objective.GOODPUT and slo.ttft_s is None and slo.tpot_s is None:
        raise InputError(
            "goodput counts requests that meet their targets: give --slo-ttft-ms or --slo-tpot-ms",
            field="objective",
        )
    if options.config.selection_trace is not None:
        raise InputError(
            "trials of replayed selections say nothing about the model: drop selection_trace",
            field="selection_trace",
        )
    if options.export is not None and options.export.suffix not in FORMAT_BY_SUFFIX:
        known = ", ".join(FORMAT_BY_SUFFIX)
        raise InputError(f"--export {options.export}: end it in one of {known}", field="export")
    check_directory(options.output_dir, option="output-dir")
    check_file(options.export, option="export")
    return load_workload(options.workload)
