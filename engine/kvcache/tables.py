"""Which page of which lane is where: the page tables of all rows, on the device.

Scalars are written by ``index_fill_``: assigned through an index they would wait for the device.

Shape legend: R rows (requests), L layers, H KV heads, F frames of a row, M frames of the pool and
the spare one, X page rows, N slots of the arena or blocks of a lane, P pages of a block, B rows of
a batch, n some of the pages or blocks, S slots of a lane.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsed.engine.kvcache.geometry import Geometry, num_frames
from sparsed.engine.kvcache.hbm import FREE_STEP, LOCKED_STEP, HotArena, slots_of_blocks
from sparsed.engine.kvcache.totals import DeviceCounters
from sparsed.engine.kvcache.upload import upload
from sparsed.kernels.tables import PageTables as DeviceTables


class PageTables:
    """A page table in two levels, and the blocks of every lane; all int32.

    ``frames_RF`` (R + 1, F) is the directory: the frame of each 128 tokens of a row, the spare
    frame (id: frames of the pool) where it has none; the last row belongs to nobody.
    ``page_slot_X``: the slot of each page row, -1 if absent. The page rows of a frame are the
    segment that comes and goes with it, so that tables grow with the tokens there are, not with
    rows times the longest request; ``page_slot_MLHP`` is the same, segment by segment. The first
    entry of the spare segment takes the writes of lanes that have nothing to write: readers mask.
    ``lane_blocks_RLHN`` (R + 1, L, H, F): arena blocks a lane owns, in order, -1 after the last of
    its ``num_blocks_RLH``. Slot s of a lane is ``lane_blocks[s // P] * P + s % P``.
    ``window_RLH`` (R + 1, L, H): pages of a lane that its newest steps used, as
    ``kernels.resolve.Resolved`` has it; 0 where the newest step selected nothing. ``demand_RLH2``
    as there, over all steps of a row since it was last read.
    ``displaced``: pages that lost their slot to a shrinking row or to a page that had to be open;
    selections count theirs themselves, and a request that ends evicts nothing.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        num_rows: int,
        max_model_len: int,
        pool_frames: int,
        device: torch.device,
    ) -> None:
        lanes = (geometry.num_layers, geometry.num_kv_heads)
        columns, per_block = num_frames(max_model_len), geometry.pages_per_block
        self._geometry = geometry
        self.spare_entry = pool_frames * geometry.page_rows_per_frame
        self.spare_row = num_rows
        self.spare_frame = pool_frames
        self.frames_RF = _filled((num_rows + 1, columns), pool_frames, device=device)
        self.page_slot_MLHP = _filled((pool_frames + 1, *lanes, per_block), -1, device=device)
        self.page_slot_X = self.page_slot_MLHP.view(-1)
        self.lane_blocks_RLHN = _filled((num_rows + 1, *lanes, columns), -1, device=device)
        self.num_blocks_RLH = _filled((num_rows + 1, *lanes), 0, device=device)
        self.window_RLH = torch.zeros_like(self.num_blocks_RLH)
        self.demand_RLH2 = _filled((num_rows + 1, *lanes, 2), 0, device=device)
        self.displaced = DeviceCounters(1, device=device)
        self._head_H = torch.arange(geometry.num_kv_heads, device=device)
        self._lane_LH = torch.arange(geometry.num_lanes, device=device).view(lanes)

    def with_arena(self, arena: HotArena) -> DeviceTables:
        """The same tensors, and those of the arena's slots, as kernels take them."""
        return DeviceTables(
            self.frames_RF,
            self.page_slot_X,
            self.lane_blocks_RLHN,
            self.num_blocks_RLH,
            arena.slot_page_N,
            arena.slot_step_N,
        )

    # -- rows --------------------------------------------------------------------------------

    def open(self, row: int, frames_F: Tensor) -> None:
        """Note the frames of a new request."""
        self.demand_RLH2[row].zero_()
        self.frames_RF[row, : len(frames_F)] = frames_F

    def clear(self, row: int, frames_F: Tensor) -> None:
        """Forget everything about ``row``, whose frames these are; its slots must have been
        released."""
        self.clear_slots(row, frames_F)
        self.frames_RF[row].fill_(self.spare_frame)

    def clear_slots(self, row: int, frames_F: Tensor) -> None:
        """No page of ``row``, whose frames these are, has a slot any longer; they have been
        released."""
        self.page_slot_MLHP.index_fill_(0, frames_F, -1)
        self.forget_window(row)

    def forget_window(self, row: int) -> None:
        """What the steps of ``row`` used until now is in its window no longer."""
        self.window_RLH[row].fill_(0)

    def set_blocks(self, row: int, first_block: int, blocks_Ln: Tensor, counts_L: Tensor) -> None:
        """Note the blocks of every lane of ``row`` from its ``first_block``-th on, -1 after the
        last, and how many it has; before that, and after all, nothing has changed."""
        lanes = self.num_blocks_RLH.shape[1:]
        last_block = first_block + blocks_Ln.shape[1]
        self.lane_blocks_RLHN[row, :, :, first_block:last_block] = blocks_Ln.view(*lanes, -1)
        self.num_blocks_RLH[row] = counts_L.view(lanes)

    # -- page rows and slots -----------------------------------------------------------------

    def page_rows(self, row: int, first_page: int, last_page: int) -> Tensor:
        """Page rows (L, H, n), int64, of pages first_page .. last_page - 1, in the DRAM tier and
        among the summaries."""
        pages_n = torch.arange(first_page, last_page, device=self.frames_RF.device)
        return self._page_rows(row, self._lane_LH[..., None], pages_n)

    def layer_page_rows(self, row: int, layer: int, first_page: int, last_page: int) -> Tensor:
        """Page rows (H, n), int64, of pages first_page .. last_page - 1 in one layer of ``row``."""
        pages_n = torch.arange(first_page, last_page, device=self.frames_RF.device)
        lanes_H1 = (layer * self._geometry.num_kv_heads + self._head_H)[:, None]
        return self._page_rows(row, lanes_H1, pages_n)

    def page_rows_at(self, rows_B: Tensor, pages_B: Tensor) -> Tensor:
        """Page rows (B, L, H) of one page of each row."""
        return self._page_rows(rows_B[:, None, None], self._lane_LH[None], pages_B[:, None, None])

    def selected_page_rows(self, rows_B: Tensor, layer: int, pages_BHK: Tensor) -> Tensor:
        """Page rows (B, H, K) of selected pages."""
        lanes_H1 = (layer * self._geometry.num_kv_heads + self._head_H)[:, None]
        return self._page_rows(rows_B[:, None, None], lanes_H1, pages_BHK)

    def slots_of(self, row: int, first_page: int, last_page: int) -> Tensor:
        """Slots (L, H, n) of pages first_page .. last_page - 1, all lanes of ``row``."""
        return self.page_slot_X[self.page_rows(row, first_page, last_page)]

    def selected_slots(self, rows_B: Tensor, layer: int, pages_BHK: Tensor) -> Tensor:
        """Slots (B, H, K) of selected pages, -1: absent."""
        return self.page_slot_X[self.selected_page_rows(rows_B, layer, pages_BHK)]

    def slots_at(self, rows_B: Tensor, pages_B: Tensor) -> Tensor:
        """Slots (L, B, H), contiguous, of one page of each row; -1 for the spare row."""
        slots_BLH = self.page_slot_X[self.page_rows_at(rows_B, pages_B)]
        slots_BLH.masked_fill_((rows_B == self.spare_row)[:, None, None], -1)
        return slots_BLH.transpose(0, 1).contiguous()

    def slots_in_order(self, rows_B: Tensor, layer: int, num_pages: int) -> Tensor:
        """Slots (B, H, num_pages) of the first pages; anything where a row has no frame."""
        frames_BF = self.frames_RF[rows_B, : -(-num_pages // self._geometry.pages_per_block)]
        slots_BFHP = self.page_slot_MLHP[frames_BF.long(), layer]
        return slots_BFHP.transpose(1, 2).flatten(2)[..., :num_pages].contiguous()

    def page_slots(self, frame: int, page: int) -> Tensor:
        """Slots (L, H) of a page whose frame is known: a view."""
        return self.page_slot_MLHP[frame, :, :, page % self._geometry.pages_per_block]

    def _page_rows(self, rows: Tensor | int, lanes: Tensor, pages: Tensor) -> Tensor:
        """Page rows, int64: rows, lanes (``layer * H + head``) and pages broadcast."""
        per_block = self._geometry.pages_per_block
        frames = self.frames_RF[rows, pages // per_block].long()
        return (frames * self._geometry.num_lanes + lanes) * per_block + pages % per_block

    def _owned_slots(self, blocks: Tensor, num_blocks: Tensor) -> Tensor:
        """Slots (..., S), int64, of lanes with ``blocks`` (..., n); negative beyond their
        ``num_blocks`` (...)."""
        places_n = torch.arange(blocks.shape[-1], device=blocks.device)
        owned = torch.where(places_n < num_blocks[..., None], blocks, -1).long()
        return slots_of_blocks(owned, pages_per_block=self._geometry.pages_per_block)

    # -- placing -----------------------------------------------------------------------------

    def place_in_order(self, arena: HotArena, row: int, first_block: int, last_block: int) -> None:
        """Give every page of blocks first_block .. last_block - 1 its slot, page i the lane's i-th
        (a lane that holds every page). Until it is begun a page has ``FREE_STEP``."""
        per_block = self._geometry.pages_per_block
        blocks_LHn = self.lane_blocks_RLHN[row, :, :, first_block:last_block]
        slots_LHS = slots_of_blocks(blocks_LHn, pages_per_block=per_block)
        frames_n = self.frames_RF[row, first_block:last_block].long()
        slots_LHnP = slots_LHS.view(*blocks_LHn.shape, per_block)
        self.page_slot_MLHP.index_copy_(0, frames_n, slots_LHnP.permute(2, 0, 1, 3))
        pages_S = torch.arange(
            first_block * per_block,
            last_block * per_block,
            dtype=torch.int32,
            device=blocks_LHn.device,
        )
        arena.slot_page_N[slots_LHS.long()] = pages_S.expand(slots_LHS.shape)

    def place_page(self, arena: HotArena, row: int, page: int, *, max_blocks: int) -> None:
        """Lock a slot for ``page`` in every lane of ``row``, none of which owns more than
        ``max_blocks``: a free one, else the oldest."""
        owned_LHS = self._owned_slots(
            self.lane_blocks_RLHN[row, :, :, :max_blocks], self.num_blocks_RLH[row]
        )
        victim_LH1 = _oldest(arena, owned_LHS)
        evicted_LH1 = arena.slot_page_N[victim_LH1].long()
        self._forget(row, self._lane_LH[..., None], evicted_LH1)
        page_rows_LH1 = self.page_rows(row, page, page + 1)
        self.page_slot_X[page_rows_LH1] = victim_LH1.int()
        self.displaced.values_C += (evicted_LH1 >= 0).sum()
        arena.slot_page_N.index_fill_(0, victim_LH1.flatten(), page)
        arena.slot_step_N.index_fill_(0, victim_LH1.flatten(), LOCKED_STEP)

    def are_in_place(self, row: int, first_page: int, last_page: int) -> Tensor:
        """Of pages first_page .. last_page - 1, the first of a block and so on: whether they are in
        the slots that ``place_in_order`` gives them, (L, H, n)."""
        per_block = self._geometry.pages_per_block
        blocks = slice(first_page // per_block, -(-last_page // per_block))
        slots_LHS = slots_of_blocks(
            self.lane_blocks_RLHN[row, :, :, blocks], pages_per_block=per_block
        )
        slots_LHn = self.slots_of(row, first_page, last_page)
        return slots_LHn == slots_LHS[..., : last_page - first_page]

    def vacate(
        self,
        arena: HotArena,
        row: int,
        first_block: int,
        last_block: int,
        *,
        partial_page: int | None,
    ) -> None:
        """Empty the slots of blocks first_block .. last_block - 1 of every lane of ``row``, and
        those that the pages of these blocks, and the partial page, have elsewhere."""
        per_block, lane_LH1 = self._geometry.pages_per_block, self._lane_LH[..., None]
        blocks_LHn = self.lane_blocks_RLHN[row, :, :, first_block:last_block]
        slots_LHS = slots_of_blocks(blocks_LHn, pages_per_block=per_block).long()
        pages_LHS = arena.slot_page_N[slots_LHS].long()
        begun_LHS = (pages_LHS >= 0) & (arena.slot_step_N[slots_LHS] != FREE_STEP)
        first_page, last_page = first_block * per_block, last_block * per_block
        leave_LHS = (pages_LHS < first_page) | (pages_LHS >= last_page)
        if partial_page is not None:
            leave_LHS &= pages_LHS != partial_page
        self.displaced.values_C += (begun_LHS & leave_LHS).sum()
        self._forget(row, lane_LH1, pages_LHS)
        pages = [*range(first_page, last_page), *([] if partial_page is None else [partial_page])]
        pages_P = upload(pages, device=slots_LHS.device)
        elsewhere_LHP = self.page_slot_X[self._page_rows(row, lane_LH1, pages_P)].long()
        self._forget(row, lane_LH1, pages_P.expand(elsewhere_LHP.shape))
        # Where a page has none, the first slot of the block that is nobody's.
        emptied = torch.cat((slots_LHS, elsewhere_LHP.clamp(min=0)), dim=-1).flatten()
        arena.slot_page_N.index_fill_(0, emptied, -1)
        arena.slot_step_N.index_fill_(0, emptied, FREE_STEP)

    def _forget(self, rows: Tensor | int, lanes: Tensor, pages: Tensor) -> None:
        """These pages have no slot any longer; negative: nothing to forget."""
        entries = self._page_rows(rows, lanes, pages.clamp(min=0))
        entries = torch.where(pages >= 0, entries, self.spare_entry)
        self.page_slot_X.index_fill_(0, entries.flatten(), -1)

    # -- release -----------------------------------------------------------------------------

    def release(self, arena: HotArena, row: int, leaving_Ln: Tensor, *, max_blocks: int) -> None:
        """Drop the pages in blocks that lanes of ``row`` own no longer (-1: none). The page that is
        locked in one moves to the oldest slot that its lane still owns, one of ``max_blocks``
        blocks; 0: the row has none left, and ``clear`` or ``clear_slots`` is to follow."""
        lanes, per_block = self.num_blocks_RLH.shape[1:], self._geometry.pages_per_block
        slots_LHS = slots_of_blocks(leaving_Ln.view(*lanes, -1), pages_per_block=per_block)
        is_slot_LHS = slots_LHS >= 0
        slots_LHS = slots_LHS.clamp(min=0)  # the first slot of the block that is nobody's
        if max_blocks:
            self._move_locked(arena, row, slots_LHS, is_slot_LHS, max_blocks)
            pages_LHS = torch.where(is_slot_LHS, arena.slot_page_N[slots_LHS].long(), -1)
            begun_LHS = (pages_LHS >= 0) & (arena.slot_step_N[slots_LHS] != FREE_STEP)
            self.displaced.values_C += begun_LHS.sum()
            self._forget(row, self._lane_LH[..., None], pages_LHS)
        arena.slot_page_N.index_fill_(0, slots_LHS.flatten(), -1)
        arena.slot_step_N.index_fill_(0, slots_LHS.flatten(), FREE_STEP)

    def _move_locked(
        self, arena: HotArena, row: int, slots_LHS: Tensor, is_slot_LHS: Tensor, max_blocks: int
    ) -> None:
        """Lanes with a locked page, one at most, in these slots give it the oldest of their own.
        Others move what is in nobody's first slot to where it is."""
        is_locked_LHS = (arena.slot_step_N[slots_LHS] == LOCKED_STEP) & is_slot_LHS
        is_moved_LH1 = is_locked_LHS.any(dim=-1, keepdim=True)
        source_LH1 = slots_LHS.gather(-1, is_locked_LHS.byte().argmax(dim=-1, keepdim=True))
        owned_LHS = self._owned_slots(
            self.lane_blocks_RLHN[row, :, :, :max_blocks], self.num_blocks_RLH[row]
        )
        source_LH1 = torch.where(is_moved_LH1, source_LH1, 0)
        target_LH1 = torch.where(is_moved_LH1, _oldest(arena, owned_LHS), 0)
        page_LH1 = torch.where(is_moved_LH1, arena.slot_page_N[source_LH1].long(), -1)
        evicted_LH1 = torch.where(is_moved_LH1, arena.slot_page_N[target_LH1].long(), -1)
        self.displaced.values_C += (evicted_LH1 >= 0).sum()
        self._forget(row, self._lane_LH[..., None], evicted_LH1)
        entries_LH1 = self._page_rows(row, self._lane_LH[..., None], page_LH1.clamp(min=0))
        entries_LH1 = torch.where(is_moved_LH1, entries_LH1, self.spare_entry)
        self.page_slot_X[entries_LH1] = target_LH1.int()
        arena.pages_NX[target_LH1] = arena.pages_NX[source_LH1]
        arena.slot_step_N[target_LH1] = torch.where(is_moved_LH1, LOCKED_STEP, FREE_STEP).int()
        arena.slot_page_N[target_LH1] = page_LH1.int()
        arena.slot_page_N.index_fill_(0, source_LH1.flatten(), -1)
        arena.slot_step_N.index_fill_(0, source_LH1.flatten(), FREE_STEP)


def _filled(shape: tuple[int, ...], value: int, *, device: torch.device) -> Tensor:
    return torch.full(shape, value, dtype=torch.int32, device=device)


def _ages(arena: HotArena, owned: Tensor) -> Tensor:
    """Last use of slots; those that no lane owns (negative) are not to be taken."""
    steps = arena.slot_step_N[owned.clamp(min=0)]
    return torch.where(owned >= 0, steps, LOCKED_STEP)


def _oldest(arena: HotArena, owned: Tensor) -> Tensor:
    """The slot (..., 1) of each lane that is free, else the one used longest ago. ``owned``
    (..., S)."""
    return owned.gather(-1, _ages(arena, owned).argmin(dim=-1, keepdim=True))
