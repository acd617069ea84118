"""A run on paper: JSON and CSV files, and tables for people."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

from sparsed.controller.bench.client import LoadResult
from sparsed.controller.bench.records import RequestRecord
from sparsed.controller.bench.summary import Spread, Summary, meets, spread
from sparsed.controller.bench.time_series import SecondOfRun
from sparsed.core import Slo

RESULT_FILE: Final = "result.json"
REQUESTS_FILE: Final = "requests.csv"
DEFINITIONS: Final = {
    "ttft": "from sending a request to its first chunk with a token, cut-off requests included",
    "tpot": "(last token - first token) / (output tokens - 1), per request",
    "itl": "between two chunks with tokens, over all requests, cut-off ones included",
    "e2e": "from sending a request to its last token",
    "goodput": "complete requests per second that meet every SLO target given",
    "client_lag": "how late the client's own event loop woke: no time here is finer",
}
LATENCIES: Final = ("ttft", "tpot", "itl", "e2e", "client_lag")
MIN_LAG_MS: Final = 5.0
MAX_LAG_FRAC: Final = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchReport:
    """Everything a run gave. ``about`` is plain data: command, target, workload, versions."""

    about: Mapping[str, object]
    slo: Slo
    result: LoadResult
    summary: Summary
    seconds: tuple[SecondOfRun, ...]


def to_plain(report: BenchReport) -> dict[str, object]:
    """The report without its single requests, as JSON data."""
    return {
        **report.about,
        "slo": {"ttft_s": report.slo.ttft_s, "tpot_s": report.slo.tpot_s},
        "interrupted": report.result.is_interrupted,
        "summary": asdict(report.summary),
        "time_series": [asdict(second) for second in report.seconds],
        "definitions": DEFINITIONS,
    }


def write_files(report: BenchReport, directory: Path) -> tuple[Path, ...]:
    """``result.json`` and ``requests.csv``; OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    result, requests = directory / RESULT_FILE, directory / REQUESTS_FILE
    result.write_text(json.dumps(to_plain(report), indent=2) + "\n", encoding="utf-8")
    with requests.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for record in report.result.records:
            writer.writerow(column(record, report.slo) for column in _COLUMNS.values())
    return result, requests


def latency_rows(summary: Summary) -> Iterator[tuple[str, ...]]:
    """A row for each latency: name, then mean, percentiles and maximum in ms."""
    for name in LATENCIES:
        found: Spread | None = getattr(summary, name)
        if found is not None:
            values = (getattr(found, item.name) for item in fields(Spread) if item.name != "count")
            label = name.replace("_", " ") if "_" in name else name.upper()
            yield (label, *(f"{value:.2f}" for value in values))


def count_rows(summary: Summary) -> Iterator[tuple[str, str]]:
    """Counts and rates, with their units."""
    yield "duration", f"{summary.duration_s:.2f} s"
    yield "complete requests", f"{summary.num_complete} of {summary.num_requests}"
    yield "requests", f"{summary.requests_per_s:.3f} /s"
    if summary.goodput_requests_per_s is not None:
        share = f" ({summary.goodput_frac:.1%})" if summary.goodput_frac is not None else ""
        yield "goodput", f"{summary.goodput_requests_per_s:.3f} requests/s{share}"
    yield "output tokens", f"{summary.output_tokens} ({summary.output_tokens_per_s:.1f} /s)"
    yield "prompt tokens", f"{summary.prompt_tokens} ({summary.cached_tokens} cached)"
    yield "tokens together", f"{summary.total_tokens_per_s:.1f} /s"
    yield "mean concurrency", f"{summary.mean_concurrency:.2f}"


def remarks(report: BenchReport) -> Iterator[str]:
    """What a reader of the figures must know: failures, short outputs, a slow client."""
    summary = report.summary
    for kind, count in sorted(summary.errors.items()):
        first = next(item for item in report.result.records if item.error == kind)
        yield f"failed with {kind}: {count}; the first: {first.detail or 'no message'}"
    if summary.num_interrupted:
        yield f"interrupted; not answered completely: {summary.num_interrupted}"
    if summary.num_cut_off:
        yield (
            f"cut off in the middle of the answer: {summary.num_cut_off}; they count in TTFT and "
            "ITL as far as they came, and nowhere else"
        )
    workload = report.about.get("workload")
    if isinstance(workload, dict) and workload.get("num_clipped"):
        yield f"clipped to the maximal lengths: {workload['num_clipped']}"
    if summary.num_short:
        yield (
            f"shorter outputs than asked for: {summary.num_short}; the server stops early, or "
            "does not know ignore_eos"
        )
    lag, itl = summary.client_lag, summary.itl
    if lag and itl and lag.p99_ms > max(MIN_LAG_MS, MAX_LAG_FRAC * itl.p50_ms):
        yield (
            f"the client was late by {lag.p99_ms:.1f} ms (p99) itself: give it a core of its own "
            "before you believe the latencies"
        )


def _ms(value_s: float | None) -> str:
    return "" if value_s is None else f"{1e3 * value_s:.3f}"


def _s(value_s: float | None) -> str:
    return "" if value_s is None else f"{value_s:.6f}"


def _itl(name: str) -> Callable[[RequestRecord, Slo], object]:
    def read(record: RequestRecord, slo: Slo) -> object:
        found = spread(record.itl_s)
        return "" if found is None else f"{getattr(found, name):.3f}"

    return read


_COLUMNS: Final[Mapping[str, Callable[[RequestRecord, Slo], object]]] = {
    "number": lambda record, slo: record.number,
    "arrival_s": lambda record, slo: _s(record.arrival_s),
    "sent_s": lambda record, slo: _s(record.sent_s),
    "ended_s": lambda record, slo: _s(record.ended_s),
    "input_tokens": lambda record, slo: record.input_tokens,
    "prompt_tokens": lambda record, slo: record.prompt_tokens,
    "cached_tokens": lambda record, slo: record.usage.cached_tokens if record.usage else "",
    "max_tokens": lambda record, slo: record.max_tokens,
    "output_tokens": lambda record, slo: record.output_tokens,
    "num_chunks": lambda record, slo: len(record.chunks_s),
    "ttft_ms": lambda record, slo: _ms(record.ttft_s),
    "tpot_ms": lambda record, slo: _ms(record.tpot_s),
    "itl_mean_ms": _itl("mean_ms"),
    "itl_p99_ms": _itl("p99_ms"),
    "itl_max_ms": _itl("max_ms"),
    "e2e_ms": lambda record, slo: _ms(record.e2e_s),
    "meets_slo": lambda record, slo: int(meets(record, slo=slo)),
    "error": lambda record, slo: record.error or "",
    "detail": lambda record, slo: record.detail,
}
