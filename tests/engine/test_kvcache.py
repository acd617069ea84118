"""The KV cache under random requests: nothing leaks, nothing has two owners, locks hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sparsed.core import PAGE_SIZES, CapacityError, SparseMethod
from sparsed.engine.hit_curve import MissCurve
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.hbm import FREE_STEP, LOCKED_STEP, slots_of_blocks
from sparsed.engine.kvcache.quotas import Demand
from sparsed.engine.kvcache.residency import Residency
from sparsed.engine.kvcache.row import Row
from sparsed.engine.sparse.bounds import BoundSelector

MakeCache = Callable[..., KVCache]
MAX_LEN = 1024


class Life:
    """What a request has done: ``length`` of ``total`` tokens are in the cache."""

    def __init__(self, prompt: int, total: int) -> None:
        self.prompt = prompt
        self.total = total
        self.length = 0


class CacheMachine(RuleBasedStateMachine):
    """Requests come, are computed in chunks and tokens beside each other, select, shrink, go."""

    def __init__(self, make_cache: MakeCache) -> None:
        super().__init__()
        self.make_cache = make_cache

    @initialize(
        page_size=st.sampled_from(PAGE_SIZES),
        lane_blocks=st.integers(2, 24),
        num_frames=st.integers(8, 24),
    )
    def start(self, page_size: int, lane_blocks: int, num_frames: int) -> None:
        self.budget = max(256, 4 * page_size)
        self.cache = self.make_cache(
            lane_blocks=lane_blocks,
            num_frames=num_frames,
            page_size=page_size,
            token_budget=self.budget,
        )
        self.page_size = page_size
        self.residency = Residency(self.cache)
        self.lives: dict[int, Life] = {}
        self.step = 0

    @rule(
        prompt=st.integers(1, MAX_LEN - 1),
        output=st.integers(1, 300),
        budgets=st.sampled_from((None, 1.5, 3)),
        method=st.sampled_from((SparseMethod.DENSE, SparseMethod.CUBOID_MEAN)),
    )
    def add(self, prompt: int, output: int, budgets: float | None, method: SparseMethod) -> None:
        total = min(prompt + output, MAX_LEN)
        budget = None if budgets is None else int(budgets * self.budget)
        if self.cache.can_admit(total, method=method, token_budget=budget):
            with self.losses_counted():
                index = self.cache.add(total, method=method, token_budget=budget)
            assert index not in self.lives
            self.lives[index] = Life(prompt, total)

    @rule(prompt=st.integers(500, MAX_LEN - 1), budgets=st.sampled_from((1, 1.5, 2.5)))
    def add_large_and_shrink(self, prompt: int, budgets: float) -> None:
        """A request that has all the blocks it can use loses some in the middle of its text."""
        self.cache.apply(replace(self.cache._knobs, hbm_budget=None))
        self.add(prompt, MAX_LEN, None, SparseMethod.CUBOID_MEAN)
        self.compute(prompt % 7 + 3, prompt)
        self.apply(budgets)

    @precondition(lambda self: self.lives)
    @rule(num_steps=st.integers(1, 80), seed=st.integers(0, 99))
    def compute(self, num_steps: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(num_steps):
            self.compute_step(rng)

    def compute_step(self, rng: np.random.Generator) -> None:
        """Decodes are opened first, then chunks; then come selections; then seals."""
        self.step += 1
        lives = [
            (i, life) for i, life in self.lives.items()
            if life.length < life.total and not self.cache.rows[i].is_spilled
        ]  # fmt: skip
        decodes = [(i, life) for i, life in lives if life.length >= life.prompt]
        for index, life in decodes:
            with self.losses_counted(index, life.length + 1):
                self.cache.make_room(index, life.length)
                self.cache.open_token(index, life.length)
        for index, life in lives:
            if life.length < life.prompt:
                size = int(rng.integers(1, life.prompt - life.length + 1))
                with self.losses_counted(index, life.length + size):
                    self.cache.open_chunk(index, life.length, life.length + size, step=self.step)
                life.length += size
        for layer in range(2):
            self.select([index for index, _ in decodes], layer, rng)
        filled = []
        for index, life in decodes:
            life.length += 1
            row = self.cache.rows[index]
            row.reads = row.reads._replace(decode_steps=row.reads.decode_steps + 1)
            if life.length % self.page_size == 0:
                filled.append((index, life.length // self.page_size - 1))
        self.cache.seal(filled, step=self.step)

    def select(self, decodes: list[int], layer: int, rng: np.random.Generator) -> None:
        num_full = {i: self.lives[i].length // self.page_size for i in decodes}
        rows = [index for index in decodes if num_full[index]]
        if not rows:
            return
        count = int(rng.integers(1, min(num_full[index] for index in rows) + 1))
        pages = [[rng.permutation(num_full[i])[:count] for _ in range(2)] for i in rows]
        pages_BHK, rows_B = torch.tensor(np.array(pages)), torch.tensor(rows)
        tables, per_block = self.cache.tables, self.cache.geometry.pages_per_block
        lanes = [self.cache.rows[index].blocks for index in rows]
        num_pages = max(num_full.values())
        was_hot = tables.slots_in_order(rows_B, layer, num_pages).gather(-1, pages_BHK) >= 0
        self.residency.begin(self.step)
        resolved = self.residency.bring_in(
            pages_BHK.int(),
            layer=layer,
            rows_B=rows_B.int(),
            positions_B=torch.tensor([self.lives[i].length for i in rows], dtype=torch.int32),
            max_blocks=max(blocks.most for blocks in lanes),
        )
        slots_BHK = tables.slots_in_order(rows_B, layer, num_pages).gather(-1, pages_BHK)
        assert torch.equal(slots_BHK.sort(-1).values, resolved.slots_BHK.sort(-1).values)
        assert bool((slots_BHK[was_hot] >= 0).all())
        placed = ((slots_BHK >= 0) & ~was_hot).sum()
        assert int(resolved.num_misses_1) == placed
        tail_B = torch.tensor([self.lives[i].length // self.page_size for i in rows])
        assert torch.equal(resolved.tail_slots_BH, tables.slots_at(rows_B, tail_B)[layer])
        counts_BH = np.array([blocks.counts_L.reshape(2, 2)[layer] for blocks in lanes])
        room_BH = torch.from_numpy(counts_BH) * per_block - 1  # the page of the token is locked
        assert torch.equal((slots_BHK >= 0).sum(-1), room_BH.clamp(max=count))

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def spill_or_restore(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.lives)))
        row, length = self.cache.rows[index], self.lives[index].length
        if not row.is_spilled:
            used = self.cache.arena.used_bytes
            self.cache.spill(index, length)
            assert self.cache.arena.used_bytes < used and row.blocks.counts_L.sum() == 0
        elif self.cache.can_restore(index):
            with self.losses_counted():
                self.cache.restore(index, length)
            assert row.num_blocks == self.cache.shares.mandatory_of(row)
            assert row.complete == (length <= 128 * row.num_blocks)

    @precondition(lambda self: any(not row.complete for row in self.cache.rows.values()))
    @rule(data=st.data(), num_steps=st.integers(1, 100))
    def rebalance(self, data: st.DataObject, num_steps: int) -> None:
        rows = [index for index, row in self.cache.rows.items() if not row.complete]
        index = data.draw(st.sampled_from(rows))
        counts = st.lists(st.integers(0, 500), min_size=4, max_size=4)
        misses_L, returns_L = np.array(data.draw(counts)), np.array(data.draw(counts))
        row = self.cache.rows[index]
        before_L = row.blocks.counts_L.copy()
        with self.losses_counted():
            self.cache.rebalance(index, Demand(misses_L, returns_L, num_steps))
        after_L, mandatory = row.blocks.counts_L, self.cache.shares.mandatory_of(row)
        assert after_L.sum() == before_L.sum()
        assert (after_L >= np.minimum(before_L, mandatory)).all()

    @precondition(lambda self: self.lives)
    @rule(budgets=st.sampled_from((None, 1, 1.5, 2.5)))
    def apply(self, budgets: float | None) -> None:
        hbm_budget = None if budgets is None else int(budgets * self.budget)
        with self.losses_counted():
            self.cache.apply(replace(self.cache._knobs, hbm_budget=hbm_budget))
        for row in self.cache.rows.values():
            assert row.num_blocks <= self.cache.shares.quota(row)

    @precondition(lambda self: self.lives)
    @rule(curves=st.lists(st.tuples(st.floats(0.01, 99), st.floats(0.1, 5)), min_size=4))
    def rebudget(self, curves: list[tuple[float, float]]) -> None:
        """Whatever rows miss, they stay within their bounds, and every block finds somebody."""

        def curve_of(row: Row) -> MissCurve:
            misses, exponent = curves[row.index]
            return MissCurve(slots=100, misses=misses, exponent=exponent, selected=99, total=1e6)

        with self.losses_counted():
            self.cache._blocks.rebudget(curve_of)
            for _ in self.cache.rows:
                self.cache._blocks.settle()
        for row in self.cache.shares.hot_rows:
            assert row.num_blocks >= self.cache.shares.mandatory_of(row)
            assert row.num_blocks <= max(
                self.cache.shares.most(row), self.cache.shares.mandatory_of(row)
            )

    @precondition(lambda self: self.lives)
    @rule(num_steps=st.integers(1, 12))
    def bring_back(self, num_steps: int) -> None:
        """Nobody loses a page that comes back whole, in as many steps as it has slices."""
        whole = [row for row in self.cache.rows.values() if row.complete]
        for _ in range(num_steps):
            with self.losses_counted():
                self.cache._regrowth.step(self.cache.rows)
        assert all(row.complete for row in whole)

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.lives)))
        tables, frames = self.cache.tables, self.cache.rows[index].frames
        displaced = tables.displaced.read()[0]
        self.cache.free(index)
        assert tables.displaced.read()[0] == displaced, "a request that ends evicts nothing"
        del self.lives[index]
        assert bool((tables.page_slot_MLHP[frames] == -1).all())
        assert bool((tables.lane_blocks_RLHN[index] == -1).all())
        assert bool((tables.frames_RF[index] == tables.spare_frame).all())

    @contextmanager
    def losses_counted(self, opened: int | None = None, end: int = 0) -> Iterator[None]:
        """Every begun page that has a slot before the block, or gets one in it, and has none after
        it is counted. The block may open pages of row ``opened`` up to position ``end``."""
        rows, displaced = dict(self.cache.rows), self.cache.tables.displaced.read()[0]
        had = {index: self.begun(row) for index, row in rows.items()}
        was_complete = opened is not None and rows[opened].complete
        yield
        if opened is not None and was_complete:
            num_begun = -(-end // self.page_size)
            had[opened][..., : min(num_begun, rows[opened].num_placed)] = True
        lost = sum(int((had[i] & (self.table(row) < 0)).sum()) for i, row in rows.items())
        assert self.cache.tables.displaced.read()[0] - displaced == lost

    def table(self, row: Row) -> torch.Tensor:
        """Slots (L, H, P) of all pages there may be."""
        num_pages = len(row.frames) * self.cache.geometry.pages_per_block
        return self.cache.tables.slots_of(row.index, 0, num_pages)

    def begun(self, row: Row) -> torch.Tensor:
        """Whether pages (L, H, P) have a slot and some tokens."""
        table_LHP = self.table(row)
        steps_LHP = self.cache.arena.slot_step_N[table_LHP.clamp(min=0)]
        return (table_LHP >= 0) & (steps_LHP != FREE_STEP)

    @invariant()
    def nothing_leaks(self) -> None:
        self.cache.check_integrity()
        frames = [row.frames for row in self.cache.rows.values()]
        assert len(np.unique(np.concatenate([*frames, [-1]]))) == 1 + sum(map(len, frames))
        assert set(self.cache.rows) == set(self.lives)

    @invariant()
    def every_frame_has_one_segment(self) -> None:
        tables, free = self.cache.tables, torch.ones(len(self.cache.tables.page_slot_MLHP)).bool()
        free[-1] = False  # the spare frame takes the writes of lanes without any
        for row in self.cache.rows.values():
            frames_F = tables.frames_RF[row.index]
            assert frames_F[: len(row.frames)].tolist() == row.frames.tolist()
            assert bool((frames_F[len(row.frames) :] == tables.spare_frame).all())
            free[row.frames] = False
        assert bool((tables.page_slot_MLHP[free] == -1).all())
        assert bool((tables.frames_RF[tables.spare_row] == tables.spare_frame).all())

    @invariant()
    def every_slot_has_one_owner_and_one_page(self) -> None:
        arena, per_block = self.cache.arena, self.cache.geometry.pages_per_block
        owned = torch.zeros(len(arena.slot_page_N), dtype=torch.int64)
        for row in self.cache.rows.values():
            slots = slots_of_blocks(torch.from_numpy(row.blocks.ids_LN), pages_per_block=per_block)
            owned[slots[slots >= 0]] += 1
            assert row.blocks.counts_L.sum() == 4 * row.num_blocks
            assert not row.complete or row.blocks.least == row.blocks.most
            self.check_lanes(row, slots.view(2, 2, -1))
        assert int(owned.max()) <= 1
        unowned = owned == 0
        unowned[:per_block] = False  # block 0 takes the writes of lanes without any
        assert bool((arena.slot_page_N[unowned] == -1).all())
        assert bool((arena.slot_step_N[unowned] == FREE_STEP).all())
        assert int(owned[:per_block].sum()) == 0

    def check_lanes(self, row: Row, slots_LHS: torch.Tensor) -> None:
        tables, arena = self.cache.tables, self.cache.arena
        per_block, life = self.cache.geometry.pages_per_block, self.lives[row.index]
        blocks_LHN = tables.lane_blocks_RLHN[row.index].view(4, -1)
        width = row.blocks.ids_LN.shape[1]
        assert blocks_LHN[:, :width].tolist() == row.blocks.ids_LN.tolist()
        assert bool((blocks_LHN[:, width:] == -1).all())
        counts_L = tables.num_blocks_RLH[row.index].flatten()
        assert counts_L.tolist() == row.blocks.counts_L.tolist()
        assert torch.equal((blocks_LHN >= 0).sum(-1), counts_L)
        table_LHP = self.table(row)
        is_slot = slots_LHS >= 0
        slots_LHS = slots_LHS.clamp(min=0)
        page_of_slot = torch.where(is_slot, arena.slot_page_N[slots_LHS].long(), -1)
        hot_LHP = table_LHP >= 0
        held = page_of_slot >= 0
        assert torch.equal(hot_LHP.sum(-1), held.sum(-1))
        found = table_LHP.gather(-1, page_of_slot.clamp(min=0)).long()
        assert torch.equal(found[held], slots_LHS[held])
        num_pages = -(-life.length // self.page_size)
        assert not bool(self.begun(row)[..., num_pages:].any())
        locked = (arena.slot_step_N[slots_LHS] == LOCKED_STEP) & is_slot
        is_open = bool(life.length % self.page_size) and not row.is_spilled
        assert bool((locked.sum(-1) == is_open).all())
        assert bool((page_of_slot[locked] == life.length // self.page_size).all())
        num_placed = -(-num_pages // per_block) * per_block if row.complete else 0
        assert not bool(hot_LHP[..., max(num_placed, num_pages) :].any())
        assert torch.equal(table_LHP[..., :num_placed].long(), slots_LHS[..., :num_placed])


@pytest.mark.slow
def test_cache(make_cache: MakeCache) -> None:
    run_state_machine_as_test(
        lambda: CacheMachine(make_cache),
        settings=settings(max_examples=50, stateful_step_count=25),
    )


def test_summaries_and_copies_of_sealed_pages(make_cache: MakeCache) -> None:
    """A page that decode fills is in the DRAM tier and ranked by its own keys."""
    cache = make_cache(lane_blocks=2, num_frames=2, page_size=8, sparse_method="cuboid-mean")
    row = cache.add(200, method=SparseMethod.CUBOID_MEAN, token_budget=None)
    for position in range(16):
        cache.make_room(row, position)
        cache.open_token(row, position)
    slots = cache.tables.slots_of(row, 0, 2).long()
    cache.arena.pages_NTCD[slots] = torch.randn(2, 2, 2, 8, 2, 4)
    cache.seal([(row, 1), (row, 0)], step=20)
    rows = cache.tables.page_rows(row, 0, 2)
    pages = cache.arena.pages_NTCD[slots]
    assert torch.equal(cache.pool.pages_RX[rows], cache.arena.pages_NX[slots])
    keys = pages[..., 0, :]
    center = (keys.amax(-2) + keys.amin(-2)) / 2
    radius = (keys - center[..., None, :]).abs().mean(-2)
    expected = torch.cat((center + radius, center - radius), dim=-1)
    assert isinstance(cache.selector, BoundSelector)
    kept_RE = cache.selector._store_SZE.view(-1, expected.shape[-1])
    torch.testing.assert_close(kept_RE[rows], expected)
    assert cache.transfer.d2h[0] == slots.numel() * cache.geometry.page_bytes
    assert bool((cache.arena.slot_step_N[slots] == 20).all()), "no longer locked"


@pytest.mark.parametrize("page_size", [8, 32, 128])
def test_pages_of_a_block_are_placed_with_it(make_cache: MakeCache, page_size: int) -> None:
    """A token that begins a page in a block that is there writes no table."""
    cache = make_cache(lane_blocks=4, num_frames=4, page_size=page_size)
    index = cache.add(400, method=SparseMethod.DENSE, token_budget=None)
    per_block = 128 // page_size
    for position in range(300):
        before = cache.tables.page_slot_X.clone()
        cache.make_room(index, position)
        cache.open_token(index, position)
        assert torch.equal(cache.tables.page_slot_X, before) == bool(position % 128)
    slots_LHS = cache.tables.slots_of(index, 0, 3 * per_block).long()
    blocks_LHn = cache.tables.lane_blocks_RLHN[index, :, :, :3].long()
    assert torch.equal(slots_LHS, slots_of_blocks(blocks_LHn, pages_per_block=per_block))
    steps_LHS = cache.arena.slot_step_N[slots_LHS]
    num_begun = 299 // page_size + 1
    assert bool((steps_LHS[..., :num_begun] == LOCKED_STEP).all()), "nothing was sealed"
    assert bool((steps_LHS[..., num_begun:] == FREE_STEP).all())


def test_a_newcomer_takes_what_is_above_the_share(make_cache: MakeCache) -> None:
    cache = make_cache(lane_blocks=8, num_frames=20, token_budget=256)
    first = cache.add(1000, method=SparseMethod.CUBOID_MEAN, token_budget=None)
    cache.open_chunk(first, 0, 999, step=1)
    assert cache.rows[first].complete
    assert cache.rows[first].num_blocks == 8
    second = cache.add(1000, method=SparseMethod.CUBOID_MEAN, token_budget=None)
    assert cache.rows[second].num_blocks == 3, "the budget and the partial page"
    assert cache.rows[first].num_blocks == 5, "what the newcomer needs, and no more"
    assert not cache.rows[first].complete
    assert cache.can_admit(1000, method=SparseMethod.CUBOID_MEAN, token_budget=None) is False, (
        "3 + 3 + 3 blocks"
    )
    assert cache.can_admit(128, method=SparseMethod.CUBOID_MEAN, token_budget=None), "one block"
    cache.free(first)
    assert cache.can_admit(1000, method=SparseMethod.CUBOID_MEAN, token_budget=None)


def test_a_newcomer_that_fits_disturbs_nobody(make_cache: MakeCache) -> None:
    cache = make_cache(lane_blocks=8, num_frames=20, token_budget=256)
    first = cache.add(600, method=SparseMethod.CUBOID_MEAN, token_budget=None)
    cache.open_chunk(first, 0, 599, step=1)
    cache.add(1000, method=SparseMethod.CUBOID_MEAN, token_budget=None)
    assert cache.rows[first].complete
    assert cache.rows[first].num_blocks == 5


def test_a_token_within_a_block_looks_at_no_other_request(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the host's time of a step grows with the square of the requests in it."""
    cache = make_cache(lane_blocks=8, num_frames=20, token_budget=256)
    index = cache.add(600, method=SparseMethod.CUBOID_MEAN, token_budget=None)
    cache.open_chunk(index, 0, 510, step=1)
    asked: list[int] = []
    quota = cache.shares.quota

    def count(row: Row) -> int:
        asked.append(row.num_tokens)
        return quota(row)

    monkeypatch.setattr(cache.shares, "quota", count)
    for position in range(510, 514):
        cache.make_room(index, position)
    assert set(asked) == {513}, "the token that begins a block"
    assert cache.rows[index].num_blocks == 5


