"""The link between the tiers: every way of copying pages, against one large DMA of the same run.

Run from the root on a machine with a CUDA device: ``PYTHONPATH=benchmarks python
benchmarks/link.py``. It takes about a minute, 4 GiB of pinned memory and 1 GiB of the device.
Prints ratios to the contiguous DMA of the same direction, what matrix products beside a copy take
over their time alone, what the engine would choose, and the targets; ``--output`` writes all that
was measured. The rates are those of ``sparsed bench link``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from sparsed.controller.links import link_key
from sparsed.core import CalibrateLink, CopyPath, Direction, LinkCalibration, LinkEntry
from sparsed.engine.calibrate import calibrate_device
from sparsed.engine.kvcache.link_policy import RUN_TIME_PATHS, choose_copy
from sparsed.engine.link_plan import KIB
from sparsed.profiler.machine import read_machine

Cell = Callable[[LinkEntry], str]
TARGETS = (  # least ratio, pieces in KiB, most programs
    (0.90, (4, 8), 66),
    (0.92, (16, 32, 64), 32),
)
MAX_SLOWDOWN = 1.25


def ratio(found: LinkCalibration, entry: LinkEntry) -> float:
    """To the contiguous DMA of its direction."""
    whole = found.contiguous
    loads = entry.direction is Direction.H2D
    return entry.bytes_per_s / (whole.h2d_bytes_per_s if loads else whole.d2h_bytes_per_s)


def of_kernels(
    found: LinkCalibration, direction: Direction, *, tile_bytes: int
) -> dict[tuple[int, int], LinkEntry]:
    """By piece size and programs."""
    return {
        (e.piece_bytes, e.programs): e
        for e in found.entries
        if e.direction is direction and e.path is CopyPath.KERNEL and e.tile_bytes == tile_bytes
    }


def print_grid(title: str, entries: dict[tuple[int, int], LinkEntry], cell: Cell) -> None:
    sizes, programs = (sorted({key[i] for key in entries}) for i in (0, 1))
    print(f"\n{title}\n{'KiB':>6}" + "".join(f"{count:>9}" for count in programs) + "  programs")
    for size in sizes:
        cells = (entries.get((size, count)) for count in programs)
        print(f"{size // KIB:>6}" + "".join(f"{cell(e) if e else '-':>9}" for e in cells))


def print_others(found: LinkCalibration) -> None:
    print("\nother ways: ratio (slowdown of products beside)")
    for entry in found.entries:
        if entry.path is not CopyPath.KERNEL:
            beside = "" if entry.slowdown is None else f" ({entry.slowdown:.3f})"
            print(
                f"  {entry.direction} {entry.piece_bytes // KIB:>5} KiB {entry.path:<12}"
                f"{ratio(found, entry):.3f}{beside}"
            )


def choices(found: LinkCalibration) -> Iterable[LinkEntry]:
    """What the engine takes for each size that was measured."""
    for direction, size in dict.fromkeys((e.direction, e.piece_bytes) for e in found.entries):
        entry = choose_copy(
            found, direction=direction, piece_bytes=size, paths=RUN_TIME_PATHS[direction]
        )
        if entry is not None:
            yield entry


def check_targets(found: LinkCalibration) -> dict[str, bool]:
    """Each target in words, and whether it is met."""
    met = {}
    loads = [e for e in found.entries if (e.direction, e.path) == (Direction.H2D, CopyPath.KERNEL)]
    for least, sizes_kib, most_programs in TARGETS:
        for size_kib in sizes_kib:
            rates = [
                ratio(found, e)
                for e in loads
                if e.piece_bytes == size_kib * KIB and e.programs <= most_programs
            ]
            if rates:
                words = f"load {size_kib} KiB, <= {most_programs} programs: {max(rates):.3f}"
                met[f"{words} >= {least}"] = max(rates) >= least
    for entry in choices(found):
        if entry.direction is Direction.H2D and entry.slowdown is not None:
            words = f"beside products, {entry.piece_bytes // KIB} KiB as chosen"
            met[f"{words}: {entry.slowdown:.3f} <= {MAX_SLOWDOWN}"] = entry.slowdown <= MAX_SLOWDOWN
    return met


def report(found: LinkCalibration) -> None:
    whole = found.contiguous
    print(f"{found.key}")
    print(
        f"one DMA: h2d {whole.h2d_bytes_per_s / 1e9:.2f}, d2h {whole.d2h_bytes_per_s / 1e9:.2f} GB/s"
    )
    for direction in Direction:
        tiles = sorted({e.tile_bytes for e in found.entries if e.direction is direction} - {0})
        for tile_bytes in tiles:
            grid = of_kernels(found, direction, tile_bytes=tile_bytes)
            name = f"{direction} by kernel, tile {tile_bytes // KIB} KiB"
            print_grid(f"{name}: ratio", grid, lambda e: f"{ratio(found, e):.3f}")
            print_grid(
                f"{name}: products beside",
                grid,
                lambda e: f"{e.slowdown:.3f}" if e.slowdown else "-",
            )
    print_others(found)
    print("\nchosen")
    for e in choices(found):
        print(
            f"  {e.direction} {e.piece_bytes // KIB:>5} KiB: {e.path}, {e.programs} programs, tile "
            f"{e.tile_bytes // KIB} KiB, ratio {ratio(found, e):.3f}, beside {e.slowdown or 0:.3f}"
        )
    print()
    for words, is_met in check_targets(found).items():
        print(f"{'ok  ' if is_met else 'MISS'} {words}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes-kib", type=int, nargs="*", default=[], help="default: 4 to 64")
    parser.add_argument("--quick", action="store_true", help="only what an engine would try")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    wanted = CalibrateLink(
        device=options.device,
        key=link_key(read_machine(gpu_index=int(options.device.partition(":")[2] or 0))),
        sizes_bytes=tuple(size * KIB for size in options.sizes_kib),
        quick=options.quick,
    )
    started_s = time.perf_counter()
    found = calibrate_device(wanted, on_progress=lambda _frac: None)
    seconds = time.perf_counter() - started_s
    report(found)
    print(f"{len(found.entries)} ways in {seconds:.1f} s")
    if options.output:
        from report import environment  # it needs more than a GPU host may have

        result = {
            "seconds": seconds,
            "targets": check_targets(found),
            "calibration": asdict(found),
        }
        options.output.write_text(json.dumps(environment() | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
