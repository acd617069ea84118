"""What is asked of an engine of late, over more time than one window of the profiler."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Final, NamedTuple

from sparsed.core import Snapshot, WorkloadContext
from sparsed.profiler.span import percentile

HORIZON_S: Final = 60.0
ENOUGH_REQUESTS: Final = 16  # fewer in such a horizon: it reaches back until it has so many
FEWEST_REQUESTS: Final = 4  # in a shorter one, where they are fewer in proportion
MAX_STRETCH: Final = 10.0  # horizons


class _Second(NamedTuple):
    snapshot: Snapshot
    input_tokens: Sequence[int]  # of the requests that came
    output_tokens: Sequence[int]  # of those that finished


class ContextMeter:
    """Keeps the last windows and what came in them. One thread.

    ``horizon_s``: seconds that a context covers. A load of few requests is measured over more, at
    most ten times as many, for the percentiles of a handful of lengths are mostly noise. Under a
    minute fewer are enough: requests of the load before are what it would find further back.
    """

    def __init__(self, *, horizon_s: float = HORIZON_S) -> None:
        self._horizon_s: Final = horizon_s
        self._enough: Final = enough_requests(horizon_s)
        self._seconds: deque[_Second] = deque()

    def add(
        self, snapshot: Snapshot, *, input_tokens: Sequence[int], output_tokens: Sequence[int]
    ) -> WorkloadContext:
        """The context at the end of ``snapshot``, in which requests of these lengths came and
        finished."""
        self._seconds.append(_Second(snapshot, input_tokens, output_tokens))
        self._drop_old()
        return measure(self._newest())

    def _drop_old(self) -> None:
        kept_s = sum(one.snapshot.window_s for one in self._seconds)
        while len(self._seconds) > 1 and kept_s > MAX_STRETCH * self._horizon_s:
            kept_s -= self._seconds.popleft().snapshot.window_s

    def _newest(self) -> list[_Second]:
        """Those of the horizon, and as many before it as make the requests enough, if they do."""
        found: list[_Second] = []
        num_requests, span_s = 0, 0.0
        for one in reversed(self._seconds):
            if span_s >= self._horizon_s and num_requests >= self._enough:
                break
            found.append(one)
            num_requests += len(one.input_tokens)
            span_s += one.snapshot.window_s
        return found


def enough_requests(horizon_s: float) -> int:
    """Requests for which a context need not reach back beyond ``horizon_s``."""
    share = min(1.0, horizon_s / HORIZON_S)
    return max(FEWEST_REQUESTS, round(share * ENOUGH_REQUESTS))


def measure(seconds: Sequence[_Second]) -> WorkloadContext:
    """The figures of windows, in any order, at least one of them, the newest first."""
    snapshots = [one.snapshot for one in seconds]
    span_s = sum(one.window_s for one in snapshots)
    inputs = sorted(chain.from_iterable(one.input_tokens for one in seconds))
    outputs = sorted(chain.from_iterable(one.output_tokens for one in seconds))
    h2d_bytes = sum(one.h2d_bytes for one in snapshots)
    tokens = sum(one.generated_tokens_per_s * one.window_s for one in snapshots)
    return WorkloadContext(
        span_s=span_s,
        num_requests=len(inputs),
        requests_per_s=_ratio(len(inputs), span_s) or None,
        input_tokens_p50=percentile(inputs, 0.50),
        input_tokens_p95=percentile(inputs, 0.95),
        output_tokens_p50=percentile(outputs, 0.50),
        output_tokens_p95=percentile(outputs, 0.95),
        concurrency=_mean(
            snapshots, lambda one: one.num_running + one.num_waiting, lambda one: one.window_s
        ),
        hot_hit_frac=_mean(snapshots, lambda one: one.hot_hit_frac, _selected),
        h2d_bytes_per_token=_ratio(h2d_bytes, tokens),
        h2d_gb_per_s=_ratio(h2d_bytes / 1e9, sum(_copy_s(one) for one in snapshots)),
        hbm_free_bytes=snapshots[0].hbm.free_bytes if snapshots[0].hbm else None,
        attention_recall=_mean(
            snapshots, lambda one: one.attention_recall, lambda one: one.recall_samples
        ),
    )


def _selected(one: Snapshot) -> float:
    return (one.selected_pages_per_step or 0.0) * one.steps


def _copy_s(one: Snapshot) -> float:
    return one.h2d_bytes / 1e9 / one.h2d_gb_per_s if one.h2d_gb_per_s else 0.0


def _mean(
    snapshots: Iterable[Snapshot],
    read: Callable[[Snapshot], float | None],
    weigh: Callable[[Snapshot], float],
) -> float | None:
    known = [(value, weigh(one)) for one in snapshots if (value := read(one)) is not None]
    return _ratio(sum(value * weight for value, weight in known), sum(w for _, w in known))


def _ratio(value: float, whole: float) -> float | None:
    return value / whole if whole > 0 else None
