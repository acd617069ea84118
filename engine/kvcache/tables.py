"""Which page of which lane is where: the page tables of all rows, on the device.

Scalars are written by ``index_fill_``: assigned through an index they would wait for the device.

Shape legend: R rows (requests), L layers, H KV heads, P pages of the longest request, F frames,
N slots of the arena, B rows of a batch, K selected pages, S slots of a lane.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsed.engine.kvcache.geometry import Geometry, num_frames
from sparsed.engine.kvcache.hbm import FREE_STEP, LOCKED_STEP, HotArena


class Fetch(NamedTuple):
    """What to load: ``target`` is the slot of each placed page (the spare slot elsewhere)."""

    target_BHK: Tensor
    placed_BHK: Tensor
    missed: Tensor  # pages that were not resident, placed or not; scalar
    evicted: Tensor  # pages that lost their slot; scalar


class Resolved(NamedTuple):
    """A selection after the residency check: where each page is (or will be once fetched), -1
    where its lane had no room. ``fetch`` None: nothing was missing."""

    slots_BHK: Tensor
    fetch: Fetch | None


class PageTables:
    """``page_slot`` (R + 1, L, H, P + 1): slot of each page, -1 if absent; the last column takes
    the writes of lanes that have nothing to write, the last row belongs to nobody and stays -1.
    ``lane_slots`` (R, L, H, P): slots a lane owns, -1 after the last. ``frames`` (R, F): DRAM frame
    of each 128 tokens. ``displaced``: pages that lost their slot to a shrinking row or to a page
    that had to be open; selections count theirs in ``Fetch``, and a request that ends evicts
    nothing."""

    def __init__(
        self, geometry: Geometry, *, num_rows: int, max_model_len: int, device: torch.device
    ) -> None:
        pages = geometry.max_pages(max_model_len)
        lanes = (num_rows, geometry.num_layers, geometry.num_kv_heads)
        self._geometry = geometry
        self._device = device
        self.spare_row = num_rows
        self.page_slot = torch.full(
            (num_rows + 1, *lanes[1:], pages + 1), -1, dtype=torch.int32, device=device
        )
        self.lane_slots = torch.full((*lanes, pages), -1, dtype=torch.int32, device=device)
        frames = num_frames(max_model_len)
        self.frames = torch.zeros((num_rows, frames), dtype=torch.int64, device=device)
        self.displaced = torch.zeros((), dtype=torch.int64, device=device)
        self._head_H = torch.arange(geometry.num_kv_heads, device=device)
        self._lane_LH = torch.arange(geometry.num_lanes, device=device).view(lanes[1:])

    def clear(self, row: int) -> None:
        """Forget everything about ``row``; its slots must have been released."""
        self.page_slot[row] = -1
        self.lane_slots[row] = -1

    def lane_base(self, rows_B: Tensor, layer: int) -> Tensor:
        """Flat index (B, H) of the first entry of each lane in ``page_slot``."""
        geometry = self._geometry
        lanes_B1 = (rows_B * geometry.num_layers + layer)[:, None] * geometry.num_kv_heads
        return (lanes_B1 + self._head_H) * self.page_slot.shape[-1]

    def slots_of(self, row: int, first_page: int, last_page: int) -> Tensor:
        """Slots (L, H, n) of pages first_page .. last_page - 1, all lanes of ``row``."""
        return self.page_slot[row, :, :, first_page:last_page]

    def page_rows(self, row: int, first_page: int, last_page: int) -> Tensor:
        """Page rows (L, H, n) of those pages in the DRAM tier and among the summaries."""
        per_block = self._geometry.pages_per_block
        pages = torch.arange(first_page, last_page, device=self._device)
        frames_n = self.frames[row, pages // per_block]
        lanes_LHn = frames_n * self._geometry.num_lanes + self._lane_LH[..., None]
        return lanes_LHn * per_block + pages % per_block

    def frame_rows(self, rows_B: Tensor, num_frames: int) -> Tensor:
        """Summary rows (B, H, F) of layer 0; add ``layer * H`` for another layer."""
        frames_B1F = self.frames[rows_B, None, :num_frames]
        return frames_B1F * self._geometry.num_lanes + self._head_H[:, None]

    def selected_page_rows(self, rows_B: Tensor, layer: int, pages_BHK: Tensor) -> Tensor:
        """Page rows (B, H, K) of selected pages."""
        per_block = self._geometry.pages_per_block
        frames_BHK = self.frames[rows_B[:, None, None], pages_BHK // per_block]
        lanes_H1 = (layer * self._geometry.num_kv_heads + self._head_H)[:, None]
        lanes_BHK = frames_BHK * self._geometry.num_lanes + lanes_H1
        return lanes_BHK * per_block + pages_BHK % per_block

    def place_in_order(
        self, arena: HotArena, row: int, first_page: int, last_page: int, *, step: int
    ) -> None:
        """Give page i the lane's i-th slot (a lane that holds every page)."""
        slots_LHn = self.lane_slots[row, :, :, first_page:last_page]
        self.page_slot[row, :, :, first_page:last_page] = slots_LHn
        pages_n = torch.arange(first_page, last_page, dtype=torch.int32, device=self._device)
        slots = slots_LHn.long()
        arena.slot_page_N[slots] = pages_n.expand(slots.shape)
        arena.slot_step_N.index_fill_(0, slots.flatten(), step)

    def place_page(self, arena: HotArena, row: int, page: int, *, num_slots: int) -> None:
        """Lock a slot for ``page`` in every lane of ``row``: a free one, else the oldest."""
        owned_LHS = self.lane_slots[row, :, :, :num_slots].long()
        oldest_LH1 = arena.slot_step_N[owned_LHS].argmin(dim=-1, keepdim=True)
        victim_LH1 = owned_LHS.gather(-1, oldest_LH1)
        evicted_LH1 = arena.slot_page_N[victim_LH1].long()
        table_LHP = self.page_slot[row]
        table_LHP.scatter_(-1, evicted_LH1 % table_LHP.shape[-1], -1)  # -1: the spare column
        table_LHP[:, :, page] = victim_LH1[..., 0].int()
        self.displaced += (evicted_LH1 >= 0).sum()
        arena.slot_page_N.index_fill_(0, victim_LH1.flatten(), page)
        arena.slot_step_N.index_fill_(0, victim_LH1.flatten(), LOCKED_STEP)

    def resolve(
        self,
        arena: HotArena,
        *,
        layer: int,
        rows_B: Tensor,
        pages_BHK: Tensor,
        num_slots: int,
        step: int,
    ) -> Resolved:
        """Touch the selected pages that are in the hot tier, and give each missing one the slot
        of its lane's least recently used page; pages used in this step are never victims.

        Source: bucketed LRU of SPIN (arXiv 2604.26837) with a period of one step, that is exact.
        """
        base_BH1 = self.lane_base(rows_B, layer)[..., None]
        table = self.page_slot.view(-1)
        slots_BHK = table[base_BH1 + pages_BHK]
        arena.slot_step_N.index_fill_(0, slots_BHK.clamp(min=0).flatten().long(), step)
        miss_BHK = slots_BHK < 0
        if not slots_BHK.is_cuda and not miss_BHK.any():  # reading a value is free on a CPU
            return Resolved(slots_BHK, None)
        victims_BHK, placed_BHK = self._victims(
            arena, layer=layer, rows_B=rows_B, miss_BHK=miss_BHK, num_slots=num_slots, step=step
        )
        spare = self.page_slot.shape[-1] - 1
        old_BHK = torch.where(placed_BHK, arena.slot_page_N[victims_BHK].long(), -1)
        evicted = (old_BHK >= 0).sum()
        gone_BHK = base_BH1 + torch.where(old_BHK >= 0, old_BHK, spare)
        table.index_fill_(0, gone_BHK.flatten(), -1)
        table[base_BH1 + torch.where(placed_BHK, pages_BHK, spare)] = victims_BHK.int()
        written_BHK = torch.where(placed_BHK, victims_BHK, 0)
        arena.slot_page_N[written_BHK] = pages_BHK.int()
        arena.slot_step_N.index_fill_(0, written_BHK.flatten(), step)
        slots_BHK = torch.where(placed_BHK, victims_BHK.int(), slots_BHK)
        return Resolved(slots_BHK, Fetch(written_BHK, placed_BHK, miss_BHK.sum(), evicted))

    def _victims(
        self,
        arena: HotArena,
        *,
        layer: int,
        rows_B: Tensor,
        miss_BHK: Tensor,
        num_slots: int,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """For the i-th miss of a lane its i-th oldest slot; ``placed`` is false without one."""
        owned_BHS = self.lane_slots[rows_B, layer, :, :num_slots].long()
        age_BHS = arena.slot_step_N[owned_BHS.clamp(min=0)]
        age_BHS = torch.where(owned_BHS >= 0, age_BHS, LOCKED_STEP)
        wanted = min(num_slots, miss_BHK.shape[-1])
        if not miss_BHK.is_cuda:
            wanted = min(wanted, int(miss_BHK.sum(-1).max()))
        ages_BHV, order_BHV = age_BHS.topk(wanted, largest=False, sorted=True)
        rank_BHK = miss_BHK.cumsum(-1) - 1
        slot_of_rank = rank_BHK.clamp(0, wanted - 1)
        victims_BHK = owned_BHS.gather(-1, order_BHV).gather(-1, slot_of_rank)
        free_BHK = ages_BHV.gather(-1, slot_of_rank) < step
        placed_BHK = miss_BHK & free_BHK & (rank_BHK < wanted)
        return victims_BHK.clamp(min=0), placed_BHK

    def release(self, arena: HotArena, row: int, first_slot: int, last_slot: int) -> None:
        """Drop the pages in slots first_slot .. last_slot - 1 of every lane of ``row``, and the
        slots. Pages that are locked there move to the oldest slot that stays; with none that
        stays the request is over."""
        leaving_LHn = self.lane_slots[row, :, :, first_slot:last_slot].long()
        locked_LHn = arena.slot_step_N[leaving_LHn] == LOCKED_STEP
        if first_slot and bool(locked_LHn.any()):
            self._move_locked(arena, row, leaving_LHn, locked_LHn, first_slot)
        pages_LHn = arena.slot_page_N[leaving_LHn].long()
        if first_slot:
            self.displaced += (pages_LHn >= 0).sum()
        table_LHP = self.page_slot[row]
        table_LHP.scatter_(-1, pages_LHn % table_LHP.shape[-1], -1)
        arena.slot_page_N.index_fill_(0, leaving_LHn.flatten(), -1)
        arena.slot_step_N.index_fill_(0, leaving_LHn.flatten(), FREE_STEP)
        self.lane_slots[row, :, :, first_slot:last_slot] = -1

    def _move_locked(
        self, arena: HotArena, row: int, leaving_LHn: Tensor, locked_LHn: Tensor, num_kept: int
    ) -> None:
        layers, heads, index = locked_LHn.nonzero(as_tuple=True)
        source_M = leaving_LHn[layers, heads, index]
        page_M = arena.slot_page_N[source_M].long()
        kept_MS = self.lane_slots[row, layers, heads, :num_kept].long()
        target_M = kept_MS.gather(1, arena.slot_step_N[kept_MS].argmin(1, keepdim=True))[:, 0]
        evicted_M = arena.slot_page_N[target_M].long()
        self.displaced += (evicted_M >= 0).sum()
        spare = self.page_slot.shape[-1] - 1
        self.page_slot[row, layers, heads, torch.where(evicted_M >= 0, evicted_M, spare)] = -1
        self.page_slot[row, layers, heads, page_M] = target_M.int()
        arena.pages_NX[target_M] = arena.pages_NX[source_M]
        arena.slot_page_N[target_M] = page_M.int()
        arena.slot_step_N[target_M] = LOCKED_STEP
        arena.slot_page_N[source_M] = -1
        arena.slot_step_N[source_M] = FREE_STEP
