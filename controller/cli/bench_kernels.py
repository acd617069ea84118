"""``sparsed bench kernels``: how close every kernel comes to what the device can do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from sparsed.controller.cli.bench_engine import (
    KERNELS_FLAGS,
    MAX_BATCH,
    MAX_CONTEXT,
    BatchesOption,
    ContextsOption,
    FileOption,
    parse_counts,
    write_file,
)
from sparsed.controller.cli.flags import takes
from sparsed.controller.cli.output import FormatOption, Output, complain, print_json, print_table
from sparsed.controller.cli.progress import ProgressLine
from sparsed.controller.config import load_config
from sparsed.controller.writable import check_file
from sparsed.core import Ceiling

if TYPE_CHECKING:
    from sparsed.core import KernelReport

HEADERS = ("kernel", "inputs", "us", "rate", "ceiling", "ratio")
CEILINGS: Final = {
    Ceiling.COPY: "copy in device memory",
    Ceiling.H2D: "one DMA to the device",
    Ceiling.D2H: "one DMA from the device",
    Ceiling.MATMUL: "large product",
}


@takes(*KERNELS_FLAGS)
def kernels(
    batches: BatchesOption = "",
    contexts: ContextsOption = "",
    output: FileOption = None,
    format: FormatOption = Output.TEXT,
    **flags: str | bool | None,
) -> None:
    """Measure the kernels at the sizes of a model, each against a ceiling of the same run.

    Rates count bytes that must be moved, or floating-point operations. Inputs are random, and in
    all larger than a cache.

    Owns the device while it runs: not beside a daemon of the same state directory.
    """
    from sparsed.controller.bench.measure import bench_kernels

    check_file(output, option="output")
    report = bench_kernels(
        load_config(flags=flags, environment=os.environ),
        batches=parse_counts(batches, name="batches", maximum=MAX_BATCH),
        contexts=parse_counts(contexts, name="contexts", maximum=MAX_CONTEXT),
        on_progress=ProgressLine(only_terminal=format is Output.JSON),
    )
    if format is Output.JSON:
        print_json(report)
    else:
        print_table(HEADERS, _rows(report))
        print(f"{report.dtype} on {report.device_name}")
        if report.skipped:
            complain(f"left out, for want of memory or support: {', '.join(report.skipped)}")
    write_file(output, report)


def _rows(report: KernelReport) -> Iterator[tuple[object, ...]]:
    """The ceilings, then the kernels."""
    for ceiling, words in CEILINGS.items():
        yield words, None, None, _rate(report.ceilings[ceiling], ceiling), ceiling, "1.00"
    for speed in report.kernels:
        yield (
            speed.kernel,
            speed.case,
            None if speed.time_us is None else f"{speed.time_us:.1f}",
            _rate(speed.rate, speed.ceiling),
            speed.ceiling,
            f"{speed.ratio:.2f}",
        )


def _rate(rate: float, ceiling: Ceiling) -> str:
    if ceiling is Ceiling.MATMUL:
        return f"{rate / 1e12:.2f} TFLOP/s"
    return f"{rate / 1e9:.1f} GB/s"
