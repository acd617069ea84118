"""The run of a benchmark verb: its progress, its files, its tables, its exit status."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from sparsed.controller.bench.plots import write_plots
from sparsed.controller.bench.report import (
    BenchReport,
    count_rows,
    latency_rows,
    remarks,
    to_plain,
    write_files,
)
from sparsed.controller.bench.serve import BenchOptions, bench_serve
from sparsed.controller.bench.summary import PERCENTILES
from sparsed.controller.cli.output import Output, complain, print_json, print_table
from sparsed.controller.cli.progress import ProgressLine
from sparsed.core import ExitCode, InputError

EXIT_INTERRUPTED: Final = 130  # as a shell reports Ctrl-C


def make_directory(directory: Path | None) -> None:
    """Before anything is measured, so that nothing is measured in vain; InputError."""
    try:
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--output-dir {directory}: {error.strerror}", field="output-dir"
        ) from None


def run_bench_serve(options: BenchOptions, *, directory: Path | None, output: Output) -> int:
    """Run, print, write to ``directory`` if there is one; the exit status. Errors as
    ``bench_serve``."""
    try:
        with asyncio.Runner() as runner:
            report = runner.run(
                bench_serve(options, progress=ProgressLine(only_terminal=output is Output.JSON))
            )
    except KeyboardInterrupt:
        complain("interrupted before anything was measured")
        return EXIT_INTERRUPTED
    _show(report, output=output)
    if directory is not None:
        _write(report, directory=directory, output=output)
    if report.result.is_interrupted:
        return EXIT_INTERRUPTED
    return ExitCode.OK if report.summary.num_complete else ExitCode.UNAVAILABLE


def _show(report: BenchReport, *, output: Output) -> None:
    if output is Output.JSON:
        print_json(to_plain(report))
    else:
        print_table(("result", ""), count_rows(report.summary))
        headers = ("ms", "mean", *(f"p{percentile}" for percentile in PERCENTILES), "max")
        print_table(headers, latency_rows(report.summary))
    for remark in remarks(report):
        complain(remark)


def _write(report: BenchReport, *, directory: Path, output: Output) -> None:
    try:
        paths = (*write_files(report, directory), *write_plots(report, directory))
    except OSError as error:
        raise InputError(f"--output-dir {directory}: {error}", field="output-dir") from error
    if output is Output.TEXT:
        print(*(f"wrote {path}" for path in paths), sep="\n")
