"""Copies between pinned memory and a CUDA device: every way gives the same bytes, in order."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsed.core import (
    CopyPath,
    Direction,
    LinkCalibration,
    LinkEntry,
    LinkKey,
    LinkProbe,
    VerifyMode,
)
from sparsed.engine.cuda_driver import CudaDriver
from sparsed.engine.kvcache import pinning
from sparsed.engine.kvcache.dram import DramPool
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.kvcache.link_policy import CopyChoice
from sparsed.engine.kvcache.paths import CopyPaths, RowCopy
from sparsed.engine.kvcache.transfer import Transfer
from sparsed.engine.kvcache.verify import Verifier
from sparsed.engine.kvcache.ways import BLOCK_PATHS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda:0")
GEOMETRY = Geometry(num_layers=4, num_kv_heads=8, head_dim=128, page_size=32, element_bytes=2)
NUM_FRAMES = 24
CHOICES = {
    CopyPath.KERNEL: CopyChoice(CopyPath.KERNEL, 16, 32768),
    CopyPath.COPY_ENGINE: CopyChoice(CopyPath.COPY_ENGINE, 0, 0),
    CopyPath.BATCHED: CopyChoice(CopyPath.BATCHED, 0, 0),
    CopyPath.STAGED: CopyChoice(CopyPath.STAGED, 0, 0),
}


def make_pool(*, num_frames: int = NUM_FRAMES, pool_fd: int | None = None) -> DramPool:
    return DramPool(
        GEOMETRY, num_frames=num_frames, dtype=torch.bfloat16, device=CUDA, pool_fd=pool_fd
    )


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[DramPool]:
    """Registered in chunks of five frames, so that runs meet boundaries."""
    monkeypatch.setattr(
        "sparsed.engine.kvcache.dram.frame_chunks",
        lambda num_bytes, *, frame_bytes: pinning.frame_chunks(
            num_bytes, frame_bytes=frame_bytes, max_bytes=5 * frame_bytes
        ),
    )
    yield make_pool()
    torch.cuda.synchronize()


def random_like(store: Tensor, num_rows: int) -> Tensor:
    return torch.randn(num_rows, store.shape[1], device=CUDA, dtype=store.dtype)


def calibrated(path: CopyPath) -> LinkCalibration:
    """As if ``path`` were all there is for saves."""
    choice = CHOICES[path]
    entry = LinkEntry(
        direction=Direction.D2H,
        piece_bytes=1 << 19,
        path=path,
        programs=choice.programs,
        tile_bytes=choice.tile_bytes,
        bytes_per_s=1.0,
    )
    key = LinkKey(gpu_name="any", driver="1", link="gen5x16", torch="2", triton="3")
    probe = LinkProbe(h2d_bytes_per_s=1.0, d2h_bytes_per_s=1.0)
    return LinkCalibration(key=key, contiguous=probe, entries=(entry,))


@pytest.mark.parametrize("path", CHOICES)
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("scattered", [True, False])
def test_every_way_moves_the_same_rows(
    pool: DramPool, path: CopyPath, direction: Direction, scattered: bool
) -> None:
    store, count = pool.pages_RX, 300
    store.copy_(torch.randn_like(store))
    hot = random_like(store, 400)
    generator = np.random.default_rng(0)
    cold_rows = (
        np.sort(generator.permutation(len(store))[:count]) if scattered else np.arange(count) + 50
    )
    hot_rows = generator.permutation(400)[:count] if scattered else np.arange(count)
    loads = direction is Direction.H2D
    dst, src = (hot, store) if loads else (store, hot)
    dst_rows, src_rows = (hot_rows, cold_rows) if loads else (cold_rows, hot_rows)
    expected = dst.clone().cpu()
    expected[torch.from_numpy(dst_rows)] = src.cpu()[torch.from_numpy(src_rows)]
    rows_per_chunk = pool.chunk_bytes // GEOMETRY.page_bytes
    copy = RowCopy(
        dst_RX=dst, src_RX=src, dst_rows=dst_rows, src_rows=src_rows, host_chunk=rows_per_chunk
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        scatter = CopyPaths(CUDA).run(copy, CHOICES[path])
    if scatter is not None:
        scatter.result()
    torch.cuda.synchronize()
    assert torch.equal(dst.cpu(), expected)


@pytest.mark.parametrize("path", BLOCK_PATHS)
def test_blocks_are_saved_behind_what_writes_them(pool: DramPool, path: CopyPath) -> None:
    """The source is written late on the current stream, and again once it has been read."""
    transfer = Transfer(page_bytes=GEOMETRY.page_bytes, device=CUDA, calibration=calibrated(path))
    assert transfer.ways.save_blocks(1 << 19).path is path
    source = torch.zeros(6, 8, 128, 2, 128, device=CUDA, dtype=torch.bfloat16)
    frames = [20, 3, 4, 5, 0, 11]
    for layer in range(GEOMETRY.num_layers):
        torch.cuda._sleep(20_000_000)
        source.fill_(layer + 1)
        saved = transfer.save_blocks(pool, source, frames=frames, layer=layer)
        saved.wait()
        source.fill_(-1)
    rows = torch.arange(pool.pages_RX.shape[0], device=CUDA)
    back = torch.empty_like(pool.pages_RX, device=CUDA)
    transfer.load(back, pool.pages_RX, dst_rows=rows, src_rows=rows)
    layers = back.view(NUM_FRAMES, GEOMETRY.num_layers, -1)
    for layer in range(GEOMETRY.num_layers):
        assert (layers[frames, layer] == layer + 1).all()
    others = sorted(set(range(NUM_FRAMES)) - set(frames))
    assert not layers[others].any()
    total = transfer.totals()[Direction.D2H, path]
    assert total.num_bytes == GEOMETRY.num_layers * source.nbytes
    assert total.seconds > 0


def test_a_load_on_another_stream_waits_for_saves(pool: DramPool) -> None:
    transfer = Transfer(page_bytes=GEOMETRY.page_bytes, device=CUDA)
    hot, rows = random_like(pool.pages_RX, 500), torch.arange(500, device=CUDA)
    back, side = torch.zeros_like(hot), torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)
    transfer.save(pool.pages_RX, hot, dst_rows=rows, src_rows=rows, background=True)
    with torch.cuda.stream(side):
        transfer.load(back, pool.pages_RX, dst_rows=rows, src_rows=rows)
    torch.cuda.synchronize()
    assert torch.equal(back, hot)


def test_loads_can_be_captured_and_count_on_the_device(pool: DramPool) -> None:
    transfer = Transfer(page_bytes=GEOMETRY.page_bytes, device=CUDA)
    pool.pages_RX.copy_(torch.randn_like(pool.pages_RX))
    hot, rows = random_like(pool.pages_RX, 64), torch.arange(64, device=CUDA)
    count = torch.zeros((), dtype=torch.int32, device=CUDA)

    def load() -> None:
        transfer.load(hot, pool.pages_RX, dst_rows=rows, src_rows=rows + 9, count=count)

    transfer.warm_up(pool.pages_RX, hot)
    load()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        load()
    before = hot.clone()
    count.fill_(40)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(hot[:40].cpu(), pool.pages_RX[9:49])
    assert torch.equal(hot[40:], before[40:])
    assert transfer.h2d.num_bytes == 40 * GEOMETRY.page_bytes


def test_totals_do_not_wait(pool: DramPool) -> None:
    transfer = Transfer(page_bytes=GEOMETRY.page_bytes, device=CUDA)
    hot, rows = random_like(pool.pages_RX, 64), torch.arange(64, device=CUDA)
    transfer.load(hot, pool.pages_RX, dst_rows=rows, src_rows=rows)
    torch.cuda.synchronize()
    assert transfer.h2d.num_bytes == 64 * GEOMETRY.page_bytes
    assert transfer.h2d.seconds > 0
    torch.cuda._sleep(1_000_000_000)  # about half a second
    transfer.load(hot, pool.pages_RX, dst_rows=rows, src_rows=rows)
    assert transfer.h2d.num_bytes == 64 * GEOMETRY.page_bytes, "as it was before"
    torch.cuda.synchronize()
    assert transfer.h2d.num_bytes > 0
    assert transfer.h2d.num_bytes == 128 * GEOMETRY.page_bytes


def test_a_pool_of_memory_that_is_there_keeps_what_it_holds() -> None:
    fd = os.memfd_create("test")
    first = make_pool(pool_fd=fd)
    first.pages_RX.fill_(3)
    del first
    again = make_pool(pool_fd=fd)
    os.close(fd)
    assert (again.pages_RX == 3).all()
    rows = torch.arange(64, device=CUDA)
    hot = random_like(again.pages_RX, 64)
    Transfer(page_bytes=GEOMETRY.page_bytes, device=CUDA).load(
        hot, again.pages_RX, dst_rows=rows, src_rows=rows
    )
    assert (hot == 3).all()


def test_a_pool_that_is_dropped_is_unpinned() -> None:
    pool = make_pool()
    pages = pool.pages_RX
    assert pages.is_pinned()
    del pool
    assert not pages.is_pinned()


def test_pinning_reports_its_progress_and_near_cpus() -> None:
    seen: list[float] = []
    DramPool(
        GEOMETRY,
        num_frames=1400,  # 2.7 GiB, two registrations
        dtype=torch.bfloat16,
        device=CUDA,
        pool_fd=None,
        on_progress=seen.append,
    )
    assert seen == sorted(seen) and len(seen) == 2 and seen[-1] == 1.0
    pci_id = CudaDriver().pci_id(0)
    assert os.path.exists(f"/sys/bus/pci/devices/{pci_id}") or not os.path.exists("/sys/bus/pci")
    assert pinning.cpus_near(pci_id) <= os.sched_getaffinity(0)


@pytest.mark.parametrize("path", BLOCK_PATHS)
def test_a_broken_row_is_counted(pool: DramPool, path: CopyPath) -> None:
    num_rows = len(pool.pages_RX)
    transfer = Transfer(
        page_bytes=GEOMETRY.page_bytes,
        device=CUDA,
        calibration=calibrated(path),
        verifier=Verifier(VerifyMode.FULL, num_page_rows=num_rows, device=CUDA),
    )
    source = torch.randn(2, 8, 128, 2, 128, device=CUDA, dtype=torch.bfloat16)
    saved_rows = 2 * 8 * GEOMETRY.pages_per_block
    transfer.save_blocks(pool, source, frames=[7, 2], layer=1)
    transfer.wait_for_saves()
    torch.cuda.synchronize()
    assert transfer.verified == (saved_rows, 0)
    hot, rows = torch.empty_like(pool.pages_RX, device=CUDA), torch.arange(num_rows, device=CUDA)
    transfer.load(hot, pool.pages_RX, dst_rows=rows, src_rows=rows)
    torch.cuda.synchronize()
    assert transfer.verified == (2 * saved_rows, 0)
    pool.layers_RX[7 * GEOMETRY.num_layers + 1, 5] += 1
    transfer.load(hot, pool.pages_RX, dst_rows=rows, src_rows=rows)
    torch.cuda.synchronize()
    assert transfer.verified == (3 * saved_rows, 1)
    transfer.save(pool.pages_RX, hot, dst_rows=rows, src_rows=rows, background=True)
    transfer.load(hot, pool.pages_RX, dst_rows=rows, src_rows=rows)
    torch.cuda.synchronize()
    assert transfer.verified == (3 * saved_rows + 2 * num_rows, 1), "saved again as it is"
