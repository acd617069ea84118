"""Which ways of copying a calibration tries. Pure; free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from sparsed.core import CopyPath, Direction
from sparsed.engine.kvcache.link_policy import CopyChoice

KIB: Final = 1 << 10
PAGE_SIZES_BYTES: Final = (4 * KIB, 8 * KIB, 16 * KIB, 32 * KIB, 64 * KIB)
BLOCK_SIZES_BYTES: Final = (256 * KIB, 512 * KIB, 1024 * KIB)
LOAD_PROGRAMS: Final = (4, 8, 12, 16, 24, 32, 66, 132)
SAVE_PROGRAMS: Final = (2, 4, 8, 16, 32)
TILES_BYTES: Final = (16 * KIB, 32 * KIB, 64 * KIB)
QUICK_TILE_BYTES: Final = 32 * KIB
HOST_PATHS: Final = (CopyPath.COPY_ENGINE, CopyPath.BATCHED, CopyPath.STAGED)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkPoint:
    """One way of copying pieces of one size. ``beside``: measure it beside matrix products too."""

    direction: Direction
    piece_bytes: int
    choice: CopyChoice
    beside: bool


def full_plan(
    *,
    pages: Sequence[int] = PAGE_SIZES_BYTES,
    blocks: Sequence[int] = BLOCK_SIZES_BYTES,
    max_programs: int = LOAD_PROGRAMS[-1],
) -> tuple[LinkPoint, ...]:
    """Every way, for pages and for the larger pieces of prefill; ``max_programs``: more than the
    device has multiprocessors only wait for each other."""
    h2d, d2h = Direction.H2D, Direction.D2H
    points: list[LinkPoint] = []
    for size in pages:
        points += _by_kernel(h2d, size, LOAD_PROGRAMS, TILES_BYTES, max_programs)
        points += _by_host(h2d, size, beside=False)  # the device knows what to load, not the host
    for size in (*pages, *blocks):
        points += _by_kernel(d2h, size, SAVE_PROGRAMS, (QUICK_TILE_BYTES,), max_programs)
        points += _by_host(d2h, size, beside=True)
    return tuple(points)


def quick_plan(*, page_bytes: int, block_bytes: int, max_programs: int) -> tuple[LinkPoint, ...]:
    """What one model needs: loads and saves of its pages, and saves of its blocks."""
    tiles = (QUICK_TILE_BYTES,)
    d2h = Direction.D2H
    return (
        *_by_kernel(Direction.H2D, page_bytes, LOAD_PROGRAMS, tiles, max_programs),
        *_by_kernel(d2h, page_bytes, SAVE_PROGRAMS, tiles, max_programs),
        *_by_kernel(d2h, block_bytes, SAVE_PROGRAMS, tiles, max_programs),
        *(
            LinkPoint(
                direction=d2h,
                piece_bytes=block_bytes,
                choice=CopyChoice(path, 0, 0),
                beside=True,
            )
            for path in (CopyPath.COPY_ENGINE, CopyPath.BATCHED)
        ),
    )


def memory_plan(*, pages: Sequence[int] = PAGE_SIZES_BYTES) -> tuple[LinkPoint, ...]:
    """Without a link there is one way."""
    return tuple(
        LinkPoint(
            direction=direction,
            piece_bytes=size,
            choice=CopyChoice(CopyPath.MEMCPY, 0, 0),
            beside=False,
        )
        for size in pages
        for direction in Direction
    )


def _by_kernel(
    direction: Direction,
    size: int,
    programs: Sequence[int],
    tiles_bytes: Sequence[int],
    max_programs: int,
) -> Iterator[LinkPoint]:
    for tile_bytes in tiles_bytes:
        for count in (count for count in programs if count <= max_programs):
            choice = CopyChoice(CopyPath.KERNEL, count, tile_bytes)
            yield LinkPoint(direction=direction, piece_bytes=size, choice=choice, beside=True)


def _by_host(direction: Direction, size: int, *, beside: bool) -> Iterator[LinkPoint]:
    for path in HOST_PATHS:
        choice = CopyChoice(path, 0, 0)
        yield LinkPoint(direction=direction, piece_bytes=size, choice=choice, beside=beside)
