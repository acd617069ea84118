"""``sparsed bench decode``: what a decode step takes, and how much of it could be less."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sparsed.controller.cli.bench_engine import (
    DECODE_FLAGS,
    MAX_BATCH,
    MAX_CONTEXT,
    BatchesOption,
    ContextsOption,
    FileOption,
    parse_counts,
    write_file,
)
from sparsed.controller.cli.flags import takes
from sparsed.controller.cli.output import (
    FormatOption,
    Output,
    complain,
    gib,
    print_json,
    print_table,
)
from sparsed.controller.cli.progress import ProgressLine
from sparsed.controller.config import load_config
from sparsed.controller.writable import check_file

if TYPE_CHECKING:
    from sparsed.core import DecodeReport

HEADERS = (
    "requests",
    "tokens",
    "step ms",
    "graph ms",
    "not hidden ms",
    "read",
    "floor ms",
    "step / floor",
    "tokens/s",
)


@takes(*DECODE_FLAGS)
def decode(
    batches: BatchesOption = "",
    contexts: ContextsOption = "",
    output: FileOption = None,
    format: FormatOption = Output.TEXT,
    **flags: str | bool | None,
) -> None:
    """Measure decode steps of a real engine, for every batch of every context.

    Step: with everything the host does. Graph: the captured step replayed alone; what is beyond it
    was not hidden. Floor: what a step must read, at the rate of a plain copy in the device's memory.

    Owns the device while it runs: not beside a daemon of the same state directory.
    """
    from sparsed.controller.bench.measure import bench_decode

    check_file(output, option="output")
    report = bench_decode(
        load_config(flags=flags, environment=os.environ),
        batches=parse_counts(batches, name="batches", maximum=MAX_BATCH),
        contexts=parse_counts(contexts, name="contexts", maximum=MAX_CONTEXT),
        on_progress=ProgressLine(only_terminal=format is Output.JSON),
    )
    if format is Output.JSON:
        print_json(report)
    else:
        _print(report)
    write_file(output, report)


def _print(report: DecodeReport) -> None:
    print_table(HEADERS, _rows(report))
    method = report.knobs.sparse_method
    print(
        f"{report.model}, {report.dtype}, {method} on {report.device_name}; a copy in its memory: "
        f"{report.copy_bytes_per_s / 1e9:.1f} GB/s read and written"
    )
    if report.selection_trace:
        print(f"selections replayed from {report.selection_trace}")
    if report.skipped:
        words = ", ".join(f"{point.requests} x {point.tokens}" for point in report.skipped)
        complain(f"left out, for the tiers do not hold them at once: {words}")


def _rows(report: DecodeReport) -> Iterator[tuple[object, ...]]:
    for step in report.steps:
        yield (
            step.requests,
            step.tokens,
            f"{step.step_ms:.3f}",
            None if step.graph_ms is None else f"{step.graph_ms:.3f}",
            None if step.not_hidden_ms is None else f"{step.not_hidden_ms:.3f}",
            gib(step.read_bytes),
            f"{step.floor_ms:.3f}",
            f"{step.floor_ratio:.2f}",
            f"{step.tokens_per_s:.0f}",
        )
