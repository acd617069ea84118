"""``resolve_pages`` on tables as a decode has filled them: a step of so many layers, again and again.

Legend: B requests, R = B + 1 rows of tables, L layers, H KV heads, F frames of a request, N blocks
of a lane (in ``slot_*_N``: all slots), P full pages of a request, K selected pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsed.core import Ceiling
from sparsed.engine.kvcache.geometry import num_frames
from sparsed.engine.measure.attention_cases import BUDGET_TOKENS
from sparsed.engine.measure.cases import Case, permutation
from sparsed.engine.measure.clock import MAX_RUNS, Work
from sparsed.engine.measure.sparse_step import SparseStep
from sparsed.kernels.resolve import MAX_SLOTS, Resolved, resolve_pages
from sparsed.kernels.tables import FREE_STEP, PageTables

RESIDENCY: Final = 4  # slots of a lane over pages that it selects
NEW_SHARE: Final = 0.03  # of selected pages, in the case that has new ones
INT_BYTES: Final = 4


def resolve_cases(step: SparseStep) -> Iterator[Case]:
    """All pages are hot; and some are not, where the hot tier does not hold the context."""
    yield resolve_case(step, num_new=0)
    num_new = max(1, round(NEW_SHARE * step.num_selected))
    never_hot = step.num_full - lane_slots(step) - 2 * step.num_selected
    if never_hot >= MAX_RUNS * num_new:
        yield resolve_case(step, num_new=num_new)


def lane_slots(step: SparseStep) -> int:
    """Slots of a lane."""
    blocks = min(RESIDENCY * num_frames(BUDGET_TOKENS), step.frames)
    return blocks * step.geometry.pages_per_block


def resolve_case(step: SparseStep, *, num_new: int) -> Case:
    """Of every lane the slots' ages, the entries of the pages, and for each new page those of the
    page that goes. ``num_new`` pages of each lane are new in each step."""
    num_slots, num_selected = lane_slots(step), step.num_selected
    ints = num_slots + num_slots // step.geometry.pages_per_block + 4 * num_selected + 8 * num_new
    amount = (step.num_lanes * ints + step.batch * step.frames) * INT_BYTES
    touched = step.num_lanes * (num_slots * 2 + step.num_full) * INT_BYTES

    def make() -> Sequence[Work]:
        layers = step.setting.rotations(touched)
        steps = ResolveSteps(step, layers=layers, num_new=num_new)
        return [steps.advance, *(partial(steps.resolve, layer) for layer in range(layers))]

    words = f"{step.batch} x {num_selected} pages in {num_slots} slots, {num_new} new"
    return Case("resolve_pages", words, Ceiling.COPY, amount, make, prepared=True)


class ResolveSteps:
    """Steps over full hot tiers: ``advance``, then ``resolve`` of each layer. The pages of a lane
    lie anywhere; in each step ``num_new`` of them leave its selection, and as many come that were
    never hot. All layers select the same pages, which a selection has just written."""

    def __init__(self, step: SparseStep, *, layers: int, num_new: int) -> None:
        device, heads = step.setting.device, step.setting.shape.num_kv_heads
        self._step = step
        self._num_new = num_new
        self._order_BHP = (
            torch.rand(step.batch, heads, step.num_full, device=device).argsort(dim=-1).int()
        )
        self._first = 0
        self._pages_BHK = self._order_BHP[..., : step.num_selected].contiguous()
        self._step_1 = torch.zeros(1, device=device, dtype=torch.int32)
        self._rows_B = step.numbers()
        self._positions_B = step.same(step.context - 1)
        self._misses_L = torch.zeros(layers, device=device, dtype=torch.int32)
        self.tables = make_tables(step, layers=layers)
        self.out = make_resolved(self._pages_BHK, self.tables)
        self._fill(layers)

    def advance(self) -> None:
        """The next step, with its own pages."""
        self._go_to(self._first + self._num_new)

    def resolve(self, layer: int) -> None:
        # The slots that requests of an engine share are more than those of a lane.
        step = self._step
        most = step.geometry.max_pages(step.context)
        resolve_pages(
            self._pages_BHK,
            rows_B=self._rows_B,
            positions_B=self._positions_B,
            layer=layer,
            tables=self.tables,
            step_1=self._step_1,
            page_size=step.setting.page_size,
            max_slots=min(step.batch * lane_slots(step), most, MAX_SLOTS),
            out=self.out._replace(num_misses_1=self._misses_L[layer : layer + 1]),
        )

    def _fill(self, layers: int) -> None:
        """Select page after page until no slot is free."""
        num_selected, last = self._step.num_selected, self._step.num_full - self._step.num_selected
        for first in range(0, lane_slots(self._step) + num_selected, num_selected):
            self._go_to(min(first, last))
            for layer in range(layers):
                self.resolve(layer)
        self.out.counters_4.zero_()

    def _go_to(self, first: int) -> None:
        """A step that selects the pages at ``first`` and behind it in the order of each lane."""
        self._first = first
        self._step_1.add_(1)
        self._misses_L.zero_()
        pages_BHK = self._order_BHP[..., first : first + self._step.num_selected]
        self._pages_BHK.copy_(pages_BHK.sort(dim=-1).values)


def make_tables(step: SparseStep, *, layers: int) -> PageTables:
    """Empty tables; frames and blocks lie in no order."""
    setting, heads, per_block = step.setting, step.setting.shape.num_kv_heads, step.geometry
    frames, num_slots = step.batch * step.frames, lane_slots(step)
    blocks = num_slots // per_block.pages_per_block
    all_slots = step.num_lanes * layers * num_slots
    frames_BF = permutation(setting, frames).view(step.batch, -1)
    shape = (step.batch, layers, heads, blocks)
    blocks_BLHN = permutation(setting, step.num_lanes * layers * blocks).view(shape)

    def ints(count: int, value: int) -> Tensor:
        return torch.full((count,), value, device=setting.device, dtype=torch.int32)

    entries = (frames + 1) * layers * heads * per_block.pages_per_block
    return PageTables(
        frames_RF=F.pad(frames_BF, (0, 0, 0, 1), value=frames).int(),
        page_slot_X=ints(entries, -1),
        lane_blocks_RLHN=F.pad(blocks_BLHN, (0, 0, 0, 0, 0, 0, 0, 1), value=-1).int(),
        num_blocks_RLH=F.pad(
            torch.full_like(blocks_BLHN[..., 0], blocks), (0, 0, 0, 0, 0, 1)
        ).int(),
        slot_page_N=ints(all_slots, -1),
        slot_step_N=ints(all_slots, FREE_STEP),
    )


def make_resolved(pages_BHK: Tensor, tables: PageTables) -> Resolved:
    """Room for what is resolved."""
    lanes_BH, counts_RLH = pages_BHK[..., 0], tables.num_blocks_RLH
    room_M = torch.zeros(pages_BHK.numel(), device=pages_BHK.device, dtype=torch.int64)
    return Resolved(
        slots_BHK=torch.zeros_like(pages_BHK),
        num_hits_BH=torch.zeros_like(lanes_BH).contiguous(),
        tail_slots_BH=torch.zeros_like(lanes_BH).contiguous(),
        miss_dst_M=room_M,
        miss_src_M=torch.zeros_like(room_M),
        num_misses_1=room_M.new_zeros(1, dtype=torch.int32),
        window_RLH=torch.zeros_like(counts_RLH),
        demand_RLH2=counts_RLH.new_zeros((*counts_RLH.shape, 2)),
        counters_4=room_M.new_zeros(4),
    )
