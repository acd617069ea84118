"""Calibration: which points, what a process says, and on a CPU the numbers too."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import msgspec
import pytest
import torch

from sparsed.core import (
    CalibrateLink,
    CopyPath,
    Direction,
    LinkCalibration,
    LinkEntry,
    LinkKey,
    LinkProbe,
)
from sparsed.engine.calibrate import (
    NO_LINK,
    calibrate_device,
    calibrate_tiers,
    ensure_calibration,
    measure_link,
    open_meter,
    plan_of,
)
from sparsed.engine.kvcache.dram import DramPool
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.kvcache.link_policy import covers
from sparsed.engine.link_plan import full_plan, quick_plan

KEY = LinkKey(gpu_name="any", driver="1", link="gen5x16", torch="2", triton="3")
GEOMETRY = Geometry(num_layers=4, num_kv_heads=8, head_dim=128, page_size=32, element_bytes=2)


def test_a_full_plan_has_every_way_once() -> None:
    points = full_plan()
    assert len(set(points)) == len(points)
    loads = {p.choice.path for p in points if p.direction is Direction.H2D}
    assert loads == set(CopyPath) - {CopyPath.MEMCPY}
    blocks = {p.choice.path for p in points if p.piece_bytes == 512 << 10}
    assert blocks == loads
    kernels = [p for p in points if p.choice.path is CopyPath.KERNEL]
    assert all(p.beside for p in kernels)
    assert max(p.choice.programs for p in full_plan(max_programs=60)) == 32


def test_a_quick_plan_is_what_one_model_needs() -> None:
    points = quick_plan(page_bytes=16384, block_bytes=524288, max_programs=132)
    assert len(points) < 25
    assert {(p.direction, p.piece_bytes) for p in points} == {
        (Direction.H2D, 16384),
        (Direction.D2H, 16384),
        (Direction.D2H, 524288),
    }


def test_sizes_and_haste_are_obeyed() -> None:
    wanted = CalibrateLink(device="cuda:0", sizes_bytes=(8192,))
    full = plan_of(wanted, max_programs=132)
    assert {p.piece_bytes for p in full if p.direction is Direction.H2D} == {8192}
    quick = plan_of(replace(wanted, quick=True), max_programs=132)
    assert len(quick) < len(full)
    assert {p.piece_bytes for p in quick} == {8192, 32 * 8192}


def test_the_ceiling_is_the_best_of_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_meter(torch.device("cpu")) as meter:
        looks = iter(
            (
                LinkProbe(h2d_bytes_per_s=1.0, d2h_bytes_per_s=5.0),
                LinkProbe(h2d_bytes_per_s=3.0, d2h_bytes_per_s=4.0),
            )
        )
        monkeypatch.setattr(meter, "contiguous", lambda: next(looks))
        found = measure_link(meter, (), key=NO_LINK, on_progress=lambda _frac: None)
    assert found.contiguous == LinkProbe(h2d_bytes_per_s=3.0, d2h_bytes_per_s=5.0)


def test_a_cpu_copies_memory() -> None:
    seen: list[float] = []
    wanted = CalibrateLink(device="cpu", sizes_bytes=(4096, 16384))
    found = calibrate_device(wanted, on_progress=seen.append)
    assert found.contiguous.h2d_bytes_per_s > 0 and found.contiguous.d2h_bytes_per_s > 0
    assert {(e.direction, e.piece_bytes) for e in found.entries} == {
        (direction, size) for direction in Direction for size in (4096, 16384)
    }
    for entry in found.entries:
        assert (entry.path, entry.programs, entry.slowdown) == (CopyPath.MEMCPY, 0, None)
        assert entry.bytes_per_s > 0
    assert seen == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.slow
def test_a_process_says_how_far_it_is_and_what_it_found() -> None:
    wanted = CalibrateLink(device="cpu", key=KEY, sizes_bytes=(65536,))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sparsed.engine.calibrate"],
        input=msgspec.json.encode(wanted),
        capture_output=True,
        check=True,
    )
    *progress, result = (
        msgspec.json.decode(line, type=dict[str, msgspec.Raw]) for line in done.stdout.splitlines()
    )
    assert progress and all(set(line) == {"LoadProgress"} for line in progress)
    found = msgspec.json.decode(result["LinkCalibration"], type=LinkCalibration)
    assert found.key == KEY
    assert len(found.entries) == 2


def entry(piece_bytes: int) -> LinkEntry:
    return LinkEntry(
        direction=Direction.H2D,
        piece_bytes=piece_bytes,
        path=CopyPath.KERNEL,
        programs=3,
        tile_bytes=32768,
        bytes_per_s=1e9,
    )


GIVEN = LinkCalibration(
    key=KEY,
    contiguous=LinkProbe(h2d_bytes_per_s=1.0, d2h_bytes_per_s=1.0),
    entries=(entry(GEOMETRY.page_bytes),),
)


def test_an_engine_on_a_cpu_needs_none(make_spec, make_cache) -> None:  # type: ignore[no-untyped-def]  # fixtures
    cache = make_cache(lane_blocks=2, num_frames=2)
    spec = replace(make_spec(), calibration=GIVEN)
    found = ensure_calibration(
        spec, pool=cache.pool, hot_NX=cache.arena.pages_NX, on_progress=lambda _: None
    )
    assert found is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    """Seconds each; the numbers are printed (run with -s)."""

    def make_tiers(self) -> tuple[DramPool, torch.Tensor]:
        device = torch.device("cuda:0")
        pool = DramPool(GEOMETRY, num_frames=64, dtype=torch.bfloat16, device=device, pool_fd=None)
        pool.pages_RX.copy_(torch.arange(len(pool.pages_RX))[:, None] % 251)
        hot = torch.zeros(8192, pool.pages_RX.shape[1], dtype=torch.bfloat16, device=device)
        return pool, hot

    def test_quick(self) -> None:
        pool, hot = self.make_tiers()
        before = pool.pages_RX.clone()
        found = calibrate_tiers(
            pool.pages_RX,
            hot,
            page_bytes=GEOMETRY.page_bytes,
            block_bytes=GEOMETRY.layer_bytes,
            chunk_bytes=pool.chunk_bytes,
            key=KEY,
            on_progress=lambda _: None,
        )
        assert torch.equal(pool.pages_RX, before), "the pool keeps what it holds"
        assert covers(found, page_bytes=GEOMETRY.page_bytes)
        whole = {
            Direction.H2D: found.contiguous.h2d_bytes_per_s,
            Direction.D2H: found.contiguous.d2h_bytes_per_s,
        }
        for one in found.entries:
            ratio = one.bytes_per_s / whole[one.direction]
            print(
                one.direction,
                one.piece_bytes,
                one.path,
                one.programs,
                round(ratio, 3),
                one.slowdown,
            )
            assert 0 < ratio < 1.3
            assert one.slowdown is not None and one.slowdown > 0.8

    def test_an_engine_measures_only_what_it_does_not_know(self, make_spec) -> None:  # type: ignore[no-untyped-def]  # fixture
        pool, hot = self.make_tiers()
        spec = replace(make_spec(), device="cuda:0", link=KEY, calibration=GIVEN)
        place = {"pool": pool, "hot_NX": hot, "on_progress": lambda _: None}
        assert ensure_calibration(spec, **place) is GIVEN
        other = replace(GIVEN, entries=(entry(1024),))
        found = ensure_calibration(replace(spec, calibration=other), **place)
        assert found is not None and found.key == KEY
        assert other.entries[0] in found.entries
        assert covers(found, page_bytes=GEOMETRY.page_bytes)
