"""``sparsed bench link``: how fast pages can be copied between the tiers, measured and kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsed import __version__
from sparsed.controller.cli.output import (
    FormatOption,
    Output,
    complain,
    print_json,
    print_table,
)
from sparsed.controller.cli.progress import ProgressLine
from sparsed.controller.cli.session import find_state_dir
from sparsed.core import InputError

if TYPE_CHECKING:
    from sparsed.core import LinkCalibration

KIB = 1 << 10
MIN_SIZE_KIB, MAX_SIZE_KIB = 1, 1024
HEADERS = ("", "piece", "way", "programs", "tile", "GB/s", "of {whole}", "work beside")
LARGE_COPY = {True: "one DMA", False: "one memory copy"}  # over a link, on a CPU


def link(
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
    ] = "auto",
    sizes: Annotated[
        str,
        typer.Option(
            metavar="KIB,KIB", help="Sizes of the pieces in KiB, powers of two. Default: 4 to 64."
        ),
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Only the ways that an engine would take.")
    ] = False,
    state_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="State directory that the calibration is kept in."),
    ] = None,
    format: FormatOption = Output.TEXT,
) -> None:
    """Measure how fast pages cross the link between GPU and memory, and keep the result.

    On a CPU there is no link: copies in memory are measured, and nothing is kept.
    Owns the GPU while it runs: not beside a daemon of the same state directory.
    """
    from sparsed.controller.bench.link import calibrate_link

    calibration, is_kept, fault = calibrate_link(
        device,
        sizes_bytes=parse_sizes(sizes),
        quick=quick,
        state_dir=find_state_dir(state_dir),
        on_progress=ProgressLine(only_terminal=format is Output.JSON),
    )
    if format is Output.JSON:
        print_json({"sparsed": __version__, **asdict(calibration)})
    else:
        whole = LARGE_COPY[is_kept or fault is not None]
        headers = [header.format(whole=whole) for header in HEADERS]
        print_table(headers, _rows(calibration, whole=whole))
    if fault is not None:
        raise fault
    if not is_kept:
        complain("nothing is kept for a CPU")


def parse_sizes(text: str) -> tuple[int, ...]:
    """Bytes from a list of KiB; InputError unless all are powers of two within bounds."""
    sizes = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        size = int(part) if part.isdigit() else 0
        if not MIN_SIZE_KIB <= size <= MAX_SIZE_KIB or size & (size - 1):
            raise InputError(
                f"--sizes {part!r}: allowed are powers of two from {MIN_SIZE_KIB} to "
                f"{MAX_SIZE_KIB}, in KiB, with commas between them",
                field="sizes",
            )
        sizes.append(size * KIB)
    return tuple(dict.fromkeys(sizes))


def _rows(calibration: LinkCalibration, *, whole: str) -> Iterator[tuple[object, ...]]:
    """The best of each way, and a star at what an engine would take."""
    from sparsed.controller.bench.link import best_of_each_way
    from sparsed.core import Direction

    contiguous = calibration.contiguous
    rates = {
        Direction.H2D: contiguous.h2d_bytes_per_s,
        Direction.D2H: contiguous.d2h_bytes_per_s,
    }
    for direction, rate in rates.items():
        yield direction, "whole", whole, None, None, f"{rate / 1e9:.2f}", "1.00", None
    for entry, chosen in best_of_each_way(calibration):
        yield (
            f"{entry.direction}{' *' if chosen else ''}",
            f"{entry.piece_bytes / KIB:g} KiB",
            entry.path,
            entry.programs or None,
            f"{entry.tile_bytes / KIB:g} KiB" if entry.tile_bytes else None,
            f"{entry.bytes_per_s / 1e9:.2f}",
            f"{entry.bytes_per_s / rates[entry.direction]:.2f}",
            None if entry.slowdown is None else f"{entry.slowdown:.3f}x",
        )
