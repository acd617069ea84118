"""The state of both tiers between two steps of the soak.

Shape legend: L layers, H KV heads, S slots of a lane, P pages, N slots of the arena, M pages looked
at, X elements of a page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.hbm import FREE_STEP, LOCKED_STEP, slots_of_blocks
from sparsed.engine.kvcache.row import Row


class TierCheck:
    """Looks at both tiers between two steps. On a CUDA device it waits for all that is queued."""

    def __init__(self, kv: KVCache) -> None:
        self._kv = kv
        self.pages_compared = 0

    def __call__(self) -> None:
        """AssertionError unless all tables agree and every sealed hot page is what DRAM holds."""
        kv = self._kv
        kv.check_integrity()
        kv.transfer.wait_for_saves()
        if kv.arena.pages_NX.is_cuda:
            torch.cuda.synchronize()
        is_owned_N = torch.zeros_like(kv.arena.slot_page_N, dtype=torch.bool)
        is_owned_N[: kv.geometry.pages_per_block] = True  # the spare block takes any writes
        for row in kv.rows.values():
            owned_LHS = self._owned(row)
            owned_M = owned_LHS[owned_LHS >= 0]
            assert not is_owned_N[owned_M].any(), "a slot has two owners"
            is_owned_N[owned_M] = True
            self._check_lanes(row, owned_LHS)
        assert (kv.arena.slot_page_N[~is_owned_N] == -1).all(), "a free slot holds a page"

    def idle(self) -> None:
        """AssertionError unless everything was given back."""
        kv = self._kv
        self()
        assert not kv.rows
        assert len(kv.pool.frames) == kv.pool.frames.size
        assert len(kv.arena.blocks) == kv.arena.blocks.size
        tables = kv.tables
        are_free = (tables.page_slot_MLHP[:-1] == -1).all() and (
            tables.lane_blocks_RLHN == -1
        ).all()
        assert are_free, "slots of ended requests"
        assert (tables.frames_RF == tables.spare_frame).all() and not tables.num_blocks_RLH.any()

    def _owned(self, row: Row) -> Tensor:
        """Slots (L, H, S), negative where a lane has fewer than the largest one."""
        tables, most = self._kv.tables, row.blocks.most
        blocks_LHN = tables.lane_blocks_RLHN[row.index].long()
        counts_L = tables.num_blocks_RLH[row.index].flatten()
        assert counts_L.tolist() == row.blocks.counts_L.tolist(), "other slots than the row has"
        width = row.blocks.ids_LN.shape[1]
        found_LN = blocks_LHN[..., :width].flatten(0, 1).tolist()
        assert found_LN == row.blocks.ids_LN.tolist(), "other slots than the row has"
        assert (blocks_LHN[..., most:] == -1).all(), "slots beyond those of the row"
        per_block = self._kv.geometry.pages_per_block
        return slots_of_blocks(blocks_LHN[..., :most], pages_per_block=per_block)

    def _check_lanes(self, row: Row, owned_LHS: Tensor) -> None:
        kv, arena = self._kv, self._kv.arena
        assert kv.tables.frames_RF[row.index, : len(row.frames)].tolist() == row.frames.tolist()
        num_pages = len(row.frames) * kv.geometry.pages_per_block
        table_LHP = kv.tables.slots_of(row.index, 0, num_pages)
        is_slot_LHS, owned_LHS = owned_LHS >= 0, owned_LHS.clamp(min=0)
        pages_LHS = torch.where(is_slot_LHS, arena.slot_page_N[owned_LHS].long(), -1)
        placed_LHS = pages_LHS >= 0
        assert torch.equal((table_LHP >= 0).sum(-1), placed_LHS.sum(-1)), "pages without a slot"
        found_LHS = table_LHP.gather(-1, pages_LHS.clamp(min=0))
        is_same = torch.equal(found_LHS[placed_LHS].long(), owned_LHS[placed_LHS])
        assert is_same, "a slot holds another page than the table says"
        locked_LHS = (arena.slot_step_N[owned_LHS] == LOCKED_STEP) & is_slot_LHS
        assert (locked_LHS.sum(-1) <= 1).all() and (placed_LHS | ~locked_LHS).all()
        begun_LHS = arena.slot_step_N[owned_LHS] != FREE_STEP
        self._compare(row, owned_LHS, pages_LHS, placed_LHS & begun_LHS & ~locked_LHS)

    def _compare(self, row: Row, owned_LHS: Tensor, pages_LHS: Tensor, sealed_LHS: Tensor) -> None:
        """Every page with a slot that is begun and not open has been sealed."""
        kv, per_block = self._kv, self._kv.geometry.pages_per_block
        lanes_LH1 = torch.arange(kv.geometry.num_lanes).view(*owned_LHS.shape[:2], 1)
        pages_LHS, sealed_LHS = pages_LHS.cpu(), sealed_LHS.cpu()
        frames_LHS = torch.from_numpy(row.frames)[pages_LHS.clamp(min=0) // per_block]
        rows_LHS = (frames_LHS * kv.geometry.num_lanes + lanes_LH1) * per_block
        rows_M = (rows_LHS + pages_LHS % per_block)[sealed_LHS]
        hot_MX = kv.arena.pages_NX[owned_LHS.cpu()[sealed_LHS].to(owned_LHS.device)].cpu()
        dram_MX = kv.pool.pages_RX[rows_M]
        assert torch.equal(hot_MX.view(torch.uint8), dram_MX.view(torch.uint8)), "tiers differ"
        self.pages_compared += len(rows_M)
