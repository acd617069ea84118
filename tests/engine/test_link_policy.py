"""The way of a copy, read off calibrations made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparsed.core import CopyPath, Direction, LinkCalibration, LinkEntry, LinkKey, LinkProbe
from sparsed.engine.kvcache.link_policy import (
    choose_copy,
    choose_load,
    covers,
    merge_calibrations,
)

KERNEL, ENGINE = CopyPath.KERNEL, CopyPath.COPY_ENGINE


def entry(
    programs: int,
    gb_per_s: float,
    slowdown: float | None = 1.0,
    *,
    direction: Direction = Direction.H2D,
    piece_bytes: int = 16384,
    path: CopyPath = KERNEL,
) -> LinkEntry:
    return LinkEntry(
        direction=direction,
        piece_bytes=piece_bytes,
        path=path,
        programs=programs,
        tile_bytes=32768 if path is KERNEL else 0,
        bytes_per_s=gb_per_s * 1e9,
        slowdown=slowdown,
    )


def calibration(*entries: LinkEntry) -> LinkCalibration:
    key = LinkKey(gpu_name="any", driver="1", link="gen5x16", torch="2", triton="3")
    probe = LinkProbe(h2d_bytes_per_s=54e9, d2h_bytes_per_s=54e9)
    return LinkCalibration(key=key, contiguous=probe, entries=entries)


def choice(
    *entries: LinkEntry,
    direction: Direction = Direction.H2D,
    piece_bytes: int = 16384,
    paths: tuple[CopyPath, ...] = (KERNEL,),
) -> LinkEntry | None:
    found = calibration(*entries)
    return choose_copy(found, direction=direction, piece_bytes=piece_bytes, paths=paths)


def programs(*entries: LinkEntry, **where: object) -> int:
    chosen = choice(*entries, **where)  # type: ignore[arg-type]  # passed on
    assert chosen is not None
    return chosen.programs


@pytest.mark.parametrize(("asked", "rate"), [(None, 48), (1, 7), (8, 7), (30, 48), (1024, 47)])
def test_of_another_number_of_programs_the_next_measured_counts(
    asked: int | None, rate: float
) -> None:
    """Of the same size and tile: it is the number alone that the knob changes."""
    others = (
        entry(66, 49, piece_bytes=65536),
        replace(entry(66, 20), tile_bytes=65536),
        entry(2, 9, direction=Direction.D2H),
    )
    found = calibration(entry(4, 7), entry(32, 48), entry(132, 47), *others)
    chosen = choose_load(found, piece_bytes=16384, programs=asked)
    assert chosen is not None and chosen.bytes_per_s == rate * 1e9
    assert choose_load(calibration(others[2]), piece_bytes=16384, programs=asked) is None


def test_a_load_takes_the_fewest_programs_near_the_best() -> None:
    assert programs(entry(8, 30), entry(16, 48.6), entry(32, 50), entry(132, 50)) == 16


def test_a_load_does_not_slow_its_neighbours_beyond_bounds() -> None:
    fast = entry(16, 50, slowdown=1.3)
    assert programs(entry(4, 20, slowdown=1.0), entry(8, 40, slowdown=1.1), fast) == 8
    assert programs(entry(8, 40, slowdown=1.5), fast) == 16, "none within: the least"
    assert programs(entry(8, 40, None), entry(16, 50, None)) == 16, "not measured: not bounded"


def test_a_save_disturbs_least_among_those_fast_enough() -> None:
    save = {"direction": Direction.D2H}
    kernel = [entry(4, 40, 1.08, direction=Direction.D2H), entry(8, 51, 1.1, **save)]
    engine = entry(0, 44, 1.004, direction=Direction.D2H, path=ENGINE)
    both = {"direction": Direction.D2H, "paths": (KERNEL, ENGINE)}
    assert programs(*kernel, engine, **both) == 0
    slow = entry(0, 1.2, 1.0, direction=Direction.D2H, path=ENGINE)
    assert programs(*kernel, slow, **both) == 4
    assert programs(*kernel, engine, direction=Direction.D2H) == 4, "only what may be used"
    unknown = entry(0, 50, None, direction=Direction.D2H, path=ENGINE)
    assert programs(*kernel, unknown, **both) == 4


def test_sizes_follow_the_nearest_that_was_measured() -> None:
    entries = [
        entry(66, 49, piece_bytes=4096),
        entry(32, 50, piece_bytes=16384),
        entry(8, 50, piece_bytes=65536),
    ]
    sizes = {1024: 66, 8000: 66, 8400: 32, 20480: 32, 40000: 8, 1 << 20: 8}
    assert {size: programs(*entries, piece_bytes=size) for size in sizes} == sizes


@pytest.mark.parametrize("direction", Direction)
def test_what_was_not_measured_is_not_chosen(direction: Direction) -> None:
    other = Direction.D2H if direction is Direction.H2D else Direction.H2D
    assert choice(entry(8, 50, direction=other), direction=direction) is None
    found = entry(0, 50, direction=direction, path=ENGINE)
    assert choice(found, direction=direction) is None


def test_a_calibration_covers_sizes_near_those_it_measured() -> None:
    found = calibration(entry(8, 50, piece_bytes=16384), entry(8, 50, piece_bytes=65536))
    sizes = {4096: False, 12288: True, 16384: True, 24000: True, 32768: False, 98000: True}
    assert {size: covers(found, page_bytes=size) for size in sizes} == sizes
    saves = calibration(entry(8, 50, direction=Direction.D2H))
    assert not covers(saves, page_bytes=16384)


def test_what_is_measured_again_replaces_what_was_known() -> None:
    old = calibration(entry(8, 30), entry(16, 40), entry(8, 50, piece_bytes=4096))
    new = calibration(entry(8, 31), entry(32, 45))
    merged = merge_calibrations(old, new)
    known = {(e.piece_bytes, e.programs): e.bytes_per_s / 1e9 for e in merged.entries}
    assert known == {(16384, 8): 31, (16384, 16): 40, (4096, 8): 50, (16384, 32): 45}
    assert len(merged.entries) == 4
    assert merge_calibrations(None, new) == new
    other_driver = replace(old, key=replace(old.key, driver="2"))
    assert merge_calibrations(other_driver, new) == new