def test_an_open_page_moves_when_its_slot_is_taken(make_cache: MakeCache) -> None:
    cache = make_cache(lane_blocks=8, num_frames=20, token_budget=256)
    index = cache.add(1000, method=SparseMethod.CUBOID_MEAN, token_budget=None)
    cache.open_chunk(index, 0, 999, step=1)
    before = cache.tables.slots_of(index, 31, 32).long()
    pages = torch.randn_like(cache.arena.pages_NTCD[before])
    cache.arena.pages_NTCD[before] = pages
    cache.apply(replace(cache._knobs, hbm_budget=256))
    assert cache.rows[index].num_blocks == 3
    blocks_LHn = cache.tables.lane_blocks_RLHN[index, :, :, :3].long()
    kept = slots_of_blocks(blocks_LHn, pages_per_block=4)
    after = cache.tables.slots_of(index, 31, 32).long()
    assert bool(torch.isin(after, kept).all())
    assert torch.equal(cache.arena.pages_NTCD[after], pages)
    assert bool((cache.arena.slot_step_N[after] == LOCKED_STEP).all())
    assert bool((cache.arena.slot_page_N[before] == -1).all())
    assert (cache.tables.slots_of(index, 0, 32) >= 0).sum(-1).unique().tolist() == [12]
    assert cache.tables.displaced.read()[0] == 4 * (32 - 12)


