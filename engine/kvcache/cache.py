"""The KV cache of all requests: who owns which frames, blocks and slots, and when they move.

Everything here runs on the host between forward passes; the lane-wide updates it asks for are
done by ``tables`` on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from sparsed.core import BLOCK_TOKENS, CapacityError, Knobs, SparseDetails, SparseMethod
from sparsed.engine.kvcache.block_owners import BlockOwners
from sparsed.engine.kvcache.claims import Claims
from sparsed.engine.kvcache.dram import DramPool
from sparsed.engine.kvcache.geometry import Geometry, num_frames
from sparsed.engine.kvcache.hbm import LOCKED_STEP, HotArena
from sparsed.engine.kvcache.lane_blocks import LaneBlocks
from sparsed.engine.kvcache.quotas import Demand
from sparsed.engine.kvcache.regrowth import Regrowth
from sparsed.engine.kvcache.row import Row
from sparsed.engine.kvcache.shares import Shares
from sparsed.engine.kvcache.spill import SpillPaths
from sparsed.engine.kvcache.tables import PageTables
from sparsed.engine.kvcache.transfer import Transfer
from sparsed.engine.kvcache.upload import upload
from sparsed.engine.sparse.base import Selector
from sparsed.engine.sparse.kept import KeptPages


class KVCache:
    """Admits requests to both tiers, gives pages their slots, seals full pages, frees.

    Not thread-safe: owned by the thread that runs the engine's steps.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        arena: HotArena,
        pool: DramPool,
        tables: PageTables,
        selector: Selector | None,
        transfer: Transfer,
        knobs: Knobs,
    ) -> None:
        self.geometry = geometry
        self.arena = arena
        self.pool = pool
        self.tables = tables
        self.selector = selector
        self.transfer = transfer
        self.rows: dict[int, Row] = {}
        self.shares = Shares(
            self.rows, geometry=geometry, num_blocks=arena.blocks.size, knobs=knobs
        )
        self._device = arena.pages_NX.device
        self.kept = KeptPages(
            geometry, num_rows=tables.spare_row + 1, knobs=knobs, device=self._device
        )
        self._free_rows = list(range(knobs.max_num_seqs - 1, -1, -1))
        self._blocks = BlockOwners(geometry, arena=arena, tables=tables, shares=self.shares)
        self._paths = SpillPaths(arena, pool, tables, transfer)
        self._regrowth = Regrowth(
            geometry,
            arena=arena,
            tables=tables,
            shares=self.shares,
            blocks=self._blocks,
            paths=self._paths,
        )
        self.claims = Claims(
            self.rows,
            geometry=geometry,
            tables=tables,
            shares=self.shares,
            transfer=transfer,
            frames=pool.frames,
            free_rows=self._free_rows,
        )

    @property
    def _knobs(self) -> Knobs:
        return self.shares.knobs

    # -- admission ---------------------------------------------------------------------------

    def check_fits(self, num_tokens: int) -> None:
        """CapacityError if a request of ``num_tokens`` could not run even alone."""
        if num_tokens > self._knobs.max_model_len:
            raise CapacityError(
                f"prompt plus output of {num_tokens} tokens exceeds max_model_len="
                f"{self._knobs.max_model_len}; shorten the request",
                field="max_model_len",
            )
        if num_frames(num_tokens) > self.pool.frames.size:
            room = self.pool.frames.size * BLOCK_TOKENS
            raise CapacityError(
                f"prompt plus output of {num_tokens} tokens exceeds the DRAM tier, which holds "
                f"{room} tokens; shorten the request or raise kv_dram_gib",
                field="kv_dram_gib",
            )

    def can_admit(self, num_tokens: int, *, method: SparseMethod, token_budget: int | None) -> bool:
        """Frames for the whole life of the request and its mandatory blocks are free, or can be
        taken back from requests that hold more than their share."""
        if not self._free_rows or num_frames(num_tokens) > len(self.pool.frames):
            return False
        budget = token_budget or self._knobs.token_budget
        need = self.shares.mandatory(num_tokens, method=method, token_budget=budget)
        return need * self.geometry.num_lanes <= len(self.arena.blocks) + self._blocks.reclaimable

    def add(self, num_tokens: int, *, method: SparseMethod, token_budget: int | None) -> int:
        """Reserve both tiers for a request of ``num_tokens`` (prompt and output); its row.
        ``token_budget`` None follows the knob."""
        assert self.can_admit(num_tokens, method=method, token_budget=token_budget)
        frames = self.pool.frames.take(num_frames(num_tokens))
        row = Row(
            index=self._free_rows.pop(),
            max_tokens=num_tokens,
            method=method,
            admitted_as=method,
            own_budget=token_budget,
            token_budget=token_budget or self._knobs.token_budget,
            frames=frames,
            blocks=LaneBlocks(self.geometry.num_lanes),
        )
        self.rows[row.index] = row
        self.tables.open(row.index, upload(frames, device=self._device))
        self._blocks.give_mandatory(row)
        return row.index

    def free(self, index: int) -> None:
        """Give everything of the row back."""
        row = self.rows.pop(index)
        self._regrowth.forget(row)
        self.transfer.wait_for_saves()  # or a late one lands in the next owner's frames
        self._blocks.resize(row, 0)
        self.pool.frames.give(row.frames)
        self.tables.clear(index, upload(row.frames, device=self._device))
        self._free_rows.append(index)
        self._blocks.forget()

    def spill(self, index: int, num_tokens: int) -> None:
        """Give up all blocks of a row that has computed ``num_tokens``; it keeps its frames, and
        takes part in no step before ``restore``."""
        row, page_size = self.rows[index], self.geometry.page_size
        assert not row.is_spilled, "spilled twice"
        if num_tokens % page_size:
            self._paths.save(index, num_tokens // page_size)
        self._regrowth.forget(row)
        self._blocks.resize(row, 0)
        self.tables.clear_slots(index, upload(row.frames, device=self._device))
        row.is_spilled, row.complete, row.num_placed = True, False, 0
        row.steps_in_row = 0
        self._blocks.forget()

    def can_restore(self, index: int) -> bool:
        """Whether the mandatory blocks of a spilled row are free, or can be taken back."""
        need = self.shares.mandatory_of(self.rows[index]) * self.geometry.num_lanes
        return need <= len(self.arena.blocks) + self._blocks.reclaimable

    def restore(self, index: int, num_tokens: int) -> None:
        """Bring a spilled row back with its mandatory blocks: with all of its pages if they hold
        them, else with the partial page alone, and what its steps select."""
        row, geometry = self.rows[index], self.geometry
        assert row.is_spilled and self.can_restore(index)
        row.is_spilled = False
        self._blocks.give_mandatory(row)
        last_page = -(-num_tokens // geometry.page_size)
        is_partial = num_tokens % geometry.page_size > 0
        first_page = last_page - is_partial
        if last_page <= row.num_blocks * geometry.pages_per_block:
            first_page = 0
            self._place_in_order(row, last_page)
        elif is_partial:
            self._place_page(row, first_page)
        if first_page < last_page:
            self._paths.load(index, first_page, last_page, is_partial=is_partial)

    def recalls(self, index: int) -> Sequence[float]:
        """Attention recall of a request as sampled so far."""
        return self.rows[index].recalls

    def set_attention(self, index: int, *, token_budget: int, is_dense: bool) -> None:
        """Have a row select so much from its next step on, or read everything."""
        row = self.rows[index]
        row.own_budget = row.token_budget = token_budget
        row.method = SparseMethod.DENSE if is_dense else row.admitted_as
        if not row.is_spilled:
            self._blocks.grow(row, self.shares.whole(row))

    def apply(self, knobs: Knobs) -> None:
        """Take new budgets; rows above an ``hbm_budget`` that is a number shrink now."""
        self.shares.knobs = knobs
        self.kept.apply(knobs)
        for row in self.rows.values():
            row.token_budget = row.own_budget or knobs.token_budget
            if row.num_blocks > self.shares.quota(row):
                self._blocks.resize(row, self.shares.quota(row))

    def details(self, index: int, *, num_dropped: int = 0) -> SparseDetails:
        """What sparsity did to a request; ``num_dropped`` (0 or 1) newest steps do not count."""
        row = self.rows[index]
        reads = row.reads_before if num_dropped else row.reads
        return SparseDetails(
            method=row.admitted_as.value,
            token_budget=row.token_budget,
            decode_steps=reads.decode_steps,
            sparse_steps=reads.sparse_steps,
            tokens_read=reads.tokens_read,
            tokens_dense=reads.tokens_dense,
            coverage=float(np.mean(row.recalls)) if row.recalls else None,
            replayed=reads.replayed_steps > 0,
        )

    @property
    def metadata_bytes(self) -> int:
        """Bytes of the summaries of all frames in use, full or yet to fill."""
        if self.selector is None:
            return 0
        frames = self.pool.frames
        return self.selector.store_bytes // (frames.size + 1) * (frames.size - len(frames))

    # -- pages -------------------------------------------------------------------------------

    def open_chunk(self, index: int, start: int, end: int, *, step: int) -> None:
        """Give slots to the pages of positions start .. end - 1, as far as blocks that are its own
        or free reach. A page that stays partial always gets one, and is locked."""
        row, page_size = self.rows[index], self.geometry.page_size
        row.num_tokens = end
        first_page, last_page = -(-start // page_size), -(-end // page_size)  # begun here
        open_page = start // page_size if start % page_size else None
        if row.complete:
            self._blocks.take_free(row, num_frames(end))
            self._place_in_order(row, last_page)
            slots = self.tables.slots_of(index, first_page, min(last_page, row.num_placed))
            self.arena.slot_step_N.index_fill_(0, slots.flatten().long(), step)
        if end % page_size:
            if not row.complete and open_page != last_page - 1:
                self._place_page(row, last_page - 1)
            self._set_step(row, last_page - 1, LOCKED_STEP)
        if open_page is not None and open_page < end // page_size:
            self._set_step(row, open_page, step)  # this chunk fills it: no longer locked

    def reserve(self, index: int, end: int) -> None:
        """Before a step is planned: take the blocks for a chunk that ends with position end - 1,
        from others too. While a step is planned and run nobody loses any."""
        row = self.rows[index]
        row.num_tokens = end
        if row.complete:
            self._blocks.grow(row, num_frames(end))

    def make_room(self, index: int, position: int) -> None:
        """Before a decode step: give the row the block that ``position`` begins, if there is one
        to be had."""
        row = self.rows[index]
        row.num_tokens = position + 1
        if row.complete:
            self._blocks.grow(row, num_frames(position + 1))
            self._place_in_order(row, position // self.geometry.page_size + 1)
        elif position % BLOCK_TOKENS == 0:  # also what others have given back meanwhile
            self._blocks.grow(row, self.shares.whole(row))

    def open_token(self, index: int, position: int) -> None:
        """Give a locked slot to the page of ``position`` if the token is its first; where a step
        does not do that itself."""
        row, page_size = self.rows[index], self.geometry.page_size
        if position % page_size:
            return
        page = position // page_size
        if not row.complete:
            self._place_page(row, page)
        self._set_step(row, page, LOCKED_STEP)

    def seal(self, pages: Sequence[tuple[int, int]], *, step: int) -> None:
        """Write full (row, page) pairs through to the DRAM tier and summarise them."""
        if not pages:
            return
        rows_M, pages_M = upload(np.array(pages).T, device=self._device)
        rows = self.tables.page_rows_at(rows_M, pages_M).flatten()
        slots = self.tables.page_slot_X[rows].long()
        self.transfer.save(self.pool.pages_RX, self.arena.pages_NX, dst_rows=rows, src_rows=slots)
        if self.selector is not None:
            self.summarise(self.arena.pages_NTCD[slots], rows)
        self.arena.slot_step_N.index_fill_(0, slots, step)

    def summarise(self, pages_MTCD: Tensor, page_rows_M: Tensor) -> None:
        """Store the summaries of full pages; only where pages are ranked at all."""
        assert self.selector is not None
        self.selector.summarise(pages_MTCD, page_rows_M)

    def check_integrity(self) -> None:
        """AssertionError unless every frame and block is free or owned exactly once."""
        self.pool.frames.check_integrity()
        self.arena.blocks.check_integrity()
        frames = sum(len(row.frames) for row in self.rows.values())
        blocks = sum(len(row.blocks.ids_X) for row in self.rows.values())
        assert frames + len(self.pool.frames) == self.pool.frames.size
        assert blocks + len(self.arena.blocks) == self.arena.blocks.size

    def rebalance(self, index: int, demand: Demand) -> None:
        """Move blocks from lanes that gain little of them to lanes that gain more, in a row that
        is not complete; nothing happens if it was spilled meanwhile, or is (on its way to be)
        whole again."""
        row = self.rows[index]
        if not (row.is_spilled or row.complete or self._regrowth.is_at(row)):
            self._blocks.rebalance(row, demand)

    def observe(self) -> None:
        """Between any two steps: take what the device has counted of each row, resize one that is
        due, and bring one back whole where there is room for all."""
        self.claims.observe()
        self._blocks.settle()
        self._regrowth.step(self.rows)

    def rebudget(self) -> None:
        """Give every row the blocks that its misses are worth, in the steps to come."""
        self._blocks.rebudget(self.claims.curve)

    # -- slots -------------------------------------------------------------------------------

    def _place_in_order(self, row: Row, last_page: int) -> None:
        """Place all pages of the blocks up to that of page ``last_page - 1`` in their slots;
        incomplete when they do not fit."""
        if last_page > row.num_placed:
            per_block = self.geometry.pages_per_block
            first, last = (
                row.num_placed // per_block,
                min(-(-last_page // per_block), row.num_blocks),
            )
            if last > first:
                self.tables.place_in_order(self.arena, row.index, first, last)
                row.num_placed = last * per_block
        row.complete = last_page <= row.num_placed

    def _place_page(self, row: Row, page: int) -> None:
        row.complete = False
        self.tables.place_page(self.arena, row.index, page, max_blocks=row.blocks.most)

    def _set_step(self, row: Row, page: int, step: int) -> None:
        frame = int(row.frames[page // self.geometry.pages_per_block])
        slots_LH = self.tables.page_slots(frame, page)
        self.arena.slot_step_N.index_fill_(0, slots_LH.flatten().long(), step)
