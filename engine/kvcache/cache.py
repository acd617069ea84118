"""The KV cache of all requests: who owns which frames, blocks and slots, and when they move.

Everything here runs on the host between forward passes; the lane-wide updates it asks for are
done by ``tables`` on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sparsed.core import BLOCK_TOKENS, CapacityError, Knobs, SparseDetails, SparseMethod
from sparsed.engine.kvcache.dram import DramPool
from sparsed.engine.kvcache.geometry import Geometry, num_frames
from sparsed.engine.kvcache.hbm import LOCKED_STEP, HotArena
from sparsed.engine.kvcache.lane_blocks import LaneBlocks
from sparsed.engine.kvcache.quotas import Demand, divide_blocks, level
from sparsed.engine.kvcache.row import Row
from sparsed.engine.kvcache.tables import PageTables
from sparsed.engine.kvcache.transfer import Transfer
from sparsed.engine.kvcache.upload import upload
from sparsed.engine.sparse.base import Selector
from sparsed.kernels.resolve import MAX_SLOTS


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
        self._knobs = knobs
        self._device = arena.pages_NX.device
        self._free_rows = list(range(knobs.max_num_seqs - 1, -1, -1))

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
        mandatory = self._mandatory_blocks(num_tokens, method=method, token_budget=budget)
        need = mandatory * self.geometry.num_lanes
        return need <= len(self.arena.blocks) + self._reclaimable_blocks()

    def add(self, num_tokens: int, *, method: SparseMethod, token_budget: int | None) -> int:
        """Reserve both tiers for a request of ``num_tokens`` (prompt and output); its row.
        ``token_budget`` None follows the knob."""
        assert self.can_admit(num_tokens, method=method, token_budget=token_budget)
        frames = self.pool.frames.take(num_frames(num_tokens))
        row = Row(
            index=self._free_rows.pop(),
            max_tokens=num_tokens,
            method=method,
            own_budget=token_budget,
            token_budget=token_budget or self._knobs.token_budget,
            frames=frames,
            blocks=LaneBlocks(self.geometry.num_lanes),
        )
        self.rows[row.index] = row
        self.tables.open(row.index, upload(frames, device=self._device))
        mandatory = self._mandatory_of(row)
        self._reclaim(mandatory * self.geometry.num_lanes)
        self._resize(row, mandatory)
        return row.index

    def free(self, index: int) -> None:
        """Give everything of the row back."""
        row = self.rows.pop(index)
        self.transfer.wait_for_saves()  # or a late one lands in the next owner's frames
        self._resize(row, 0)
        self.pool.frames.give(row.frames)
        self.tables.clear(index, upload(row.frames, device=self._device))
        self._free_rows.append(index)

    def apply(self, knobs: Knobs) -> None:
        """Take new budgets; rows above a lowered ``hbm_budget`` shrink now."""
        self._knobs = knobs
        for row in self.rows.values():
            row.token_budget = row.own_budget or knobs.token_budget
            if row.num_blocks > self._quota_blocks(row):
                self._resize(row, self._quota_blocks(row))

    def details(self, index: int, *, num_dropped: int = 0) -> SparseDetails:
        """What sparsity did to a request; ``num_dropped`` (0 or 1) newest steps do not count."""
        row = self.rows[index]
        reads = row.reads_before if num_dropped else row.reads
        return SparseDetails(
            method=row.method.value,
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
        """Give slots to the pages of positions start .. end - 1, as far as the quota reaches.
        A page that stays partial always gets one, and is locked."""
        row, page_size = self.rows[index], self.geometry.page_size
        first_page, last_page = -(-start // page_size), -(-end // page_size)  # begun here
        open_page = start // page_size if start % page_size else None
        if row.complete:
            self._place_in_order(row, last_page)
            slots = self.tables.slots_of(index, first_page, min(last_page, row.num_placed))
            self.arena.slot_step_N.index_fill_(0, slots.flatten().long(), step)
        if end % page_size:
            if not row.complete and open_page != last_page - 1:
                self._place_page(row, last_page - 1)
            self._set_step(row, last_page - 1, LOCKED_STEP)
        if open_page is not None and open_page < end // page_size:
            self._set_step(row, open_page, step)  # this chunk fills it: no longer locked

    def make_room(self, index: int, position: int) -> None:
        """Before a decode step: give the row the block that ``position`` begins, if there is one
        to be had."""
        row = self.rows[index]
        if row.complete:
            self._place_in_order(row, position // self.geometry.page_size + 1)
        elif position % BLOCK_TOKENS == 0:  # also what others have given back meanwhile
            self._grow(row, self._quota_blocks(row))

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

    # -- blocks ------------------------------------------------------------------------------

    def rebalance(self, index: int, demand: Demand) -> None:
        """Move blocks from lanes that gain little of them to lanes that gain more, in a row that
        is not complete."""
        row, geometry = self.rows[index], self.geometry
        assert not row.complete
        counts_L = row.blocks.counts_L.copy()
        selecting = slice(self._knobs.dense_layers * geometry.num_kv_heads, None)
        counts_L[selecting] = divide_blocks(
            demand.of(selecting),
            counts_L[selecting],
            pages_per_block=geometry.pages_per_block,
            selected_pages=row.selected_pages(geometry.page_size),
            least=self._mandatory_of(row),
            most=self._most_of(row),
        )
        if (counts_L != row.blocks.counts_L).any():
            self._divide(row, counts_L)

    def _mandatory_of(self, row: Row) -> int:
        return self._mandatory_blocks(
            row.max_tokens, method=row.method, token_budget=row.token_budget
        )

    def _mandatory_blocks(self, num_tokens: int, *, method: SparseMethod, token_budget: int) -> int:
        """Blocks per lane a request cannot go without: its selection and the partial page, or
        everything where attention is dense; all there are if it asks for more."""
        wanted = num_frames(num_tokens)
        if method is not SparseMethod.DENSE:
            wanted = min(wanted, num_frames(token_budget) + 1)
        return max(1, min(wanted, self._lane_blocks))

    @property
    def _lane_blocks(self) -> int:
        """Blocks per lane that the arena has for one request alone."""
        return self.arena.blocks.size // self.geometry.num_lanes

    def _quota_blocks(self, row: Row) -> int:
        """Blocks per lane ``row`` may hold: the knob, or an even share of the arena."""
        budget = self._knobs.hbm_budget
        share = self._lane_blocks // max(1, len(self.rows))
        quota = share if budget is None else num_frames(budget)
        return max(min(quota, self._most_of(row)), self._mandatory_of(row))

    def _most_of(self, row: Row) -> int:
        """Blocks that a lane of ``row`` can use: all of the request, or where it selects as many
        slots as ``resolve_pages`` looks through."""
        if row.method is SparseMethod.DENSE:
            return len(row.frames)
        return min(len(row.frames), MAX_SLOTS // self.geometry.pages_per_block)

    def _reclaimable_blocks(self) -> int:
        """Blocks above the shares that hold once another request is there."""
        share = self._lane_blocks // (len(self.rows) + 1)
        above = 0
        for row in self.rows.values():
            floor = max(share, self._mandatory_of(row))
            above += max(0, row.num_blocks - floor)
        return above * self.geometry.num_lanes

    def _reclaim(self, wanted: int) -> None:
        """Shrink the largest rows to their shares until ``wanted`` blocks are free."""
        share = self._lane_blocks // len(self.rows)
        for row in sorted(self.rows.values(), key=lambda row: -row.num_blocks):
            if len(self.arena.blocks) >= wanted:
                return
            floor = max(share, self._mandatory_of(row))
            if row.num_blocks > floor:
                self._resize(row, floor)

    def _grow(self, row: Row, wanted_blocks: int) -> None:
        """Take blocks up to ``wanted_blocks`` per lane, as far as quota and arena allow."""
        room = len(self.arena.blocks) // self.geometry.num_lanes
        target = min(
            wanted_blocks, self._quota_blocks(row), row.num_blocks + room, self._most_of(row)
        )
        if target > row.num_blocks:
            self._resize(row, target)

    def _resize(self, row: Row, num_blocks: int) -> None:
        """Bring ``row`` to so many blocks per lane; unequal lanes lose and gain alike."""
        least = min(self._mandatory_of(row), num_blocks)
        total = num_blocks * self.geometry.num_lanes
        counts_L = row.blocks.counts_L
        self._divide(row, level(counts_L, total, least=least, most=self._most_of(row)))

    def _divide(self, row: Row, counts_L: npt.NDArray[np.int64]) -> None:
        """Give each lane so many blocks. Lanes lose their last ones: where a row is complete,
        pages of the last block placed may be yet to begin, and they leave with it."""
        blocks, kept_L = row.blocks, np.minimum(row.blocks.counts_L, counts_L)
        first = int(kept_L.min())
        leaving_Ln = blocks.drop(kept_L)
        self.arena.blocks.give(leaving_Ln[leaving_Ln >= 0])
        blocks.add(self.arena.blocks.take(int((counts_L - kept_L).sum())), counts_L - kept_L)
        self.tables.set_blocks(
            row.index,
            first,
            upload(blocks.ids_LN[:, first:], device=self._device),
            upload(counts_L, device=self._device),
        )
        if leaving_Ln.size:
            leaving = upload(leaving_Ln, device=self._device)
            self.tables.release(self.arena, row.index, leaving, max_blocks=blocks.most)
        if row.num_placed > blocks.least * self.geometry.pages_per_block:
            row.complete = False

    # -- slots -------------------------------------------------------------------------------

    def _place_in_order(self, row: Row, last_page: int) -> None:
        """Place all pages of the blocks up to that of page ``last_page - 1`` in their slots;
        incomplete when they do not fit."""
        if last_page > row.num_placed:
            per_block = self.geometry.pages_per_block
            self._grow(row, -(-last_page // per_block))
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
