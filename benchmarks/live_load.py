"""Loads with targets of their own, sent to a daemon in phases, and what of them was served in time."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from sparsed.controller.bench.client import LoadOptions, PreparedRequest, run_load
from sparsed.controller.bench.connection import parse_server
from sparsed.controller.bench.endpoint import Endpoint
from sparsed.controller.bench.lengths import Lengths, parse_lengths
from sparsed.controller.bench.preflight import find_model, reach
from sparsed.controller.bench.prompts import PromptMaker, TokenIds
from sparsed.controller.bench.records import RequestRecord
from sparsed.controller.bench.summary import Spread, meets, spread
from sparsed.core import Slo, WorkloadContext, WorkloadRequest
from sparsed.profiler.span import percentile

SLICE_S: Final = 10.0  # of the goodput over time
MIN_PLANNED: Final = 200  # requests of which the middle of a load is taken


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Requests that come by themselves, ``rate`` a second, ``burst`` at once. ``shape``: of the
    gamma distribution of the gaps between bursts; 1 is Poisson, more is more even.

    ``patience_s``: after which a client gives up on the whole answer.
    """

    name: str
    rate: float
    burst: int
    shape: float
    input_lengths: Lengths
    output_lengths: Lengths
    slo: Slo
    patience_s: float

    def requests(self, seconds: float, *, seed: int) -> list[WorkloadRequest]:
        """Those that come in ``seconds``, the first at 0; the same for the same seed, and a longer
        time begins with the same."""
        generator = random.Random(f"{seed} {self.name}")
        found: list[WorkloadRequest] = []
        arrival_s, gap_s = 0.0, self.burst / self.rate
        while arrival_s < seconds:
            found += [
                WorkloadRequest(
                    arrival_s=arrival_s,
                    input_tokens=self.input_lengths.draw(generator),
                    output_tokens=self.output_lengths.draw(generator),
                )
                for _ in range(self.burst)
            ]
            arrival_s += generator.gammavariate(self.shape, gap_s / self.shape)
        return found

    def context(self, *, seed: int) -> WorkloadContext:
        """What a daemon that serves this load is asked for, as it sees it."""
        planned = self.requests(MIN_PLANNED / self.rate, seed=seed)
        inputs = sorted(one.input_tokens for one in planned)
        outputs = sorted(one.output_tokens for one in planned)
        return WorkloadContext(
            span_s=MIN_PLANNED / self.rate,
            num_requests=len(planned),
            requests_per_s=self.rate,
            input_tokens_p50=percentile(inputs, 0.50),
            input_tokens_p95=percentile(inputs, 0.95),
            output_tokens_p50=percentile(outputs, 0.50),
            output_tokens_p95=percentile(outputs, 0.95),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    load: Load
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What became of one phase; times in seconds since the phase began, and of the whole trace for
    ``begin_s``. ``share``: of the requests that came, those that met both targets."""

    load: str
    begin_s: float
    seconds: float
    num_requests: int
    num_good: int
    share: float
    goodput_per_s: float
    errors: Mapping[str, int]
    ttft: Spread | None
    tpot: Spread | None
    shares_over_time: tuple[float | None, ...]  # of every ``SLICE_S``, by arrival
    requests: tuple[tuple[float, float | None, float | None], ...]  # arrival, TTFT, TPOT


def parse_load(name: str, defaults: str, given: str) -> Load:
    """``KEY=VALUE,...`` over ``defaults`` of the same form. ValueError for a key that is none.

    Patience is what the slowest answer in time takes, and half as much again.
    """
    known = dict(pair.split("=", 1) for pair in defaults.split(","))
    told = dict(pair.split("=", 1) for pair in given.split(",") if pair)
    if unknown := told.keys() - known.keys():
        raise ValueError(f"{sorted(unknown)} say nothing of a load; give any of {sorted(known)}")
    values = known | told
    outputs = parse_lengths(values["output"], field="output")
    slo = Slo(ttft_s=float(values["ttft_ms"]) / 1e3, tpot_s=float(values["tpot_ms"]) / 1e3)
    assert slo.ttft_s is not None and slo.tpot_s is not None
    generator = random.Random(0)
    longest = max(outputs.draw(generator) for _ in range(MIN_PLANNED))
    return Load(
        name=name,
        rate=float(values["rate"]),
        burst=int(values["burst"]),
        shape=float(values["shape"]),
        input_lengths=parse_lengths(values["input"], field="input"),
        output_lengths=outputs,
        slo=slo,
        patience_s=1.5 * (slo.ttft_s + longest * slo.tpot_s),
    )


def serve(
    url: str, phases: Sequence[Phase], *, vocab_size: int, seed: int, prompt_seed: int
) -> tuple[float, list[Served]]:
    """Send the phases one after the other, whatever comes back, and wait for the last answer; when
    the first one began, in seconds since the epoch, and what became of each.

    Phases of one load have the same arrivals; ``prompt_seed`` makes other prompts of them.
    """
    return asyncio.run(
        _serve(url, phases, vocab_size=vocab_size, seed=seed, prompt_seed=prompt_seed)
    )


def judge(phase: Phase, records: Iterable[RequestRecord], *, begin_s: float) -> Served:
    """``records`` of the requests that came in one phase."""
    own = sorted(records, key=lambda record: record.arrival_s)
    slo = phase.load.slo
    good = [record for record in own if meets(record, slo=slo)]
    errors: dict[str, int] = {}
    for record in own:
        if record.error is not None:
            errors[record.error] = errors.get(record.error, 0) + 1
    return Served(
        load=phase.load.name,
        begin_s=begin_s,
        seconds=phase.seconds,
        num_requests=len(own),
        num_good=len(good),
        share=len(good) / len(own) if own else 0.0,
        goodput_per_s=len(good) / phase.seconds,
        errors=errors,
        ttft=spread(record.ttft_s for record in own),
        tpot=spread(record.tpot_s for record in own),
        shares_over_time=_over_time(phase, own, begin_s=begin_s),
        requests=tuple(
            (round(one.arrival_s - begin_s, 3), _rounded(one.ttft_s), _rounded(one.tpot_s))
            for one in own
        ),
    )


def _over_time(
    phase: Phase, own: Sequence[RequestRecord], *, begin_s: float
) -> tuple[float | None, ...]:
    num_slices = math.ceil(phase.seconds / SLICE_S)
    slices: list[list[bool]] = [[] for _ in range(num_slices)]
    for record in own:
        place = min(num_slices - 1, int((record.arrival_s - begin_s) / SLICE_S))
        slices[place].append(meets(record, slo=phase.load.slo))
    return tuple(round(sum(one) / len(one), 3) if one else None for one in slices)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


async def _serve(
    url: str, phases: Sequence[Phase], *, vocab_size: int, seed: int, prompt_seed: int
) -> tuple[float, list[Served]]:
    server = await reach(parse_server(url))
    model = (await find_model(server, wanted=None)).name
    prompts = PromptMaker(ids=TokenIds.below(vocab_size), seed=prompt_seed)
    prepared: list[list[PreparedRequest]] = []
    begins: list[float] = []
    begin_s = 0.0
    for number, phase in enumerate(phases):
        wanted = [
            replace(one, arrival_s=begin_s + one.arrival_s)
            for one in phase.load.requests(phase.seconds, seed=seed)
        ]
        prepared.append(prepare_requests(wanted, model=model, prompts=prompts, label=f"{number}"))
        begins.append(begin_s)
        begin_s += phase.seconds
    began_at = time.time()
    results = await asyncio.gather(
        *(
            run_load(
                requests,
                options=LoadOptions(
                    server=server,
                    path=Endpoint.COMPLETIONS.path,
                    timeout_s=phase.load.patience_s,
                ),
            )
            for phase, requests in zip(phases, prepared, strict=True)
        )
    )
    return began_at, [
        judge(phase, result.records, begin_s=begin)
        for phase, result, begin in zip(phases, results, begins, strict=True)
    ]


def prepare_requests(
    requests: Sequence[WorkloadRequest], *, model: str, prompts: PromptMaker, label: str
) -> list[PreparedRequest]:
    """Ready to be sent; no two prompts of different labels are alike."""
    return [
        PreparedRequest(
            record=RequestRecord(
                number=number,
                arrival_s=one.arrival_s,
                input_tokens=one.input_tokens,
                max_tokens=one.output_tokens,
            ),
            body=msgspec.json.encode(
                {
                    "model": model,
                    "prompt": prompts.tokens(f"{label} {number}", one),
                    "max_tokens": one.output_tokens,
                    "temperature": 0.0,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                    "ignore_eos": True,
                }
            ),
        )
        for number, one in enumerate(requests)
    ]
