"""Copies between the tiers on a CPU: the right rows, counted by direction and path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsed.core import CopyPath, Direction
from sparsed.engine.kvcache.dram import DramPool
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.kvcache.link_policy import CopyChoice
from sparsed.engine.kvcache.transfer import Transfer

CPU = torch.device("cpu")
GEOMETRY = Geometry(num_layers=3, num_kv_heads=2, head_dim=4, page_size=32, element_bytes=4)


def make_pool(num_frames: int = 5) -> DramPool:
    return DramPool(GEOMETRY, num_frames=num_frames, dtype=torch.float32, device=CPU, pool_fd=None)


@pytest.fixture
def transfer() -> Transfer:
    return Transfer(page_bytes=GEOMETRY.page_bytes, device=CPU)


def numbered(*shape: int) -> Tensor:
    return torch.arange(float(np.prod(shape))).view(shape)


def test_pages_go_there_and_back(transfer: Transfer) -> None:
    pool, hot = make_pool(), numbered(6, GEOMETRY.page_bytes // 4)
    rows, slots = torch.tensor([[7, 2], [30, 11]]), torch.tensor([[5, -1], [0, 3]])
    transfer.save(pool.pages_RX, hot, dst_rows=rows, src_rows=slots).wait()
    assert torch.equal(pool.pages_RX[[7, 30, 11]], hot[[5, 0, 3]])
    assert not pool.pages_RX[2].any()
    back = torch.zeros_like(hot)
    transfer.load(
        back,
        pool.pages_RX,
        dst_rows=torch.tensor([1, 2, 4]),
        src_rows=torch.tensor([30, 11, 7]),
        count=torch.tensor([2], dtype=torch.int32),
    )
    assert torch.equal(back[[1, 2]], hot[[0, 3]])
    assert not back[4].any(), "beyond the count"
    totals = transfer.totals()
    assert {way: total.num_bytes // GEOMETRY.page_bytes for way, total in totals.items()} == {
        (Direction.H2D, CopyPath.MEMCPY): 2,
        (Direction.D2H, CopyPath.MEMCPY): 3,
    }
    assert all(total.seconds > 0 for total in totals.values())
    assert transfer.h2d == totals[Direction.H2D, CopyPath.MEMCPY]
    assert transfer.d2h.num_bytes == 3 * GEOMETRY.page_bytes


@pytest.mark.parametrize("background", [False, True])
def test_a_save_on_a_cpu_is_done_when_it_returns(transfer: Transfer, background: bool) -> None:
    pool, hot = make_pool(), numbered(2, GEOMETRY.page_bytes // 4)
    row = torch.tensor([9])
    saved = transfer.save(pool.pages_RX, hot, dst_rows=row, src_rows=row - 8, background=background)
    saved.wait()
    assert torch.equal(pool.pages_RX[9], hot[1])


def test_a_layer_of_whole_frames(transfer: Transfer) -> None:
    pool = make_pool()
    source = numbered(3, 2, 128, 2, 4)
    transfer.save_blocks(pool, source, frames=[4, 0, 2], layer=1).wait()
    frames = pool.pages_RX.view(5, 3, 2, 128, 2, 4)
    assert torch.equal(frames[[4, 0, 2], 1], source)
    assert int(frames.count_nonzero()) == int(source.count_nonzero()), "and nothing else"
    assert transfer.d2h.num_bytes == source.nbytes


def test_nothing_to_copy(transfer: Transfer) -> None:
    pool, none = make_pool(), torch.empty(0, dtype=torch.int64)
    transfer.load(pool.pages_RX, pool.pages_RX, dst_rows=none, src_rows=none)
    transfer.save_blocks(pool, torch.empty(0, 2, 128, 2, 4), frames=[], layer=0)
    transfer.wait_for_saves()
    assert transfer.h2d.num_bytes == transfer.d2h.num_bytes == 0


def test_a_cpu_has_one_way_whatever_the_knob_says(transfer: Transfer) -> None:
    transfer.ways.set_programs(7)
    expected = CopyChoice(CopyPath.MEMCPY, 0, 0)
    assert transfer.ways.load == transfer.ways.save == transfer.ways.save_blocks(1) == expected
