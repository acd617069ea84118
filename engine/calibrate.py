"""Calibration of the link: inside an engine that starts, or as a process of its own.

``python -m sparsed.engine.calibrate`` reads a ``CalibrateLink`` as JSON from its standard input
and answers as ``engine.process`` says, with a ``LinkCalibration``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from sparsed.core import (
    CalibrateLink,
    EngineSpec,
    ExitCode,
    LinkCalibration,
    LinkKey,
    LinkProbe,
)
from sparsed.engine.kvcache.link_policy import covers, merge_calibrations
from sparsed.engine.link_plan import (
    PAGE_SIZES_BYTES,
    LinkPoint,
    full_plan,
    memory_plan,
    quick_plan,
)
from sparsed.engine.process import answer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sparsed.engine.kvcache.dram import DramPool
    from sparsed.engine.link_meter import LinkMeter

HOST_BYTES: Final = 4 << 30  # of pinned memory that pieces are drawn from
CPU_BYTES: Final = 64 << 20
HOT_BYTES: Final = 256 << 20
QUICK_HOT_BYTES: Final = 64 << 20
NO_LINK: Final = LinkKey(gpu_name="", driver="", link="", torch="", triton="")

Progress = Callable[[float], None]


def measure_link(
    meter: LinkMeter, points: Sequence[LinkPoint], *, key: LinkKey, on_progress: Progress
) -> LinkCalibration:
    """One entry for every point. What all are held against, one large copy, is measured before and
    after them, and the best counts: a single look was once 18 % below what the link can do."""
    before = meter.contiguous()
    entries = []
    for number, point in enumerate(points, start=1):
        entries.append(meter.measure(point))
        on_progress(number / len(points))
    best = _faster(before, meter.contiguous())
    return LinkCalibration(key=key, contiguous=best, entries=tuple(entries))


def _faster(a: LinkProbe, b: LinkProbe) -> LinkProbe:
    """The best of both, in each direction."""
    return LinkProbe(
        h2d_bytes_per_s=max(a.h2d_bytes_per_s, b.h2d_bytes_per_s),
        d2h_bytes_per_s=max(a.d2h_bytes_per_s, b.d2h_bytes_per_s),
    )


def calibrate_tiers(
    pool_RX: Tensor,
    hot_NX: Tensor,
    *,
    page_bytes: int,
    block_bytes: int,
    chunk_bytes: int,
    key: LinkKey,
    on_progress: Progress,
) -> LinkCalibration:
    """The quick calibration, in the tiers of an engine that serves nobody yet: the pool keeps
    what it holds, the hot tier does not. ``block_bytes``: one layer of a frame."""
    import torch

    from sparsed.engine.link_meter import LinkMeter

    host, hot = (store.flatten().view(torch.uint8) for store in (pool_RX, hot_NX))
    meter = LinkMeter(host, hot[:QUICK_HOT_BYTES], host_chunk_bytes=chunk_bytes)
    points = quick_plan(
        page_bytes=page_bytes, block_bytes=block_bytes, max_programs=_num_processors(hot.device)
    )
    return measure_link(meter, points, key=key, on_progress=on_progress)


def ensure_calibration(
    spec: EngineSpec, *, pool: DramPool, hot_NX: Tensor, on_progress: Progress
) -> LinkCalibration | None:
    """What an engine copies by: the calibration it was given if that knows pages of about its
    size, else one made now, with what was given. None on a CPU."""
    if spec.device == "cpu":
        return None
    geometry, given = pool.geometry, spec.calibration
    if given is not None and covers(given, page_bytes=geometry.page_bytes):
        return given
    found = calibrate_tiers(
        pool.pages_RX,
        hot_NX,
        page_bytes=geometry.page_bytes,
        block_bytes=geometry.layer_bytes,
        chunk_bytes=pool.chunk_bytes,
        key=spec.link or NO_LINK,
        on_progress=on_progress,
    )
    _give_back_memory()
    return merge_calibrations(given, found)


def calibrate_device(wanted: CalibrateLink, *, on_progress: Progress) -> LinkCalibration:
    """A calibration in memory of its own. Errors: StartError where that cannot be had."""
    import torch

    device = torch.device(wanted.device)
    key = wanted.key or NO_LINK
    with open_meter(device) as meter:
        if device.type == "cpu":
            points = memory_plan(pages=wanted.sizes_bytes or PAGE_SIZES_BYTES)
        else:
            points = plan_of(wanted, max_programs=_num_processors(device))
        return measure_link(meter, points, key=key, on_progress=on_progress)


@contextmanager
def open_meter(device: torch.device) -> Iterator[LinkMeter]:
    """A meter on memory of its own, pinned as the DRAM tier's is. StartError if there is none."""
    import torch

    from sparsed.engine.link_meter import LinkMeter

    if device.type == "cpu":
        yield LinkMeter(*(torch.zeros(CPU_BYTES, dtype=torch.uint8) for _ in range(2)))
        return
    torch.cuda.set_device(device)
    pool = _pinned_pool(device)  # kept until the end: without it the memory is not pinned
    host = pool.pages_RX.flatten().view(torch.uint8)
    hot = torch.zeros(HOT_BYTES, dtype=torch.uint8, device=device)
    yield LinkMeter(host, hot, host_chunk_bytes=pool.chunk_bytes)


def plan_of(wanted: CalibrateLink, *, max_programs: int) -> tuple[LinkPoint, ...]:
    """The points of a CUDA device."""
    pages = wanted.sizes_bytes or PAGE_SIZES_BYTES
    if not wanted.quick:
        return full_plan(pages=pages, max_programs=max_programs)
    return tuple(
        point
        for page_bytes in pages
        for point in quick_plan(
            page_bytes=page_bytes, block_bytes=32 * page_bytes, max_programs=max_programs
        )
    )


def _pinned_pool(device: torch.device) -> DramPool:
    """Memory pinned as the DRAM tier's is."""
    import torch

    from sparsed.engine.kvcache.dram import DramPool
    from sparsed.engine.kvcache.geometry import Geometry

    geometry = Geometry(num_layers=1, num_kv_heads=8, head_dim=128, page_size=128, element_bytes=2)
    return DramPool(
        geometry,
        num_frames=HOST_BYTES // geometry.frame_bytes,
        dtype=torch.bfloat16,
        device=device,
        pool_fd=None,
    )


def _give_back_memory() -> None:
    """What matrix products took of the device, before others count what is free."""
    import torch

    torch.cuda.empty_cache()


def _num_processors(device: torch.device) -> int:
    import torch

    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def main() -> ExitCode:
    """Calibrate as standard input says; the exit status for the shell."""
    import msgspec

    wanted = msgspec.json.decode(sys.stdin.buffer.read(), type=CalibrateLink)
    return answer(
        lambda report: calibrate_device(
            wanted, on_progress=lambda frac: report("measuring the link", frac)
        )
    )


if __name__ == "__main__":
    sys.exit(main())
