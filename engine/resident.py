"""Decode steps of requests whose whole KV is in the hot tier, from the last token to the next.

On a CUDA device a step is one captured graph per batch size; the host fills in one small buffer.
Shape legend: B requests, padded to the size of a graph, R rows of the page tables, L layers,
H KV heads, I items of attention, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsed.core import BLOCK_TOKENS
from sparsed.engine.batch import DecodeRow
from sparsed.engine.draws import DRAW_WORDS, draw_plan, pack_draws
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.models.decoder import Decoder
from sparsed.kernels.resident import ResidentPlan, attend_resident
from sparsed.kernels.sample import DrawPlan, draw_tokens
from sparsed.kernels.store import store_tokens

MIN_SPLIT_TOKENS, MAX_SPLIT_TOKENS = 256, 2048
SPLITS = 32  # a request's tokens are cut into about so many items, as far as the bounds allow
PROGRAMS_PER_PROCESSOR = 2  # attention programs that fit one multiprocessor together
NUM_BUFFERS = 3  # host buffers in turn: a step is filled in while others are on their way
GRAPH_STEPS = ((8, 8), (64, 16), (128, 32), (256, 64))  # from that batch size on, in steps of

Ints = npt.NDArray[np.int32]


class Drawn(NamedTuple):
    """Logits (n, V) float32 of the rows that ran, and the token drawn from each (n,)."""

    logits_NV: Tensor
    tokens_N: Tensor


class StepInput(NamedTuple):
    """Static device buffers of a step. ``known_B``: the token to feed, -1 where the device knows
    it itself (the row's last token)."""

    known_B: Tensor
    attention: ResidentPlan
    draws: DrawPlan


class InputBuffer:
    """One int32 buffer on the device for everything a step needs to know, filled by one copy.

    Sections: token, row and length of each request, its first item, the words of its draw, the
    number of items, items.
    """

    def __init__(self, *, max_rows: int, max_items: int, spare_row: int, device: torch.device):
        self._max_rows = max_rows
        self._spare_row = spare_row
        self._first_item = (4 + DRAW_WORDS) * max_rows + 1
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
        sections = self._device_X[: self._first_item - 1].view(-1, self._max_rows)[:, :size]
        known, rows, lengths, first = sections[:4]
        items = self._device_X[self._first_item :][: 3 * max_items]
        count = self._device_X[self._first_item - 1 :][:1]
        plan = ResidentPlan(rows, lengths, items.view(-1, 3), first, count)
        return StepInput(known, plan, draw_plan(sections[4:]))

    def fill(self, decodes: Sequence[DecodeRow], *, size: int) -> None:
        """Queue the copy of a step's inputs; ``size - len(decodes)`` requests are padding. Waits
        where the host is as many steps ahead as there are buffers."""
        self._turn = (self._turn + 1) % NUM_BUFFERS
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        host_X = self._host[self._turn]
        values_X = host_X.numpy()
        sections = values_X[: self._first_item - 1].reshape(-1, self._max_rows)
        padding = [(0, self._spare_row, 0)] * (size - len(decodes))
        values = [(-1 if d.token is None else d.token, d.row, d.position + 1) for d in decodes]
        sections[:3, :size] = np.array(values + padding, dtype=np.int32).T
        first_B, items_I3 = cut_items(sections[2, :size])
        sections[3, :size] = first_B
        sections[4:, :size] = pack_draws([d.draw for d in decodes] + [None] * len(padding))
        values_X[self._first_item - 1] = len(items_I3)
        used = self._first_item + items_I3.size
        values_X[self._first_item : used] = items_I3.reshape(-1)
        self._device_X[:used].copy_(host_X[:used], non_blocking=True)
        if self._device_X.is_cuda:
            self._copied[self._turn] = torch.cuda.current_stream().record_event()


def graph_sizes(max_rows: int) -> list[int]:
    """Batch sizes with a graph of their own: each step pads little, and there are not many."""
    sizes = {1, 2, 4, max_rows}
    for (first, step), (last, _) in pairwise((*GRAPH_STEPS, (max_rows, 0))):
        sizes |= set(range(first, min(last, max_rows) + 1, step))
    return sorted(size for size in sizes if size <= max_rows)


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


class ResidentDecoder:
    """Runs steps over rows that are ``complete`` and attend to everything.

    ``last_token_R`` (one entry a row, the spare one included) holds the last token drawn for each
    row; a step reads and writes it on the device. What ``run`` returns is valid until it is called
    again: all batch sizes share one buffer of logits. One thread, one stream.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        *,
        last_token_R: Tensor,
        max_rows: int,
        max_tokens: int,
        scale: float,
        use_graphs: bool,
    ) -> None:
        device = last_token_R.device
        self._decoder = decoder
        self._cache = cache
        self._last_token_R = last_token_R
        self._scale = scale
        self._row_items = -(-max_tokens // MIN_SPLIT_TOKENS)
        self._lane_blocks = cache.arena.blocks.size // cache.geometry.num_lanes
        self._programs = attention_programs(device, num_heads=cache.geometry.num_kv_heads)
        self._sizes = graph_sizes(max_rows)
        self._logits_BV = torch.empty((max_rows, decoder.config.vocab_size), device=device)
        self._inputs = InputBuffer(
            max_rows=max_rows,
            max_items=self._max_items(max_rows),
            spare_row=cache.tables.spare_row,
            device=device,
        )
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Drawn]] = {}
        self._use_graphs = use_graphs

    @torch.inference_mode()
    def run(self, decodes: Sequence[DecodeRow]) -> Drawn:
        """One token for each of ``decodes``, whose pages are open."""
        count = len(decodes)
        size = next(size for size in self._sizes if size >= count)
        self._inputs.fill(decodes, size=size)
        if size not in self._graphs:
            return Drawn(*(tensor[:count] for tensor in self._step(size)))
        graph, drawn = self._graphs[size]
        graph.replay()
        return Drawn(*(tensor[:count] for tensor in drawn))

    @torch.inference_mode()
    def capture(self, on_progress: Callable[[float], None]) -> None:
        """Capture the graph of every batch size, the largest first: they share its memory."""
        if not self._use_graphs:
            return
        pool = None
        for done, size in enumerate(reversed(self._sizes)):
            on_progress(done / len(self._sizes))
            self._inputs.fill([], size=size)
            self._step(size)  # compiles kernels and picks products before the capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                drawn = self._step(size)
            pool = pool or graph.pool()
            self._graphs[size] = (graph, drawn)

    @property
    def has_graphs(self) -> bool:
        """Whether steps replay what was captured."""
        return bool(self._graphs)

    def replay(self, count: int) -> None:
        """Run the graph of the last step, which had ``count`` requests, once more; the tokens that
        it draws and stores are worth nothing. Only for measurements."""
        size = next(size for size in self._sizes if size >= count)
        self._graphs[size][0].replay()

    def _max_items(self, size: int) -> int:
        """Items that ``size`` requests can be cut into, all of them in the arena."""
        arena_items = self._lane_blocks * BLOCK_TOKENS // MIN_SPLIT_TOKENS
        return min(size * self._row_items, arena_items + size)

    def _step(self, size: int) -> Drawn:
        known_B, plan, draws = self._inputs.view(size, self._max_items(size))
        cache, page_size = self._cache, self._cache.geometry.page_size
        rows_B = plan.rows_B.long()
        positions_B = (plan.lengths_B.long() - 1).clamp_(min=0)
        tokens_B = torch.where(known_B < 0, self._last_token_R[rows_B], known_B.long())
        slots_LBH = cache.tables.slots_at(rows_B, positions_B // page_size)
        offsets_B = (positions_B % page_size).int()

        def attend(layer: int, q_BHD: Tensor, k_BHD: Tensor, v_BHD: Tensor) -> Tensor:
            arena_NTCD, slots_BH = cache.arena.pages_NTCD, slots_LBH[layer]
            store_tokens(
                arena_NTCD, slots_BH=slots_BH, offsets_B=offsets_B, k_BHD=k_BHD, v_BHD=v_BHD
            )
            return attend_resident(
                q_BHD,
                arena_NTCD,
                frames_RF=cache.tables.frames_RF,
                page_slot_MLHP=cache.tables.page_slot_MLHP,
                layer=layer,
                plan=plan,
                scale=self._scale,
                programs=self._programs,
            )

        hidden_BD = self._decoder.forward(tokens_B, positions_B, attend)
        logits_BV = self._decoder.logits(hidden_BD, out=self._logits_BV[:size])
        drawn_B = draw_tokens(logits_BV, plan=draws)
        self._last_token_R[rows_B] = drawn_B
        return Drawn(logits_BV, drawn_B)


def attention_programs(device: torch.device, *, num_heads: int) -> int:
    """Attention programs a KV head, so that together they fill the device once."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, PROGRAMS_PER_PROCESSOR * processors // num_heads)
