"""The figures of a run, from its records; no clock and no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sparsed.controller.bench.client import LoadResult
from sparsed.controller.bench.records import INTERRUPTED, RequestRecord
from sparsed.core import Slo

PERCENTILES: Final = (50, 90, 95, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Mean, percentiles (linear between neighbours) and maximum of ``count`` values, in ms."""

    count: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Rates are over ``duration_s``, from the first request sent to the end of the last one, and
    count complete requests only. None: no value, or no target for goodput. ``errors``: by kind,
    without the requests that an interruption cut off. ``num_cut_off``: ended in the middle of the
    answer, by a failure or an interruption; ``ttft`` and ``itl`` hold what was measured of them,
    and nothing else does. ``num_short``: complete, with fewer tokens
    than asked for. ``mean_concurrency``: requests under way, mean over the duration."""

    duration_s: float
    num_requests: int
    num_complete: int
    num_interrupted: int
    num_cut_off: int
    num_short: int
    errors: Mapping[str, int]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    goodput_requests_per_s: float | None
    goodput_frac: float | None
    mean_concurrency: float
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None
    client_lag: Spread | None


def summarize(result: LoadResult, *, slo: Slo) -> Summary:
    """The figures of all requests together."""
    ended = [record for record in result.records if record.error != INTERRUPTED]
    complete = [record for record in ended if record.is_complete]
    cut_off = [record for record in result.records if record.was_cut_off]
    total_s = duration_s(result.records)
    per_s = 1.0 / total_s if total_s else 0.0
    output_tokens = sum(record.output_tokens for record in complete)
    prompt_tokens = sum(record.prompt_tokens for record in complete)
    has_target = slo.ttft_s is not None or slo.tpot_s is not None
    num_good = sum(meets(record, slo=slo) for record in complete)
    return Summary(
        duration_s=total_s,
        num_requests=len(result.records),
        num_complete=len(complete),
        num_interrupted=len(result.records) - len(ended),
        num_cut_off=len(cut_off),
        num_short=sum(record.output_tokens < record.max_tokens for record in complete),
        errors=dict(Counter(record.error for record in ended if record.error is not None)),
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(record.usage.cached_tokens for record in complete if record.usage),
        output_tokens=output_tokens,
        requests_per_s=len(complete) * per_s,
        output_tokens_per_s=output_tokens * per_s,
        total_tokens_per_s=(prompt_tokens + output_tokens) * per_s,
        goodput_requests_per_s=num_good * per_s if has_target else None,
        goodput_frac=num_good / len(ended) if has_target and ended else None,
        mean_concurrency=_busy_s(result.records) * per_s,
        ttft=spread(record.ttft_s for record in (*complete, *cut_off)),
        tpot=spread(record.tpot_s for record in complete),
        itl=spread(gap_s for record in (*complete, *cut_off) for gap_s in record.itl_s),
        e2e=spread(record.e2e_s for record in complete),
        client_lag=spread(result.lags_s),
    )


def meets(record: RequestRecord, *, slo: Slo) -> bool:
    """Whether a request is complete and within both targets; one token has no TPOT to miss."""
    if not record.is_complete:
        return False
    pairs = ((record.ttft_s, slo.ttft_s), (record.tpot_s, slo.tpot_s))
    return all(
        taken_s is None or target_s is None or taken_s <= target_s for taken_s, target_s in pairs
    )


def spread(values_s: Iterable[float | None]) -> Spread | None:
    """Of the values that are there, which are seconds; None if there are none."""
    values_ms = 1e3 * np.array([value for value in values_s if value is not None])
    if not values_ms.size:
        return None
    p50, p90, p95, p99 = (float(value) for value in np.percentile(values_ms, PERCENTILES))
    return Spread(
        count=values_ms.size,
        mean_ms=float(values_ms.mean()),
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        max_ms=float(values_ms.max()),
    )


def duration_s(records: Sequence[RequestRecord]) -> float:
    """From the first request sent to the end of the last one."""
    sent = [record.sent_s for record in records if record.sent_s is not None]
    ended = [record.ended_s for record in records if record.ended_s is not None]
    return max(ended) - min(sent) if sent and ended else 0.0


def _busy_s(records: Sequence[RequestRecord]) -> float:
    return sum(
        record.ended_s - record.sent_s
        for record in records
        if record.sent_s is not None and record.ended_s is not None
    )
