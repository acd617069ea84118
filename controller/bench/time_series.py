"""A run second by second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sparsed.controller.bench.records import INTERRUPTED, RequestRecord
from sparsed.controller.bench.summary import duration_s

BIN_S: Final = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SecondOfRun:
    """One second from ``start_s`` after the first request on. ``running`` is the mean number of
    requests under way; ``ttft_ms`` the mean over first tokens of this second, None without any."""

    start_s: float
    running: float
    output_tokens_per_s: float
    num_first_tokens: int
    ttft_ms: float | None
    num_errors: int


def time_series(records: Sequence[RequestRecord]) -> tuple[SecondOfRun, ...]:
    """Every second of the run, failed and interrupted requests included; empty if none was sent.

    Where a chunk holds several tokens, each chunk of the request counts the mean number.
    """
    sent = [record for record in records if record.sent_s is not None]
    if not sent:
        return ()
    first_s = min(record.sent_s for record in sent if record.sent_s is not None)
    num_bins = max(1, math.ceil(duration_s(sent) / BIN_S))
    edges_s: NDArray[np.float64] = first_s + BIN_S * np.arange(num_bins + 1, dtype=np.float64)
    running = sum((_running(record, edges_s) for record in sent), np.zeros(num_bins))
    tokens = sum((_tokens(record, edges_s) for record in sent), np.zeros(num_bins))
    num_first, ttft_sum_s = _first_tokens(sent, edges_s)
    errors = _counts([r.ended_s for r in sent if r.error not in (None, INTERRUPTED)], edges_s)
    return tuple(
        SecondOfRun(
            start_s=index * BIN_S,
            running=float(running[index]),
            output_tokens_per_s=float(tokens[index]) / BIN_S,
            num_first_tokens=int(num_first[index]),
            ttft_ms=1e3 * float(ttft_sum_s[index] / num_first[index]) if num_first[index] else None,
            num_errors=int(errors[index]),
        )
        for index in range(num_bins)
    )


def _running(record: RequestRecord, edges_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Part of each bin in which the request was under way."""
    if record.sent_s is None or record.ended_s is None:
        return np.zeros(len(edges_s) - 1)
    inside_s = np.minimum(edges_s[1:], record.ended_s) - np.maximum(edges_s[:-1], record.sent_s)
    part: NDArray[np.float64] = np.maximum(inside_s, 0.0) / BIN_S
    return part


def _tokens(record: RequestRecord, edges_s: NDArray[np.float64]) -> NDArray[np.float64]:
    weight = record.output_tokens / max(1, len(record.chunks_s))
    return weight * _counts(record.chunks_s, edges_s)


def _first_tokens(
    sent: Sequence[RequestRecord], edges_s: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Number of first tokens in each bin, and the sum of their times in seconds."""
    pairs = [(record.first_s, record.ttft_s) for record in sent if record.first_s is not None]
    first_s = [first for first, _ in pairs]
    weights = np.array([ttft or 0.0 for _, ttft in pairs])
    sums, _ = np.histogram(first_s, bins=edges_s, weights=weights)
    return _counts(first_s, edges_s), sums


def _counts(times_s: Sequence[float | None], edges_s: NDArray[np.float64]) -> NDArray[np.float64]:
    known_s = [time_s for time_s in times_s if time_s is not None]
    counts, _ = np.histogram(known_s, bins=edges_s)
    return counts.astype(np.float64)
