"""One forward pass over whatever the scheduler planned: the model, both tiers, the logits."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sparsed.core import (
    NO_RECALL,
    EngineFacts,
    EngineSpec,
    EngineStats,
    Knobs,
    LinkCalibration,
    LinkProbe,
    SparseMethod,
)
from sparsed.engine.assembly import (
    Progress,
    device_name,
    dtype_of,
    graph_target,
    library_versions,
    load_decoder,
    make_attention,
    make_cache,
    make_steps,
    make_trace,
    measure_link,
)
from sparsed.engine.batch import DecodeRow, PromptChunk, StepPlan
from sparsed.engine.device_memory import DeviceMemory
from sparsed.engine.draws import draw_step
from sparsed.engine.fetch_times import UNTIMED, FetchTimes, TimedStep
from sparsed.engine.in_place_costs import REPEATS, WARM_UPS, OverheadMeter, make_meter
from sparsed.engine.kvcache.rebalance import Rebalancer
from sparsed.engine.kvcache.upload import upload
from sparsed.engine.measure.ceilings import copy_bytes_per_s_within
from sparsed.engine.measure.clock import Clock
from sparsed.engine.recall import RecallSampler
from sparsed.engine.recorder import Drawn
from sparsed.engine.step_decoder import StepDecoder
from sparsed.engine.step_input import StepRow
from sparsed.engine.tier_stats import TierStats
from sparsed.engine.warmup import warm_up

Decodes = tuple[DecodeRow, ...]


class EagerInput(NamedTuple):
    """The tokens of a step, flat: all chunks, then one per decode row."""

    tokens_N: Tensor
    positions_N: Tensor
    lengths_N: Tensor
    logits_index_n: Tensor


class Runner:
    """Loads the model, makes both tiers, measures the link, and runs steps.

    Not thread-safe. ``pool_fd`` is the shared memory of the DRAM tier, None for memory of its own.
    Errors at start: InputError for the model's files, StartError for memory.
    """

    def __init__(
        self, spec: EngineSpec, *, on_progress: Progress, pool_fd: int | None = None
    ) -> None:
        started = time.perf_counter()
        self._device = torch.device(spec.device)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread: kernels and graphs take that
        self._step = 0
        self._memory = DeviceMemory(self._device, free_bytes=spec.hbm_free_bytes)
        self.decoder = load_decoder(
            spec.model,
            device=self._device,
            dtype=dtype_of(spec),
            seed=spec.seed,
            on_progress=on_progress,
        )
        config = self.decoder.config
        self.vocab_size = config.vocab_size
        self.kv = make_cache(spec, self.decoder, pool_fd=pool_fd, on_progress=on_progress)
        self._trace = make_trace(spec, self.kv)
        self.attention = make_attention(spec, self.kv, trace=self._trace)
        self.fetch_times = FetchTimes(self.kv.transfer, device=self._device)
        self._tier_stats = TierStats(
            self.kv, counts=self.attention.counts, fetch_times=self.fetch_times
        )
        self.recall = RecallSampler(self.attention.tiers)
        self._rebalancer = Rebalancer(self.kv)
        self._last_token_R = torch.zeros(
            self.kv.tables.spare_row + 1, dtype=torch.int64, device=self._device
        )
        self._spec = spec
        link, calibration = measure_link(spec, self.kv, on_progress=on_progress)
        self._copy_bytes_per_s: float | None = None
        if self.runs_ahead:  # now, while the arena holds nothing
            clock = Clock(self._device)
            self._copy_bytes_per_s = copy_bytes_per_s_within(self.kv.arena.pages_NX, clock)
        self._profile(spec.knobs)
        self.steps = self._make_steps() if self.runs_ahead else None
        if self.steps is not None:
            self.steps.record_all(partial(on_progress, "capturing decode graphs"))
            warm_up(self, spec.knobs, on_progress=on_progress)
        self.facts = self._make_facts(
            link, calibration=calibration, load_s=time.perf_counter() - started
        )

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be queued before the tokens of the one before are read."""
        return self._device.type == "cuda"

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Drawn:
        """Logits of each chunk's positions from ``logits_from`` on, in order, then of every decode
        row, and the token drawn from each. On a CUDA device queued and not awaited; valid
        until the next call."""
        self._step += 1
        self._rebalancer.step(self._step)
        for decode in plan.decodes:
            self.kv.make_room(decode.row, decode.position)
        for chunk in plan.chunks:
            self.kv.reserve(chunk.row, chunk.end)
        queued, others = self._split(plan.decodes)
        for decode in others:
            self.kv.open_token(decode.row, decode.position)
        eager = StepPlan(chunks=plan.chunks, decodes=others)
        # One timed step at a time: where some rows are queued, it is they that are timed.
        parts = [] if eager.is_empty else [self._run_eagerly(eager, may_time=not queued)]
        if queued:
            assert self.steps is not None
            self.kv.transfer.wait_for_saves()
            queued = tuple(self.steps.cheapest(queued))
            parts.append(self.steps.run(queued, step=self._step))
            self.recall.sample(queued, self.steps.trail, step=self._step)
        self.attention.finish(others, step=self._step)
        in_place = {row.decode.row for row in queued if row.in_place}
        self.attention.count(plan.decodes, in_place=in_place)
        if len(parts) == 1:
            return parts[0]
        last = tuple(row.decode for row in queued)
        return _in_order(*parts, decodes=plan.decodes, last=last)

    def _split(self, decodes: Decodes) -> tuple[tuple[StepRow, ...], Decodes]:
        """Rows that a queued step can compute, and the others."""
        if self.steps is None:
            return (), decodes
        found = [(self.steps.row_of(decode), decode) for decode in decodes]
        queued = tuple(row for row, _ in found if row is not None)
        return queued, tuple(decode for row, decode in found if row is None)

    def _run_eagerly(self, plan: StepPlan, *, may_time: bool) -> Drawn:
        """One forward pass whose operations are launched one by one."""
        attention = self.attention.plan(plan, step=self._step)
        residency = self.attention.tiers.residency
        timed = None
        if may_time and self.fetch_times.is_turn(self._step):
            timed = TimedStep(self._device)
        residency.times = timed or UNTIMED
        inputs = self._inputs(plan)
        hidden_ND = self.decoder.forward(
            inputs.tokens_N,
            inputs.positions_N,
            lambda layer, q, k, v: self.attention.run(attention, layer, q, k, v),
            lengths_N=inputs.lengths_N,
        )
        if timed is not None and timed.has_fetches:
            self.fetch_times.add(timed)
        logits_NV = self.decoder.logits(hidden_ND[inputs.logits_index_n])
        tokens_N = draw_step(logits_NV, plan=plan)
        self._keep_tokens(plan, tokens_N)
        return Drawn(logits_NV, tokens_N)

    def _keep_tokens(self, plan: StepPlan, tokens_N: Tensor) -> None:
        """Note the tokens that finished prompts and decodes have drawn."""
        rows: list[int] = []
        index: list[int] = []
        first = 0
        for chunk in plan.chunks:
            num_logits = chunk.end - max(chunk.logits_from, chunk.start)
            first += num_logits
            if chunk.end == chunk.prompt_length and num_logits:
                rows.append(chunk.row)
                index.append(first - 1)
        rows += [decode.row for decode in plan.decodes]
        index += range(first, first + len(plan.decodes))
        if rows:
            self._last_token_R[self._index(rows)] = tokens_N[self._index(index)]

    def ask(self, knobs: Knobs) -> None:
        """Get ready for hot knobs: steps are recorded anew where a graph would keep what held at
        its recording. What was asked for before is forgotten."""
        self.kv.transfer.ways.set_programs(knobs.copy_programs)
        if self.steps is not None:
            self.steps.graphs.ask(graph_target(self.kv, knobs))

    @property
    def readiness(self) -> float:
        """How much of that is done, 0 to 1; at 1 ``apply`` may take the knobs."""
        graphs = self.steps.graphs if self.steps is not None else None
        return 1.0 if graphs is None or graphs.is_ready else graphs.progress

    @property
    def is_preparing(self) -> bool:
        """Whether ``prepare`` has something to do."""
        return self.steps is not None and self.steps.graphs.is_recording

    @torch.inference_mode()
    def prepare(self, *, idle: bool) -> None:
        """Between two steps: record some of the graphs to come. ``idle``: nobody waits for a
        step."""
        if self.steps is not None:
            self.steps.graphs.advance(idle=idle)

    def apply(self, knobs: Knobs) -> None:
        """Take the knobs that were asked for last."""
        self.kv.apply(knobs)
        self._profile(knobs)
        self._spec = replace(self._spec, knobs=knobs)
        if self.steps is not None:
            self.steps.graphs.switch()

    def look_ahead(self, looks_ahead: bool) -> None:
        """Turn look-ahead on or off: all steps are recorded anew, at once. Only for
        measurements."""
        self._spec = replace(self._spec, look_ahead=looks_ahead)
        before = self.steps.tiered if self.steps is not None else None
        if self.runs_ahead:
            torch.cuda.synchronize(self._device)  # the graphs that go may still be running
        self.steps = self._make_steps()
        if before is not None and self.steps.tiered is not None:
            self.steps.tiered.count_on(before)
        self.steps.record_all(lambda _frac: None)

    def stats(self) -> EngineStats:
        """Counters and gauges of tiers and device; the caller adds those of requests and steps."""
        self.recall.collect()
        tiers = self._tier_stats.read(self.steps.tiered if self.steps else None)
        return replace(tiers, hbm_peak_bytes=self._memory.peak_bytes())

    def _make_facts(
        self, link: LinkProbe, *, calibration: LinkCalibration | None, load_s: float
    ) -> EngineFacts:
        return EngineFacts(
            pid=os.getpid(),
            device_name=device_name(self._device),
            weights_bytes=self.decoder.weights.num_bytes,
            load_s=load_s,
            link=link,
            versions=library_versions(),
            copies=self.kv.transfer.ways.entries(block_bytes=self.kv.geometry.layer_bytes),
            calibration=calibration,
            selection_trace=self._spec.selection_trace,
        )

    def _profile(self, knobs: Knobs) -> None:
        """Sample recall and time fetches of the steps to come, or neither."""
        stride = self._spec.recall_stride if knobs.is_profiled else NO_RECALL
        self.attention.tiers.recall_stride = stride
        self.fetch_times.is_on = knobs.is_profiled

    def _make_meter(self) -> OverheadMeter | None:
        """What learns when requests that might select attend in place, anew for other steps; a
        recording must be followed."""
        may_choose = self._trace is None and not self._spec.always_select
        if self._copy_bytes_per_s is None or not may_choose:
            return None
        knobs, geometry = self._spec.knobs, self.kv.geometry
        return make_meter(
            geometry,
            Clock(self._device, warm_ups=WARM_UPS, repeats=REPEATS),
            method=SparseMethod(knobs.sparse_method),
            max_pages=geometry.max_pages(knobs.max_model_len),
            bytes_per_s=self._copy_bytes_per_s,
        )

    def _make_steps(self) -> StepDecoder:
        return make_steps(
            self._spec,
            self.decoder,
            self.kv,
            fetch_times=self.fetch_times,
            last_token_R=self._last_token_R,
            trace=self._trace,
            meter=self._make_meter(),
        )

    def _inputs(self, plan: StepPlan) -> EagerInput:
        tokens: list[int] = []
        positions: list[int] = []
        lengths: list[int] = []
        wanted: list[int] = []
        for chunk in plan.chunks:
            wanted += _logits_index(chunk, first=len(tokens))
            tokens += chunk.tokens
            positions += range(chunk.start, chunk.end)
            lengths += [chunk.prompt_length] * len(chunk.tokens)
        for decode in plan.decodes:
            wanted.append(len(tokens))
            tokens.append(-1 if decode.token is None else decode.token)
            positions.append(decode.position)
            lengths.append(decode.position + 1)
        return EagerInput(
            tokens_N=self._known(tokens, plan.decodes),
            positions_N=self._index(positions),
            lengths_N=self._index(lengths),
            logits_index_n=self._index(wanted),
        )

    def _known(self, tokens: list[int], decodes: Decodes) -> Tensor:
        """The tokens of a step, those that only the device knows filled in."""
        tokens_N = self._index(tokens)
        if any(decode.token is None for decode in decodes):
            last_B = self._last_token_R[self._index([decode.row for decode in decodes])]
            given_B = tokens_N[-len(decodes) :]
            tokens_N[-len(decodes) :] = torch.where(given_B < 0, last_B, given_B)
        return tokens_N

    def _index(self, values: list[int]) -> Tensor:
        return upload(values, device=self._device)


def _in_order(eager: Drawn, resident: Drawn, *, decodes: Decodes, last: Decodes) -> Drawn:
    """Both parts of a step, the decode rows in the order of ``decodes``; ``last`` are those of
    the second part."""
    num_eager = len(eager.tokens_N)
    num_chunk_rows = num_eager - (len(decodes) - len(last))
    places = {decode.row: num_eager + i for i, decode in enumerate(last)}
    others = iter(range(num_chunk_rows, num_eager))
    order = [places[d.row] if d.row in places else next(others) for d in decodes]
    joined = [torch.cat(pair) for pair in zip(eager, resident, strict=True)]
    if order != sorted(order):
        index = upload([*range(num_chunk_rows), *order], device=eager.tokens_N.device)
        joined = [tensor[index] for tensor in joined]
    return Drawn(*joined)


def _logits_index(chunk: PromptChunk, *, first: int) -> range:
    """Places in the step, whose chunk begins at ``first``, of positions that need logits."""
    offset = first - chunk.start
    return range(max(chunk.logits_from, chunk.start) + offset, chunk.end + offset)
