"""Decode steps of a real engine in their steady state, against their graph alone and a floor.

METHOD: all requests decode; after ``WARM_UP_STEPS`` steps, ``NUM_STEPS`` of them are timed from
outside, with the host's part and the reading of tokens in them. Then the captured graph of the
last step is replayed alone; what a step took beyond that is host time that was not hidden. The
floor is what a step must read (weights; K and V that were attended to, counted by the engine) at
the rate of a plain copy in the same run. Prompts are random tokens.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import replace

import torch

from sparsed.core import (
    NO_RECALL,
    AddRequest,
    DecodePoint,
    DecodeReport,
    DecodeSpeed,
    EngineSpec,
    ExitCode,
    MeasureDecode,
    SamplingParams,
    Service,
    SparseDetails,
    StartError,
    TokenBatch,
)
from sparsed.engine.assembly import Progress
from sparsed.engine.decode_batch import is_sparse
from sparsed.engine.engine import Engine
from sparsed.engine.measure.ceilings import copy_bytes_per_s
from sparsed.engine.measure.clock import Clock
from sparsed.engine.measure.points import (
    NUM_STEPS,
    WARM_UP_STEPS,
    fits,
    prompt_tokens,
    step_read_bytes,
    total_tokens,
)
from sparsed.engine.runner import Runner


def measure_decode(wanted: MeasureDecode, *, on_progress: Progress) -> DecodeReport:
    """Make an engine and measure every point that fits it.

    Errors: InputError for the model's files, StartError for memory, or if no point fits.
    """
    spec = replace(wanted.spec, recall_stride=NO_RECALL)
    device = torch.device(spec.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    on_progress("measuring memory", 0.0)
    copy_rate = copy_bytes_per_s(Clock(device))
    runner = Runner(spec, on_progress=on_progress)
    meter = DecodeMeter(
        runner,
        Engine(runner, knobs=spec.knobs, service=Service(recall_floor=0.0)),
        spec=spec,
        copy_bytes_per_s=copy_rate,
    )
    fitting = [point for point in wanted.points if meter.fits(point)]
    if not fitting:
        raise StartError(
            "no batch of any context fits the tiers at once; raise kv_hbm_gib or kv_dram_gib, or "
            "take a smaller one",
            code=ExitCode.UNAVAILABLE,
        )
    steps = []
    for number, point in enumerate(fitting, start=1):
        steps.append(meter.measure(point))
        on_progress("measuring decode steps", number / len(fitting))
    return DecodeReport(
        model=spec.model,
        device_name=runner.facts.device_name,
        dtype=spec.dtype,
        knobs=spec.knobs,
        versions=runner.facts.versions,
        copy_bytes_per_s=copy_rate,
        steps=tuple(steps),
        skipped=tuple(point for point in wanted.points if point not in fitting),
        selection_trace=spec.selection_trace,
    )


class DecodeMeter:
    """Measures on an engine that has no other requests, and leaves it without any. One thread."""

    def __init__(
        self, runner: Runner, engine: Engine, *, spec: EngineSpec, copy_bytes_per_s: float
    ) -> None:
        self._runner = runner
        self._engine = engine
        self._spec = spec
        self._shape = runner.decoder.config.shape
        self._copy_bytes_per_s = copy_bytes_per_s
        self._clock = Clock(torch.device(spec.device))
        self._lengths: Counter[str] = Counter()  # tokens of each request, as far as reported

    def fits(self, point: DecodePoint) -> bool:
        """Whether all requests of the point run at once."""
        spec = self._spec
        return fits(point, knobs=spec.knobs, plan=spec.plan, num_lanes=self._shape.num_lanes)

    def measure(self, point: DecodePoint) -> DecodeSpeed:
        """The point must fit."""
        self._start(point)
        for _ in range(WARM_UP_STEPS):
            self._step()
        lengths = sum(self._lengths.values())
        step_s = self._step_s()
        assert self._engine.num_decoding == point.requests, "a request ended too early"
        graph_s = self._graph_s()
        kv_tokens = lengths + point.requests * (NUM_STEPS // 2 + self._runner.runs_ahead)
        read_frac = self._stop(point)
        return self._speed(
            point,
            step_s=step_s,
            graph_s=graph_s,
            kv_tokens=kv_tokens,
            read_tokens=round(kv_tokens * read_frac),
        )

    def _speed(
        self,
        point: DecodePoint,
        *,
        step_s: float,
        graph_s: float | None,
        kv_tokens: int,
        read_tokens: int,
    ) -> DecodeSpeed:
        dtype = self._spec.dtype
        read_bytes = step_read_bytes(self._shape, dtype=dtype, kv_tokens=read_tokens)
        floor_s = read_bytes / self._copy_bytes_per_s
        return DecodeSpeed(
            requests=point.requests,
            tokens=round(kv_tokens / point.requests),
            step_ms=step_s * 1e3,
            graph_ms=None if graph_s is None else graph_s * 1e3,
            not_hidden_ms=None if graph_s is None else (step_s - graph_s) * 1e3,
            read_bytes=read_bytes,
            floor_ms=floor_s * 1e3,
            floor_ratio=step_s / floor_s,
            tokens_per_s=point.requests / step_s,
        )

    def _start(self, point: DecodePoint) -> None:
        """Add the requests of a point and compute their prompts."""
        assert not self._engine.has_work
        chunk_tokens = self._spec.knobs.prefill_chunk
        total = total_tokens(point, chunk_tokens=chunk_tokens)
        self._lengths.clear()
        for number in range(point.requests):
            length = prompt_tokens(point, number, chunk_tokens=chunk_tokens)
            draw = random.Random(number)
            tokens = tuple(draw.choices(range(self._shape.vocab_size), k=length))
            sampling = SamplingParams(max_tokens=total - length, temperature=0.0)
            self._lengths[str(number)] = length
            self._engine.add(
                AddRequest(request_id=str(number), prompt_tokens=tokens, sampling=sampling)
            )
        while self._engine.num_decoding < point.requests:
            self._step()

    def _step(self) -> None:
        batch = self._engine.step()
        for output in batch.outputs:
            assert output.finish_reason is None, output.error or "a request ended too early"
            self._lengths[output.request_id] += 1

    def _step_s(self) -> float:
        self._clock.synchronize()
        started_s = time.perf_counter()
        for _ in range(NUM_STEPS):
            self._engine.step()
        self._clock.synchronize()
        return (time.perf_counter() - started_s) / NUM_STEPS

    def _graph_s(self) -> float | None:
        """Of the captured step alone; None where the last step was not one."""
        steps, kv = self._runner.steps, self._runner.kv
        page_size = kv.geometry.page_size
        if steps is None or not steps.replays:
            return None
        if any(
            not row.complete or is_sparse(row, row.max_tokens, page_size)
            for row in kv.rows.values()
        ):
            return None
        return self._clock.median_s(steps.replay)

    def _stop(self, point: DecodePoint) -> float:
        """End all requests; tokens that their steps have read over those there were."""
        for number in range(point.requests):
            self._engine.abort(str(number))
        details: list[SparseDetails] = []
        while self._engine.has_work:
            details += _details(self._engine.step())
        return sum(d.tokens_read for d in details) / sum(d.tokens_dense for d in details)


def _details(batch: TokenBatch) -> list[SparseDetails]:
    return [output.sparse for output in batch.outputs if output.sparse is not None]
