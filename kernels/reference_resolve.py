"""The bucketed LRU in plain torch, all lanes at once: the CPU path, and the kernels' oracle.

Shape legend: B requests, H KV heads, K selected pages of a lane (P = K + 1, the partial page
first), S slots of a lane, C classes, I lanes that give slots away, W pages that get one, G pages
that are sealed; the rest as in ``kernels.tables``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsed.core import BLOCK_TOKENS
from sparsed.kernels.buckets import NUM_CLASSES, OLDEST_AGE, USED_CLASS, WINDOW_STEPS
from sparsed.kernels.tables import FREE_STEP, LOCKED_STEP, PageTables

if TYPE_CHECKING:
    from sparsed.kernels.resolve import Resolved
    from sparsed.kernels.seal import Sealed


def resolve_pages(
    pages_BHK: Tensor,
    rows_B: Tensor,
    positions_B: Tensor,
    layer: int,
    tables: PageTables,
    step_1: Tensor,
    page_size: int,
    max_slots: int,
    out: Resolved,
) -> None:
    """See ``kernels.resolve.resolve_pages``; ``max_slots`` is of no use here."""
    step, is_spare_B11 = int(step_1), (rows_B == len(tables.frames_RF) - 1)[:, None, None]
    tails_BH1 = (positions_B // page_size)[:, None, None].expand(*pages_BHK.shape[:2], 1)
    page_BHP = torch.cat((tails_BH1, pages_BHK), dim=2).masked_fill_(is_spare_B11, -1)
    heads_H1 = torch.arange(pages_BHK.shape[1], dtype=torch.int32)[:, None]
    rows_B11 = rows_B[:, None, None]
    row_BHP = _page_rows(page_BHP.clamp(min=0), rows_B11, layer, heads_H1, tables, page_size)
    slot_BHP = tables.page_slot_X.index_select(0, row_BHP.flatten()).view(page_BHP.shape)
    is_page_BHP = page_BHP >= 0
    is_hit_BHP = (slot_BHP >= 0).logical_and_(is_page_BHP)
    is_miss_BHP = is_page_BHP.logical_xor_(is_hit_BHP)
    slot_BHP.masked_fill_(~is_hit_BHP, -1)
    _add_demand(slot_BHP[..., 1:], is_miss_BHP[..., 1:], rows_B, layer, tables, step, out)
    _use(slot_BHP, is_hit_BHP.flatten().nonzero()[:, 0], tables, step)

    slot_BHS, class_BHS = _classes(rows_B, layer, tables, step, page_size)
    count_BHC = _count_classes(class_BHS)
    num_given_BH = is_miss_BHP.sum(2).minimum(count_BHC[..., :USED_CLASS].sum(2))
    rank_BHP = is_miss_BHP.cumsum(2, dtype=torch.int32)
    is_placed_BHP = (rank_BHP <= num_given_BH[..., None]).logical_and_(is_miss_BHP)
    place_W = is_placed_BHP.flatten().nonzero()[:, 0]
    if len(place_W):
        slot_W = _victims(slot_BHS, class_BHS, count_BHC, num_given_BH)
        slot_BHP.view(-1).index_copy_(0, place_W, slot_W)
        b_W, head_W = place_W // page_BHP[0].numel(), place_W // page_BHP.shape[2] % len(heads_H1)
        old_W = tables.slot_page_N.index_select(0, slot_W)
        old_row_W = _page_rows(
            old_W.clamp(min=0), rows_B[b_W], layer, head_W.int(), tables, page_size
        )
        tables.page_slot_X.index_fill_(0, old_row_W[old_W >= 0].long(), -1)
        row_W, page_W = row_BHP.flatten()[place_W], page_BHP.flatten()[place_W]
        tables.page_slot_X.index_copy_(0, row_W.long(), slot_W)
        tables.slot_page_N.index_copy_(0, slot_W.long(), page_W)
        _use(slot_BHP, place_W, tables, step)
    _write_slots(slot_BHP, is_hit_BHP, is_placed_BHP, row_BHP, out)
    _write_counts(is_hit_BHP, is_miss_BHP, is_placed_BHP, count_BHC, rows_B.long(), layer, out)


def _page_rows(
    pages: Tensor, rows: Tensor, layer: int, heads: Tensor, tables: PageTables, page_size: int
) -> Tensor:
    """Page rows of pages that exist; ``rows`` and ``heads`` of the same shape or to be expanded."""
    pages_per_block = BLOCK_TOKENS // page_size
    _, num_layers, num_heads = tables.num_blocks_RLH.shape
    blocks = (rows * tables.frames_RF.shape[1]) + pages // pages_per_block
    frames = tables.frames_RF.view(-1).index_select(0, blocks.flatten()).view(blocks.shape)
    lanes = frames.mul_(num_layers).add_(layer).mul_(num_heads).add_(heads)
    return lanes.mul_(pages_per_block).add_(pages % pages_per_block)


def _add_demand(
    slot_BHK: Tensor,
    is_miss_BHK: Tensor,
    rows_B: Tensor,
    layer: int,
    tables: PageTables,
    step: int,
    out: Resolved,
) -> None:
    """Count misses, and hits on pages not used in the step before, lane by lane."""
    last_X = tables.slot_step_N.index_select(0, slot_BHK.clamp(min=0).flatten())
    is_return_BHK = (last_X.view(slot_BHK.shape) < step - 1).logical_and_(slot_BHK >= 0)
    demand_BH2 = torch.stack((is_miss_BHK.sum(2), is_return_BHK.sum(2)), dim=2)
    out.demand_RLH2[:, layer].index_add_(0, rows_B, demand_BH2.int())


def _use(slot_BHP: Tensor, place_W: Tensor, tables: PageTables, step: int) -> None:
    """Mark the slots in these places as used in this step, those of partial pages as locked."""
    slot_W = slot_BHP.flatten().index_select(0, place_W).long()
    tables.slot_step_N.index_fill_(0, slot_W, step)
    is_tail_W = place_W % slot_BHP.shape[2] == 0
    tables.slot_step_N.index_fill_(0, slot_W[is_tail_W], LOCKED_STEP)


def _classes(
    rows_B: Tensor, layer: int, tables: PageTables, step: int, page_size: int
) -> tuple[Tensor, Tensor]:
    """The slots of every lane, and their classes; int32, as memory is what this takes."""
    num_blocks_BH1 = tables.num_blocks_RLH[:, layer].index_select(0, rows_B)[..., None]
    num_blocks_BH1.masked_fill_(rows_B[:, None, None] == len(tables.frames_RF) - 1, 0)
    most = int(num_blocks_BH1.amax())
    offsets = torch.arange(BLOCK_TOKENS // page_size, dtype=torch.int32, device=rows_B.device)
    block_BHN = tables.lane_blocks_RLHN[:, layer, :, :most].index_select(0, rows_B)
    is_none_BHN = num_blocks_BH1 <= torch.arange(most, device=rows_B.device)
    block_BHN.masked_fill_(is_none_BHN, 0)
    slot_BHNS = block_BHN[..., None] * len(offsets) + offsets
    step_BHNS = tables.slot_step_N.index_select(0, slot_BHNS.flatten()).view(slot_BHNS.shape)
    class_BHNS = (step - step_BHNS).clamp_(-1, OLDEST_AGE).neg_().add_(USED_CLASS)
    class_BHNS.masked_fill_(step_BHNS == FREE_STEP, 0)
    class_BHNS.masked_fill_(is_none_BHN[..., None], USED_CLASS + 1)
    return slot_BHNS.flatten(2), class_BHNS.flatten(2)


def _count_classes(class_BHS: Tensor) -> Tensor:
    count_BHC = class_BHS.new_zeros((*class_BHS.shape[:2], NUM_CLASSES))
    return count_BHC.scatter_add_(2, class_BHS.long(), torch.ones_like(class_BHS))


def _victims(
    slot_BHS: Tensor, class_BHS: Tensor, count_BHC: Tensor, num_given_BH: Tensor
) -> Tensor:
    """Slots given away, lane after lane: of the classes before the cut, then of the one cut."""
    lane_I = num_given_BH.flatten().nonzero()[:, 0]
    given_I1 = num_given_BH.view(-1, 1)[lane_I]
    class_IS, slot_IS = class_BHS.flatten(0, 1)[lane_I], slot_BHS.flatten(0, 1)[lane_I]
    until_IC = F.pad(count_BHC.flatten(0, 1)[lane_I].cumsum(1), (1, 0))
    cut_I1 = (until_IC[:, 1:] < given_I1).sum(1, keepdim=True)
    is_before_IS, is_cut_IS = class_IS < cut_I1, class_IS == cut_I1
    rank_IS = is_cut_IS.cumsum(1, dtype=torch.int32).add_(until_IC.gather(1, cut_I1))
    rank_IS = torch.where(is_before_IS, is_before_IS.cumsum(1, dtype=torch.int32), rank_IS)
    is_victim_IS = (rank_IS <= given_I1).logical_and_(is_before_IS.logical_or_(is_cut_IS))
    rank_IS += given_I1.cumsum(0) - given_I1 - 1
    chosen_W = is_victim_IS.flatten().nonzero()[:, 0]
    slot_W = torch.empty_like(chosen_W, dtype=torch.int32)
    slot_W[rank_IS.flatten().index_select(0, chosen_W)] = slot_IS.flatten()[chosen_W]
    return slot_W


def _write_slots(
    slot_BHP: Tensor, is_hit_BHP: Tensor, is_placed_BHP: Tensor, row_BHP: Tensor, out: Resolved
) -> None:
    """Hits, then misses, then -1; and the list of what to load."""
    out.tail_slots_BH.copy_(slot_BHP[..., 0])
    is_hit_BHK, is_placed_BHK = is_hit_BHP[..., 1:], is_placed_BHP[..., 1:]
    hit_BHK, placed_BHK = (is_.cumsum(2) for is_ in (is_hit_BHK, is_placed_BHK))
    out.num_hits_BH.copy_(hit_BHK[..., -1])
    column_BHK = torch.where(is_hit_BHK, hit_BHK, placed_BHK.add_(hit_BHK[..., -1:]))
    column_BHK.masked_fill_(slot_BHP[..., 1:] < 0, 0)
    padded_BHP = torch.full_like(slot_BHP, -1).scatter_(2, column_BHK, slot_BHP[..., 1:])
    out.slots_BHK.copy_(padded_BHP[..., 1:])
    slot_W, row_W = slot_BHP[..., 1:][is_placed_BHK], row_BHP[..., 1:][is_placed_BHK]
    begin = int(out.num_misses_1)
    out.miss_dst_M[begin : begin + len(slot_W)] = slot_W
    out.miss_src_M[begin : begin + len(slot_W)] = row_W
    out.num_misses_1.add_(len(slot_W))


def _write_counts(
    is_hit_BHP: Tensor,
    is_miss_BHP: Tensor,
    is_placed_BHP: Tensor,
    count_BHC: Tensor,
    rows_B: Tensor,
    layer: int,
    out: Resolved,
) -> None:
    num_hits, num_misses = is_hit_BHP[..., 1:].sum(), is_miss_BHP[..., 1:].sum()
    num_given_BH, first_recent = is_placed_BHP.sum(2), USED_CLASS - WINDOW_STEPS + 1
    num_lost_BH = (num_given_BH - count_BHC[..., :first_recent].sum(2)).clamp_(min=0)
    window_BH = count_BHC[..., first_recent : USED_CLASS + 1].sum(2).sub_(num_lost_BH)
    window_BH += num_given_BH - is_placed_BHP[..., 0].long()
    is_used_B = rows_B < len(out.window_RLH) - 1
    out.window_RLH[rows_B[is_used_B], layer] = window_BH[is_used_B].int()
    num_evicted = (num_given_BH - count_BHC[..., 0]).clamp_(min=0).sum()
    num_refused = is_miss_BHP.sum() - num_given_BH.sum()
    out.counters_4.add_(torch.stack((num_hits + num_misses, num_misses, num_evicted, num_refused)))


def seal_pages(
    rows_B: Tensor,
    positions_B: Tensor,
    tables: PageTables,
    step_1: Tensor,
    page_size: int,
    out: Sealed,
) -> None:
    """See ``kernels.seal.seal_pages``."""
    is_full_B = (rows_B < len(tables.frames_RF) - 1) & ((positions_B + 1) % page_size == 0)
    rows_G1, pages_G1 = rows_B[is_full_B].long()[:, None], positions_B[is_full_B][:, None]
    lanes = torch.arange(tables.num_blocks_RLH[0].numel(), device=rows_B.device)
    frames_G1 = tables.frames_RF[rows_G1, pages_G1 // BLOCK_TOKENS].long()
    pages_per_block = BLOCK_TOKENS // page_size
    row_GI = (frames_G1 * len(lanes) + lanes) * pages_per_block
    row_GI += pages_G1 // page_size % pages_per_block
    slot_GI = tables.page_slot_X[row_GI].long()
    slot_W, row_W = slot_GI[slot_GI >= 0], row_GI[slot_GI >= 0]
    tables.slot_step_N[slot_W] = step_1
    begin = int(out.num_seals_1)
    out.src_M[begin : begin + len(slot_W)] = slot_W
    out.dst_M[begin : begin + len(slot_W)] = row_W
    out.num_seals_1.add_(len(slot_W))


def count_wasted(
    rows_LM: Tensor, counts_L: Tensor, tables: PageTables, step_1: Tensor, out_1: Tensor
) -> None:
    """See ``kernels.wasted.count_wasted``."""
    is_listed_LM = torch.arange(rows_LM.shape[1]) < counts_L[:, None]
    slot_W = tables.page_slot_X[rows_LM[is_listed_LM]].long()
    is_used_W = (slot_W >= 0) & (tables.slot_step_N[slot_W.clamp(min=0)] == step_1)
    out_1 += (~is_used_W).sum()
