"""Verification of copies, on CPU tensors: what is broken on purpose is counted, and only that."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsed.core import AddRequest, EngineSpec, SamplingParams, VerifyMode
from sparsed.engine.engine import Engine
from sparsed.engine.kvcache.dram import DramPool
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.kvcache.transfer import Transfer
from sparsed.engine.kvcache.verify import SAMPLE_STRIDE, Verifier, Where
from sparsed.engine.runner import Runner

CPU = torch.device("cpu")
GEOMETRY = Geometry(num_layers=3, num_kv_heads=2, head_dim=4, page_size=32, element_bytes=4)


class Tiers:
    """A pool of five frames, some hot pages, and the transfer between them."""

    def __init__(self, mode: VerifyMode) -> None:
        self.pool = DramPool(GEOMETRY, num_frames=5, dtype=torch.float32, device=CPU, pool_fd=None)
        self.hot = torch.randn(len(self.pool.pages_RX), self.pool.pages_RX.shape[1])
        verifier = Verifier(mode, num_page_rows=len(self.pool.pages_RX), device=CPU)
        self.transfer = Transfer(page_bytes=GEOMETRY.page_bytes, device=CPU, verifier=verifier)

    def save(self, rows: list[int]) -> None:
        index = torch.tensor(rows)
        self.transfer.save(self.pool.pages_RX, self.hot, dst_rows=index, src_rows=index)

    def load(self, rows: list[int], *, count: int | None = None) -> None:
        index = torch.tensor(rows)
        told = None if count is None else torch.tensor(count)
        target = torch.empty_like(self.hot)
        self.transfer.load(
            target, self.pool.pages_RX, dst_rows=index.clamp(min=0), src_rows=index, count=told
        )


def test_good_copies_are_checked_on_both_sides() -> None:
    tiers = Tiers(VerifyMode.FULL)
    tiers.save([3, 50, 7])
    assert tiers.transfer.verified == (3, 0)
    tiers.load([7, -1, 3, 9])
    assert tiers.transfer.verified == (5, 0), "row 9 was saved by nobody"
    tiers.load([50, 7, 3], count=1)
    assert tiers.transfer.verified == (6, 0)


def test_a_broken_row_is_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    tiers = Tiers(VerifyMode.FULL)
    tiers.save([3, 50, 7])
    tiers.pool.pages_RX.view(torch.int32)[50, 17] ^= 1
    with caplog.at_level(logging.ERROR):
        tiers.load([50, 7])
        assert tiers.transfer.verified == (5, 1)
        tiers.load([50])
        assert tiers.transfer.verified == (6, 2)
    assert len(caplog.records) == 1
    assert "1 of 5 checked" in caplog.text
    tiers.save([50])
    tiers.load([50])
    assert tiers.transfer.verified == (8, 2), "saved again"


def test_a_save_that_goes_wrong_is_seen() -> None:
    tiers = Tiers(VerifyMode.FULL)
    tiers.transfer.copy_rows = lambda *_, **__: None
    tiers.save([3, 4])
    assert tiers.transfer.verified == (2, 2)


def test_blocks_are_checked_page_by_page() -> None:
    tiers = Tiers(VerifyMode.FULL)
    source = torch.randn(2, 2, 128, 2, 4)
    tiers.transfer.save_blocks(tiers.pool, source, frames=[4, 1], layer=2)
    assert tiers.transfer.verified == (2 * 2 * 4, 0)
    rows = ((torch.tensor([4, 1])[:, None] * 3 + 2) * 8 + torch.arange(8)).flatten().tolist()
    tiers.load(rows)
    assert tiers.transfer.verified == (32, 0)
    tiers.pool.pages_RX[rows[9], 0] += 1
    tiers.load(rows)
    assert tiers.transfer.verified == (48, 1)


def test_a_sample_takes_one_row_in_64_from_every_layer() -> None:
    verifier = Verifier(VerifyMode.SAMPLE, num_page_rows=1 << 16, device=CPU)
    rows = torch.arange(1 << 16)
    wanted = verifier._wanted(rows, rows, None)
    assert int(wanted.sum()) == pytest.approx((1 << 16) / SAMPLE_STRIDE, rel=0.1)
    for period in (4, 8, 32, 64, 256):  # pages of a block, heads, layers
        per_place = wanted.view(-1, period).sum(0)
        assert int(per_place.max()) < 4 * per_place.float().mean() + 1
    store = torch.randn(1 << 16, 4)
    verifier.remember(store, source_rows=rows, page_rows=rows)
    store += 1
    verifier.check(store, store_rows=rows, page_rows=rows, where=Where.LOAD)
    checked, wrong = verifier.read()
    assert checked == wrong == int(wanted.sum())


def test_off_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = Tiers(VerifyMode.OFF)
    monkeypatch.delattr("sparsed.engine.kvcache.verify.page_checksums")
    tiers.save([3])
    tiers.load([3])
    assert tiers.transfer.verified == (0, 0)


@pytest.mark.parametrize("mode", VerifyMode)
def test_an_engine_counts_what_was_broken_under_it(
    make_spec: Callable[..., EngineSpec], mode: VerifyMode
) -> None:
    spec = make_spec(token_budget=256, hbm_budget=256, page_size=16, lane_blocks=8, max_num_seqs=1)
    spec = replace(spec, verify_kv=mode)
    engine = Engine(runner := Runner(spec, on_progress=lambda *_: None), knobs=spec.knobs)
    vocabulary = runner.vocab_size
    prompt = np.random.default_rng(0).integers(3, vocabulary, 1500).tolist()
    sampling = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    engine.add(AddRequest(request_id="a", prompt_tokens=tuple(prompt), sampling=sampling))
    while not engine.step().outputs:
        pass
    before = engine.stats()
    assert before.verify_mismatches == 0
    assert (before.verify_checked_pages > 0) == (mode is not VerifyMode.OFF)
    runner.kv.pool.pages_RX.add_(1)
    while engine.has_work:
        engine.step()
    after = engine.stats()
    assert after.h2d_bytes > before.h2d_bytes, "pages were fetched"
    assert (after.verify_mismatches > 0) == (mode is not VerifyMode.OFF)
