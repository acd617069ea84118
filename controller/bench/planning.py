"""What a run will send, and when: drawn from distributions, read from a trace, or both."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sparsed.controller.bench.lengths import Lengths, UniformLengths
from sparsed.controller.workload import parse_trace
from sparsed.core import InputError, Workload, WorkloadRequest

DEFAULT_NUM_PROMPTS = 100
DEFAULT_INPUT = UniformLengths(low=1024, high=1024)
DEFAULT_OUTPUT = UniformLengths(low=128, high=128)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadOptions:
    """None: from the trace if there is one, else a default.

    ``request_rate_per_s`` may be infinite: all at once. ``burstiness`` is the shape of the gamma
    distribution of the gaps: 1 is Poisson, less is burstier. ``time_scale`` 2 replays a trace in
    half its time. ``shared_prefix_tokens`` come before the input, the same in every prompt. The
    maxima clip what was drawn or read.
    """

    num_prompts: int | None = None
    request_rate_per_s: float | None = None
    burstiness: float = 1.0
    input_lengths: Lengths | None = None
    output_lengths: Lengths | None = None
    shared_prefix_tokens: int = 0
    trace: Path | None = None
    time_scale: float = 1.0
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadPlan:
    """``num_clipped`` requests are shorter than asked for; ``num_unused`` rows of the trace lie
    beyond the number of prompts."""

    options: WorkloadOptions
    workload: Workload
    num_clipped: int = 0
    num_unused: int = 0


def plan_workload(options: WorkloadOptions) -> WorkloadPlan:
    """The same options give the same plan. InputError names the option, or the line of the trace
    that is wrong."""
    _check(options)
    rows = [] if options.trace is None else _read(options.trace)
    wanted = options.num_prompts or len(rows) or DEFAULT_NUM_PROMPTS
    if options.trace is not None and wanted > len(rows):
        raise InputError(
            f"--num-prompts {wanted}: the trace has only {len(rows)} requests",
            field="num-prompts",
        )
    drawn = _with_lengths(rows[:wanted] or [_blank()] * wanted, options=options)
    placed = _with_arrivals(drawn, options=options)
    clipped = [_clipped(request, options=options) for request in placed]
    return WorkloadPlan(
        options=options,
        workload=Workload(
            name=options.trace.stem if options.trace else "random", requests=tuple(clipped)
        ),
        num_clipped=sum(a is not b for a, b in zip(placed, clipped, strict=True)),
        num_unused=len(rows) - wanted if rows else 0,
    )


def _check(options: WorkloadOptions) -> None:
    if options.trace is None and options.time_scale != 1.0:
        raise InputError("--time-scale needs --trace", field="time-scale")
    if options.request_rate_per_s is not None and options.time_scale != 1.0:
        raise InputError(
            "--request-rate replaces the arrivals that --time-scale would scale; leave one out",
            field="time-scale",
        )
    if options.trace is not None and options.shared_prefix_tokens:
        raise InputError(
            "--shared-prefix-len: prefixes of a trace come from its hash ids; leave one out",
            field="shared-prefix-len",
        )
    rate = options.request_rate_per_s
    if rate is not None and not rate > 0:
        raise InputError(
            f"--request-rate {rate:g}: give requests per second above 0, or inf",
            field="request-rate",
        )
    for name, value in (("time-scale", options.time_scale), ("burstiness", options.burstiness)):
        if not 0 < value < math.inf:
            raise InputError(f"--{name} {value:g}: give a number above 0", field=name)


def _read(trace: Path) -> list[WorkloadRequest]:
    """The rows of a trace, the first of which arrives at 0."""
    try:
        lines = trace.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--trace {trace} cannot be read: {error}", field="trace") from None
    rows = parse_trace(lines, field="trace")
    return [replace(row, arrival_s=row.arrival_s - rows[0].arrival_s) for row in rows]


def _blank() -> WorkloadRequest:
    return WorkloadRequest(arrival_s=0.0, input_tokens=0, output_tokens=0)


def _with_lengths(
    rows: list[WorkloadRequest], *, options: WorkloadOptions
) -> list[WorkloadRequest]:
    generator = random.Random(f"{options.seed} lengths")
    is_drawn = options.trace is None
    inputs = options.input_lengths or (DEFAULT_INPUT if is_drawn else None)
    outputs = options.output_lengths or (DEFAULT_OUTPUT if is_drawn else None)
    return [
        replace(
            row,
            input_tokens=options.shared_prefix_tokens + inputs.draw(generator)
            if inputs
            else row.input_tokens,
            output_tokens=outputs.draw(generator) if outputs else row.output_tokens,
        )
        for row in rows
    ]


def _with_arrivals(
    rows: list[WorkloadRequest], *, options: WorkloadOptions
) -> list[WorkloadRequest]:
    if options.trace is not None and options.request_rate_per_s is None:
        return [replace(row, arrival_s=row.arrival_s / options.time_scale) for row in rows]
    return [
        replace(row, arrival_s=arrival_s)
        for row, arrival_s in zip(rows, _arrivals(options), strict=False)
    ]


def _arrivals(options: WorkloadOptions) -> Iterator[float]:
    """Endless; the first is 0, so that nobody waits for a rare first request."""
    generator = random.Random(f"{options.seed} arrivals")
    rate, shape = options.request_rate_per_s or math.inf, options.burstiness
    arrival_s = 0.0
    while True:
        yield arrival_s
        if rate < math.inf:
            arrival_s += generator.gammavariate(shape, 1.0 / (rate * shape))


def _clipped(request: WorkloadRequest, *, options: WorkloadOptions) -> WorkloadRequest:
    """``request`` itself where nothing is to be cut."""
    most = (options.max_input_tokens or math.inf, options.max_output_tokens or math.inf)
    if request.input_tokens <= most[0] and request.output_tokens <= most[1]:
        return request
    return replace(
        request,
        input_tokens=int(min(request.input_tokens, most[0])),
        output_tokens=int(min(request.output_tokens, most[1])),
    )
