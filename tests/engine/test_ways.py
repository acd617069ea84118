"""The ways of copies on a CUDA device, which need not be there to be decided."""

from __future__ import annotations

import torch

from sparsed.core import CopyPath, Direction, LinkCalibration, LinkEntry, LinkKey, LinkProbe
from sparsed.engine.kvcache.link_policy import CopyChoice
from sparsed.engine.kvcache.ways import Ways

CUDA = torch.device("cuda:0")
PAGE_BYTES, BLOCK_BYTES = 16 << 10, 512 << 10
BEST = LinkEntry(
    direction=Direction.H2D,
    piece_bytes=PAGE_BYTES,
    path=CopyPath.KERNEL,
    programs=12,
    tile_bytes=65536,
    bytes_per_s=5e10,
    slowdown=1.1,
)
SAVE = LinkEntry(
    direction=Direction.D2H,
    piece_bytes=BLOCK_BYTES,
    path=CopyPath.BATCHED,
    programs=0,
    tile_bytes=0,
    bytes_per_s=5e10,
    slowdown=1.0,
)
CALIBRATION = LinkCalibration(
    key=LinkKey(gpu_name="any", driver="1", link="gen5x16", torch="2", triton="3"),
    contiguous=LinkProbe(h2d_bytes_per_s=5e10, d2h_bytes_per_s=5e10),
    entries=(BEST, SAVE),
)


def make_ways(calibration: LinkCalibration | None = None) -> Ways:
    return Ways(page_bytes=PAGE_BYTES, device=CUDA, calibration=calibration)


def test_the_calibration_decides_once_it_is_there() -> None:
    ways = make_ways()
    assert ways.load.path is ways.save.path is CopyPath.KERNEL
    assert ways.save_blocks(BLOCK_BYTES).path is CopyPath.COPY_ENGINE
    assert ways.entries(block_bytes=BLOCK_BYTES) == ()
    ways.calibrate(CALIBRATION)
    assert ways.load == CopyChoice(CopyPath.KERNEL, 12, 65536)
    assert ways.save.path is CopyPath.KERNEL, "not measured: as before"
    assert ways.save_blocks(BLOCK_BYTES).path is CopyPath.BATCHED
    assert ways.entries(block_bytes=BLOCK_BYTES) == (BEST, SAVE)


def test_the_knob_wins_over_the_calibration_until_it_is_auto_again() -> None:
    ways = make_ways(CALIBRATION)
    ways.set_programs(7)
    assert ways.load == CopyChoice(CopyPath.KERNEL, 7, 65536)
    ways.calibrate(CALIBRATION)
    assert ways.load.programs == 7
    ways.set_programs(None)
    assert ways.load.programs == 12
