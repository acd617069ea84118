"""What a captured decode step needs to know, on its way to the device by one copy.

Shape legend: B requests, padded to the size of a graph, R rows of the page tables, I items of
attention, X anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsed.engine.batch import DecodeRow
from sparsed.engine.draws import DRAW_WORDS, draw_plan, pack_draws
from sparsed.kernels.resident import ResidentPlan
from sparsed.kernels.sample import DrawPlan

MIN_SPLIT_TOKENS, MAX_SPLIT_TOKENS = 256, 2048
SPLITS = 32  # a request's tokens are cut into about so many items, as far as the bounds allow
NUM_BUFFERS = 3  # host buffers in turn: a step is filled in while others are on their way
NUM_SCALARS = 2  # items, step
NUM_SECTIONS = 8  # besides the words of draws

Ints = npt.NDArray[np.int32]


class StepRow(NamedTuple):
    """A decode row and how it attends: to ``in_place`` tokens where they lie, or to
    ``num_selected`` of its ``num_full`` full pages and the partial one. One of the two is 0. ``is_hot``: all its pages
    have their slots. ``keeps``: it selects what it selected before."""

    decode: DecodeRow
    in_place: int
    num_full: int = 0
    num_selected: int = 0
    is_hot: bool = False
    keeps: bool = False


def step_kind(rows: Sequence[StepRow]) -> tuple[bool, bool, bool]:
    """What the requests of a step do, as there are graphs of: whether some attend in place, whether
    some select, and whether these may have pages to fetch."""
    in_place = any(row.in_place for row in rows)
    selects = any(row.num_selected for row in rows)
    fetches = selects and (in_place or any(row.num_selected and not row.is_hot for row in rows))
    return in_place or not selects, selects, fetches


class Pages(NamedTuple):
    """Pages to select from, (B,) int32 each: see ``kernels.select.select_pages``."""

    num_full_B: Tensor
    count_B: Tensor

    def to_rank(self, keeps_B: Tensor) -> Pages:
        """Nothing of requests that keep what they selected before."""
        ranks_B = 1 - keeps_B
        return Pages(self.num_full_B * ranks_B, self.count_B * ranks_B)


class StepInput(NamedTuple):
    """Static device buffers of a step, int32. ``known_B``: the token to feed, -1 where the device
    knows it itself (the row's last token). ``rows_B`` names the spare row where ``is_padding``.
    ``keeps_B``: 1 where a request selects what it selected before."""

    known_B: Tensor
    rows_B: Tensor
    positions_B: Tensor
    attention: ResidentPlan
    pages: Pages
    keeps_B: Tensor
    draws: DrawPlan
    step_1: Tensor


class InputBuffer:
    """One int32 buffer on the device for everything a step needs to know, filled by one copy.

    Sections, an entry a request: token, row, position, tokens attended to in place, first item,
    full pages, pages to select, whether it keeps its selection, the words of the draw; then the
    scalars, then items.
    """

    def __init__(self, *, max_rows: int, max_items: int, spare_row: int, device: torch.device):
        self._max_rows = max_rows
        self._spare_row = spare_row
        self._scalars = (NUM_SECTIONS + DRAW_WORDS) * max_rows
        self._first_item = self._scalars + NUM_SCALARS
        size = self._first_item + 3 * max_items
        self._device_X = torch.zeros(size, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._host = [
            torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for _ in range(NUM_BUFFERS)
        ]
        self._copied: list[torch.cuda.Event | None] = [None] * NUM_BUFFERS
        self._turn = 0

    def view(self, size: int, max_items: int) -> StepInput:
        """The buffers of a step of ``size`` requests."""
        sections = self._device_X[: self._scalars].view(-1, self._max_rows)[:, :size]
        known, rows, positions, in_place, first_item, *selection = sections[:NUM_SECTIONS]
        num_full, count, keeps = selection
        items = self._device_X[self._first_item :][: 3 * max_items]
        num_items_1, step_1 = self._device_X[self._scalars : self._first_item].view(-1, 1).unbind()
        return StepInput(
            known_B=known,
            rows_B=rows,
            positions_B=positions,
            attention=ResidentPlan(rows, in_place, items.view(-1, 3), first_item, num_items_1),
            pages=Pages(num_full, count),
            keeps_B=keeps,
            draws=draw_plan(sections[NUM_SECTIONS:]),
            step_1=step_1,
        )

    def fill(self, rows: Sequence[StepRow], *, size: int, step: int) -> None:
        """Queue the copy of a step's inputs; ``size - len(rows)`` requests are padding. Waits
        where the host is as many steps ahead as there are buffers."""
        self._turn = (self._turn + 1) % NUM_BUFFERS
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        host_X = self._host[self._turn]
        used = self._write(host_X.numpy(), rows, size=size, step=step)
        self._device_X[:used].copy_(host_X[:used], non_blocking=True)
        if self._device_X.is_cuda:
            self._copied[self._turn] = torch.cuda.current_stream().record_event()

    def _write(self, values_X: Ints, rows: Sequence[StepRow], *, size: int, step: int) -> int:
        """Fill in one host buffer; how much of it."""
        sections = values_X[: self._scalars].reshape(-1, self._max_rows)
        padding = size - len(rows)
        values = [_words(row) for row in rows] + [(0, self._spare_row, *[0] * 5)] * padding
        columns = np.array(values, dtype=np.int32).reshape(size, NUM_SECTIONS - 1).T
        sections[:4, :size] = columns[:4]
        first_B, items_I3 = cut_items(columns[3])
        sections[4, :size] = first_B
        sections[5:NUM_SECTIONS, :size] = columns[4:]
        draws = [row.decode.draw for row in rows] + [None] * padding
        sections[NUM_SECTIONS:, :size] = pack_draws(draws)
        values_X[self._scalars : self._first_item] = len(items_I3), step
        used = self._first_item + items_I3.size
        values_X[self._first_item : used] = items_I3.reshape(-1)
        return used


def _words(row: StepRow) -> tuple[int, ...]:
    decode = row.decode
    token = -1 if decode.token is None else decode.token
    attends = row.in_place, row.num_full, row.num_selected, int(row.keeps)
    return token, decode.row, decode.position, *attends


def cut_items(lengths_B: Ints) -> tuple[Ints, Ints]:
    """First item of each request, and the items (I, 3): request, first token, token after the
    last. How a request is cut depends on its own length alone."""
    split_B = split_tokens(lengths_B)
    count_B = -(-lengths_B // split_B)
    end_B = np.cumsum(count_B, dtype=np.int32)
    first_B = end_B - count_B
    request_I = np.repeat(np.arange(len(lengths_B), dtype=np.int32), count_B)
    place_I = np.arange(len(request_I), dtype=np.int32) - first_B[request_I]
    start_I = place_I * split_B[request_I]
    stop_I = np.minimum(start_I + split_B[request_I], lengths_B[request_I])
    return first_B, np.stack((request_I, start_I, stop_I), axis=1).astype(np.int32)


def split_tokens(lengths_B: Ints) -> Ints:
    """Tokens of an item: a power of two that gives a request about SPLITS items."""
    wanted = np.maximum(lengths_B, 1) / SPLITS
    split = np.exp2(np.ceil(np.log2(wanted)))
    return np.clip(split, MIN_SPLIT_TOKENS, MAX_SPLIT_TOKENS).astype(np.int32)
