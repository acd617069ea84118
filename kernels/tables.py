"""The device-side tables that say where pages lie, and the arithmetic on them that kernels share.

Shape legend: R request rows (the last of R + 1 is spare), F frames of a row, X page rows, L layers,
H KV heads, N slots of the arena (as the last axis of ``lane_blocks``: blocks of a lane).
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FREE_STEP: Final = -1  # in slot_step: no page, or one that has no token yet
LOCKED_STEP: Final = 2**31 - 1  # in slot_step: never a victim


class PageTables(NamedTuple):
    """Where every page lies: all int32, contiguous, on one device.

    ``frames_RF`` (R + 1, F): DRAM frame of each 128 tokens of a request row; entries not in use,
    and all of the spare row, hold the spare frame. ``page_slot_X``: slot of each page row, -1:
    absent; with a spare frame at the end. ``lane_blocks_RLHN`` (R + 1, L, H, N): arena blocks that
    a lane owns, ``num_blocks_RLH`` of them; slot s of the lane is ``lane_blocks[s // ppb] * ppb +
    s % ppb``, ppb the pages of a block. ``slot_page_N``: page id in a slot, -1: none.
    ``slot_step_N``: last step that used the slot, FREE_STEP, or LOCKED_STEP. A slot without a page
    has FREE_STEP, and so has one whose page is placed before its first token: both are given away
    first, and nothing is lost.

    A frame is in one row only, and a block in one lane only. For every slot in use
    ``page_slot[page row of slot_page[slot]] == slot``.
    """

    frames_RF: Tensor
    page_slot_X: Tensor
    lane_blocks_RLHN: Tensor
    num_blocks_RLH: Tensor
    slot_page_N: Tensor
    slot_step_N: Tensor


def check_tables(tables: PageTables) -> None:
    """AssertionError unless the tables are those of one model, in one place."""
    num_rows, _ = tables.frames_RF.shape
    assert tables.lane_blocks_RLHN.shape[:3] == tables.num_blocks_RLH.shape
    assert tables.num_blocks_RLH.shape[0] == num_rows
    assert tables.slot_page_N.shape == tables.slot_step_N.shape
    assert tables.page_slot_X.ndim == tables.slot_page_N.ndim == 1
    # Page rows are computed in 32 bits.
    assert tables.page_slot_X.numel() < 2**31
    for table in tables:
        assert table.dtype == torch.int32 and table.is_contiguous()
        assert table.device == tables.frames_RF.device


@triton.jit
def page_rows(
    pages: tl.tensor,
    wanted: tl.tensor,
    frames_F: tl.tensor,
    layer: tl.tensor,
    num_layers: tl.tensor,
    head: tl.tensor,
    num_heads: tl.tensor,
    block_pages: tl.tensor,
) -> tl.tensor:
    """Page rows of ``pages`` (or of one page) of a lane; of frame 0 where not ``wanted``."""
    frames = tl.load(frames_F + pages // block_pages, mask=wanted, other=0)
    lanes = (frames * num_layers + layer) * num_heads + head
    return lanes * block_pages + pages % block_pages
