"""Decode steps of many requests, from the last token to the next, without a word from the host.

A request attends to all its tokens where they lie, or to a selection over both tiers. On a CUDA
device a step is one recorded graph, for its batch size and the number of pages it selects; the host
fills in one small buffer.

Shape legend: B requests, padded to the size of a graph, R rows of the page tables, L layers,
H KV heads, G query heads per KV head, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sparsed.core import BLOCK_TOKENS
from sparsed.engine.batch import DecodeRow
from sparsed.engine.decode_batch import is_sparse
from sparsed.engine.fetch_times import UNTIMED, FetchTimes, StepTimes, TimedStep
from sparsed.engine.in_place_costs import OverheadMeter, is_of_hot_pages
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.models.decoder import Decoder
from sparsed.engine.recorder import Drawn, Recorded, Recorder
from sparsed.engine.step_graphs import GraphKey, GraphTarget, StepGraphs, graph_sizes
from sparsed.engine.step_input import (
    MIN_SPLIT_TOKENS,
    InputBuffer,
    StepInput,
    StepRow,
    step_kind,
)
from sparsed.engine.step_seal import StepSeal
from sparsed.engine.tiered import Step, TieredAttention
from sparsed.kernels.resident import attend_resident
from sparsed.kernels.sample import draw_tokens
from sparsed.kernels.store import store_tokens

SPARE_SLOTS = 2  # of a lane beside a selection: the partial page, and the one before it
PROGRAMS_PER_PROCESSOR = 2  # attention programs that fit one multiprocessor together
MIN_COLUMNS = 32  # kernels are compiled for selections up to that many pages, twice that, and so on


class Trail(NamedTuple):
    """What the layers of the last step that selects left behind for a look at it afterwards, one
    entry a row: queries (L, B, H, G, D) and the logs of the softmax sums (L, B, H, G) of what was
    attended to. All graphs write to the same."""

    queries: Tensor
    lses: Tensor


class StepDecoder:
    """Runs steps over rows that are ``complete`` and attend to everything, and, with ``tiered``,
    over rows that select. ``graphs`` are those of its steps, made by ``recorder`` (None: there are
    none) for ``target``, whose counts end with that of ``tiered``.

    ``rule``: who attends in place though it might select; None: nobody. ``meter`` teaches it what
    each graph costs, as that is recorded.

    ``last_token_R`` (one entry a row, the spare one included) holds the last token drawn for each
    row; a step reads and writes it on the device. What ``run`` returns is valid until it is called
    again: all batch sizes share one buffer of logits. One thread, one stream.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        *,
        tiered: TieredAttention | None,
        fetch_times: FetchTimes,
        last_token_R: Tensor,
        max_rows: int,
        max_tokens: int,
        scale: float,
        recorder: Recorder | None,
        target: GraphTarget,
        meter: OverheadMeter | None,
    ) -> None:
        device = last_token_R.device
        self._device = device
        self._decoder = decoder
        self._cache = cache
        self._last_token_R = last_token_R
        self._scale = scale
        self._row_items = -(-max_tokens // MIN_SPLIT_TOKENS)
        self._lane_blocks = cache.arena.blocks.size // cache.geometry.num_lanes
        self._programs = attention_programs(device, num_heads=cache.geometry.num_kv_heads)
        self._logits_BV = torch.empty((max_rows, decoder.config.vocab_size), device=device)
        self._inputs = InputBuffer(
            max_rows=max_rows,
            max_items=self._max_items(max_rows),
            spare_row=cache.tables.spare_row,
            device=device,
        )
        self._seal = StepSeal(cache, max_rows=max_rows)
        self._timed: dict[GraphKey, TimedStep] = {}  # of the last recording or run
        self._fetch_times = fetch_times
        self._last: GraphKey | None = None
        self._last_graph: Recorded | None = None
        self._recorder = recorder
        self.graphs = StepGraphs(
            target,
            sizes=graph_sizes(max_rows),
            record=self._record if recorder else None,
            settle=recorder.settle if recorder else None,
        )
        self.tiered = tiered
        self._meter = meter
        self.rule = meter.rule if meter else None
        self.trail = self._make_trail(max_rows if tiered else 0)

    def row_of(self, decode: DecodeRow) -> StepRow | None:
        """How a row attends in a step of this kind; None: it cannot take part."""
        row, geometry = self._cache.rows[decode.row], self._cache.geometry
        selects = is_sparse(row, decode.position, geometry.page_size)
        if row.complete and not selects:
            return StepRow(decode, in_place=decode.position + 1)
        num_full = decode.position // geometry.page_size
        count = row.selected_pages(geometry.page_size) if selects else num_full
        has_room = row.blocks.least * geometry.pages_per_block >= count + SPARE_SLOTS
        if self.tiered is None or not 0 < count <= self.tiered.max_count or not has_room:
            return None
        keeps = selects and self._cache.kept.serves(row, decode.position)
        return StepRow(decode, 0, num_full, count, is_hot=row.complete, keeps=keeps)

    def cheapest(self, rows: Sequence[StepRow]) -> Sequence[StepRow]:
        """The same requests as they are computed fastest: if no page of them can be missing, by
        ``rule`` all of them in place."""
        selecting = [row for row in rows if row.num_selected]
        if self.rule is None or not selecting or not all(row.is_hot for row in selecting):
            return rows
        key, _ = self._find(rows)
        in_place = self.rule.choose(
            key,
            num_selecting=len(selecting),
            tokens=sum(row.decode.position + 1 for row in selecting),
            selected=sum(row.num_selected for row in selecting) * self._cache.geometry.page_size,
        )
        if not in_place:
            return rows
        return [StepRow(row.decode, in_place=row.decode.position + 1) for row in rows]

    @torch.inference_mode()
    def run(self, rows: Sequence[StepRow], *, step: int) -> Drawn:
        """One token for each of ``rows``. ``trail`` is that of this step until the next."""
        key, graph = self._find(rows, may_time=self._fetch_times.is_turn(step))
        self._inputs.fill(rows, size=key.size, step=step)
        self._last, self._last_graph = key, graph
        for row in rows if key.keeps else ():
            if row.num_selected and not row.keeps:
                self._cache.kept.note(self._cache.rows[row.decode.row], row.decode.position)
        if graph is None:
            drawn = self._run(key)
        else:
            graph.replay()
            drawn = graph.drawn
        if key.times:
            self._fetch_times.add(self._timed[key])
        return Drawn(*(tensor[: len(rows)] for tensor in drawn))

    @torch.inference_mode()
    def record_all(self, on_progress: Callable[[float], None]) -> None:
        """Record all graphs that are to come, and compile what wider selections need: nobody shall
        wait for that later."""
        if self._recorder is None:
            return
        columns = MIN_COLUMNS
        while self.tiered is not None and columns // 2 <= self.tiered.max_count:
            count = min(columns - 1, self.tiered.max_count)
            self._inputs.fill([], size=1, step=0)
            self._run(GraphKey(1, count, in_place=True, fetches=True, times=False, load=None))
            columns *= 2
        while self.graphs.is_recording:
            on_progress(self.graphs.progress)
            self.graphs.advance(idle=True)

    @property
    def last(self) -> GraphKey:
        """What the last step was. Only for measurements."""
        assert self._last is not None
        return self._last

    @property
    def replays(self) -> bool:
        """Whether the last step was a graph."""
        return self._last_graph is not None

    def replay(self) -> None:
        """Run the graph of the last step once more; the tokens that it draws and stores are worth
        nothing. Only for measurements."""
        assert self._last_graph is not None
        self._last_graph.replay()

    def last_inputs(self) -> StepInput:
        """The inputs of the last step, as they lie on the device. Only for measurements."""
        return self._inputs.view(self.last.size, self._max_items(self.last.size))

    def _max_items(self, size: int) -> int:
        """Items that ``size`` requests can be cut into, all of them in the arena."""
        arena_items = self._lane_blocks * BLOCK_TOKENS // MIN_SPLIT_TOKENS
        return min(size * self._row_items, arena_items + size)

    def _find(
        self, rows: Sequence[StepRow], *, may_time: bool = False
    ) -> tuple[GraphKey, Recorded | None]:
        """What a step of these rows is, and its graph."""
        in_place, selects, fetches = step_kind(rows)
        return self.graphs.find(
            len(rows),
            count=max(row.num_selected for row in rows) if selects else 0,
            in_place=in_place,
            fetches=fetches,
            times=fetches and may_time,
        )

    def _record(self, key: GraphKey) -> Recorded:
        """The graph of a step, after one of padding alone."""
        assert self._recorder is not None
        self._inputs.fill([], size=key.size, step=0)
        graph = self._recorder.record(partial(self._run, key))
        if self._meter is not None and is_of_hot_pages(key):
            _, in_place = self.graphs.find(key.size, count=0, in_place=True, fetches=False)
            assert in_place is not None, "it is recorded before those that select"
            rehearse = partial(self._rehearse, key.size)
            self._meter.measure(key, graph, in_place=in_place, rehearse=rehearse)
        return graph

    def _rehearse(self, size: int, num_full: int) -> None:
        """Fill in a step of nobody, of ``size`` requests that look at ``num_full`` pages each and
        select one, where there is one."""
        page_size, spare_row = self._cache.geometry.page_size, self._cache.tables.spare_row
        decode = DecodeRow(row=spare_row, token=0, position=num_full * page_size)
        row = StepRow(decode, 0, num_full=num_full, num_selected=min(1, num_full))
        self._inputs.fill([row] * size, size=size, step=0)

    def _run(self, key: GraphKey) -> Drawn:
        if not key.times:
            return self._step(key, UNTIMED)
        self._timed[key] = TimedStep(self._device)
        return self._step(key, self._timed[key])

    def _step(self, key: GraphKey, times: StepTimes) -> Drawn:
        inputs = self._inputs.view(key.size, self._max_items(key.size))
        rows_B, positions_B = inputs.rows_B.long(), inputs.positions_B.long()
        tokens_B = torch.where(
            inputs.known_B < 0, self._last_token_R[rows_B], inputs.known_B.long()
        )
        foresee, queries = None, None
        if key.pages:
            queries = self.trail.queries[:, : key.size].flatten(2, 3)
            assert self.tiered is not None
            step = self.tiered.begin(
                inputs, width=key.pages, fetches=key.fetches, keeps=key.keeps, times=times
            )
            attend = self._attend_tiered(key, step, self.tiered)
            if key.fetches and self.tiered.ahead is not None:
                foresee = partial(self.tiered.foresee, step)
        else:
            attend = self._attend_in_place(inputs)
        hidden_BD = self._decoder.forward(
            tokens_B, positions_B, attend, foresee=foresee, queries_LNHD=queries
        )
        self._seal.run(inputs)
        if key.pages and self.tiered is not None:
            self.tiered.finish(step)
        logits_BV = self._decoder.logits(hidden_BD, out=self._logits_BV[: key.size])
        drawn_B = draw_tokens(logits_BV, plan=inputs.draws)
        self._last_token_R[rows_B] = drawn_B
        return Drawn(logits_BV, drawn_B)

    def _make_trail(self, max_rows: int) -> Trail:
        geometry, config = self._cache.geometry, self._decoder.config
        group = config.num_heads // geometry.num_kv_heads
        shape = (geometry.num_layers, max_rows, geometry.num_kv_heads, group)
        q_LBHGD = self._cache.arena.pages_NX.new_zeros((*shape, geometry.head_dim))
        return Trail(q_LBHGD, torch.zeros(shape, device=q_LBHGD.device))

    def _attend_in_place(self, inputs: StepInput) -> Callable[..., Tensor]:
        cache, page_size = self._cache, self._cache.geometry.page_size
        slots_LBH = cache.tables.slots_at(inputs.rows_B.long(), inputs.positions_B // page_size)
        offsets_B = inputs.positions_B % page_size
        self._seal.lock(slots_LBH)

        def attend(layer: int, q_BHD: Tensor, k_BHD: Tensor, v_BHD: Tensor) -> Tensor:
            store_tokens(
                cache.arena.pages_NTCD,
                slots_BH=slots_LBH[layer],
                offsets_B=offsets_B,
                k_BHD=k_BHD,
                v_BHD=v_BHD,
            )
            return self._attend_resident(layer, q_BHD, inputs)

        return attend

    def _attend_tiered(
        self, key: GraphKey, step: Step, tiered: TieredAttention
    ) -> Callable[..., Tensor]:
        nothing_BHD: Tensor | None = None  # of requests that are padding

        def attend(layer: int, q_BHD: Tensor, k_BHD: Tensor, v_BHD: Tensor) -> Tensor:
            q_BHGD = self.trail.queries[layer, : len(q_BHD)]  # where they are
            placed = tiered.place(step, layer, q_BHGD, k_BHD, v_BHD)
            if key.in_place:
                o_BHD = self._attend_resident(layer, q_BHD, step.inputs)
            else:
                nonlocal nothing_BHD
                if nothing_BHD is None:
                    nothing_BHD = torch.zeros_like(q_BHD, memory_format=torch.contiguous_format)
                o_BHD = nothing_BHD
            tiered.attend(
                placed,
                q_BHGD,
                out_BHGD=o_BHD.view(q_BHGD.shape),
                lse_BHG=self.trail.lses[layer, : len(q_BHD)],
            )
            return o_BHD

        return attend

    def _attend_resident(self, layer: int, q_BHD: Tensor, inputs: StepInput) -> Tensor:
        cache = self._cache
        return attend_resident(
            q_BHD,
            cache.arena.pages_NTCD,
            frames_RF=cache.tables.frames_RF,
            page_slot_MLHP=cache.tables.page_slot_MLHP,
            layer=layer,
            plan=inputs.attention,
            scale=self._scale,
            programs=self._programs,
        )


def attention_programs(device: torch.device, *, num_heads: int) -> int:
    """Attention programs a KV head, so that together they fill the device once."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, PROGRAMS_PER_PROCESSOR * processors // num_heads)