def test_a_page_yet_to_begin_is_lost_by_nobody(make_cache: MakeCache) -> None:
    cache = make_cache(lane_blocks=8, num_frames=20, token_budget=256)
    index = cache.add(1000, method=SparseMethod.CUBOID_MEAN, token_budget=None)
    cache.open_chunk(index, 0, 900, step=1)
    assert bool((cache.tables.slots_of(index, 29, 32) >= 0).all()), "placed with their block"
    cache.apply(replace(cache._knobs, hbm_budget=256))
    assert bool((cache.tables.slots_of(index, 29, 32) == -1).all())
    assert cache.tables.displaced.read()[0] == 4 * (29 - 12)
    cache.open_chunk(index, 900, 930, step=2)
    assert (cache.tables.slots_of(index, 28, 31) >= 0).tolist() == [[[True, True, False]] * 2] * 2


def test_what_never_fits_is_named(make_cache: MakeCache) -> None:
    cache = make_cache(lane_blocks=2, num_frames=3)
    cache.check_fits(3 * 128)
    with pytest.raises(CapacityError, match="DRAM tier, which holds 384 tokens") as error:
        cache.check_fits(3 * 128 + 1)
    assert error.value.field == "kv_dram_gib"
    with pytest.raises(CapacityError, match="exceeds max_model_len=1024") as error:
        cache.check_fits(1025)
    assert error.value.field == "max_model_len"


def test_an_own_budget_does_not_follow_the_knob(make_cache: MakeCache) -> None:
    cache = make_cache(lane_blocks=8, num_frames=20, token_budget=256)
    own = cache.add(300, method=SparseMethod.QUEST, token_budget=256)
    following = cache.add(300, method=SparseMethod.QUEST, token_budget=None)
    cache.apply(replace(cache._knobs, token_budget=512))
    assert [cache.rows[index].token_budget for index in (own, following)] == [256, 512]
    assert cache.rows[following].selected_pages(32) == 15


def test_integrity_notices_a_lost_block(make_cache: MakeCache) -> None:
    cache = make_cache(lane_blocks=4, num_frames=4)
    index = cache.add(300, method=SparseMethod.DENSE, token_budget=None)
    blocks = cache.rows[index].blocks
    blocks.drop(blocks.counts_L - 1)
    with pytest.raises(AssertionError):
        cache.check_integrity()
