"""What is asked of an engine of late: rates and lengths over the right stretch of time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from sparsed.core import EngineStats, HbmUse, WorkloadContext
from sparsed.profiler.context import (
    ENOUGH_REQUESTS,
    FEWEST_REQUESTS,
    MAX_STRETCH,
    enough_requests,
)
from sparsed.profiler.context import (
    HORIZON_S as MINUTE_S,
)
from sparsed.profiler.window import Window

HORIZON_S = 4.0
HBM = HbmUse(
    weights_bytes=1,
    hot_pages_bytes=1,
    summaries_bytes=1,
    tables_bytes=1,
    staging_bytes=1,
    prefill_buffer_bytes=1,
    rest_bytes=None,
    others_bytes=None,
    free_bytes=77,
)


class Engine:
    """Reports once a second what it was told to have done."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.window = Window(clock=lambda: self.now_s, horizon_s=HORIZON_S)
        self.stats = EngineStats()

    def second(
        self, inputs: Sequence[int] = (), outputs: Sequence[int] = (), **growth: Any
    ) -> WorkloadContext:
        for input_tokens in inputs:
            self.window.observe_arrival(input_tokens=input_tokens)
        for output_tokens in outputs:
            self.window.observe_request(ttft_s=0.1, tpot_s=0.1, output_tokens=output_tokens)
        self.now_s += 1.0
        known = {name: getattr(self.stats, name) + value for name, value in growth.items()}
        self.stats = EngineStats(**known)
        snapshot = self.window.close(self.stats, ended_at=self.now_s, hbm=HBM)
        assert snapshot is not None and snapshot.context is not None
        return snapshot.context


def test_without_requests_nothing_is_said_of_them() -> None:
    context = Engine().second()
    assert (context.num_requests, context.requests_per_s) == (0, None)
    assert context.input_tokens_p50 is context.output_tokens_p95 is None
    assert context.hot_hit_frac is context.h2d_bytes_per_token is context.h2d_gb_per_s is None
    assert (context.concurrency, context.hbm_free_bytes) == (0.0, 77)


def test_rates_and_lengths_are_of_the_horizon() -> None:
    engine = Engine()
    for _ in range(20):
        engine.second(inputs=[9999] * 5, outputs=[7777])
    for _ in range(4):
        context = engine.second(inputs=[10, 20, 30, 40, 50], outputs=[3, 5])
    assert context.span_s == pytest.approx(HORIZON_S)
    assert context.num_requests == 20 and context.requests_per_s == pytest.approx(5.0)
    assert (context.input_tokens_p50, context.input_tokens_p95) == (30, 50)
    assert (context.output_tokens_p50, context.output_tokens_p95) == (4, 5)


@pytest.mark.parametrize(
    ("horizon_s", "enough"),
    [(1.0, FEWEST_REQUESTS), (MINUTE_S / 2, ENOUGH_REQUESTS // 2), (MINUTE_S, ENOUGH_REQUESTS)],
)
def test_a_shorter_horizon_is_content_with_fewer_requests(horizon_s: float, enough: int) -> None:
    assert enough_requests(horizon_s) == enough
    assert enough_requests(10 * MINUTE_S) == ENOUGH_REQUESTS


def test_few_requests_are_looked_for_further_back_but_not_for_ever() -> None:
    engine = Engine()
    for second in range(200):
        context = engine.second(inputs=[100] * (second % 2))
    assert context.num_requests == FEWEST_REQUESTS
    assert context.span_s == pytest.approx(2 * FEWEST_REQUESTS - 1)
    for _ in range(500):
        context = engine.second()
    assert context.span_s == pytest.approx(MAX_STRETCH * HORIZON_S)
    assert context.requests_per_s is None


def test_what_a_load_takes_is_weighted_by_what_there_was() -> None:
    engine = Engine()
    engine.second(
        steps=10, hot_hits=90, hot_misses=10, generated_tokens=40, h2d_bytes=4_000_000_000, h2d_s=2
    )
    engine.stats = EngineStats()  # another engine, which misses more, and more often
    context = engine.second(
        steps=10,
        hot_hits=150,
        hot_misses=150,
        generated_tokens=60,
        h2d_bytes=2_000_000_000,
        h2d_s=1,
        recall_sum=9.0,
        recall_samples=10,
        num_running=3,
        num_waiting=1,
    )
    assert context.hot_hit_frac == pytest.approx(240 / 400)
    assert context.h2d_bytes_per_token == pytest.approx(6e9 / 100)
    assert context.h2d_gb_per_s == pytest.approx(2.0)
    assert context.attention_recall == pytest.approx(0.9)
    engine.stats = EngineStats()
    later = engine.second(steps=1000, recall_sum=0.5, recall_samples=1)
    assert later.attention_recall == pytest.approx(9.5 / 11), "by samples, not by steps"
    assert context.concurrency == pytest.approx(2.0)
