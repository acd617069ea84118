"""The figures of a run against sums done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparsed.controller.bench.client import LoadResult
from sparsed.controller.bench.records import INTERRUPTED, RequestRecord, Usage
from sparsed.controller.bench.summary import Spread, spread, summarize
from sparsed.controller.bench.time_series import time_series
from sparsed.core import Slo

FAST = RequestRecord(  # TTFT 0.1, TPOT 0.1, E2E 0.5
    number=0,
    arrival_s=0.0,
    input_tokens=10,
    max_tokens=5,
    sent_s=1.0,
    first_s=1.1,
    last_s=1.5,
    ended_s=1.5,
    chunks_s=(1.1, 1.2, 1.3, 1.4, 1.5),
    usage=Usage(prompt_tokens=12, completion_tokens=5, cached_tokens=4),
)
SLOW = RequestRecord(  # TTFT 1.5, TPOT 0.25, E2E 2.0; two chunks of what the server calls 3 tokens
    number=1,
    arrival_s=0.0,
    input_tokens=20,
    max_tokens=4,
    sent_s=1.5,
    first_s=3.0,
    last_s=3.5,
    ended_s=3.5,
    chunks_s=(3.0, 3.5),
    usage=Usage(prompt_tokens=20, completion_tokens=3),
)
FAILED = replace(
    FAST,
    number=2,
    sent_s=4.0,
    first_s=None,
    last_s=None,
    ended_s=5.0,
    chunks_s=(),
    usage=None,
    error="http_503",
)
CUT_OFF = replace(SLOW, number=3, ended_s=5.0, error=INTERRUPTED, usage=None)
UNSENT = RequestRecord(number=4, arrival_s=9.0, input_tokens=1, max_tokens=1, error=INTERRUPTED)


def result(*records: RequestRecord) -> LoadResult:
    return LoadResult(records=records, lags_s=(0.001, 0.003), is_interrupted=False)


def test_times_of_one_request() -> None:
    assert FAST.ttft_s == pytest.approx(0.1)
    assert FAST.tpot_s == pytest.approx(0.1)
    assert FAST.e2e_s == pytest.approx(0.5)
    assert FAST.itl_s == pytest.approx((0.1, 0.1, 0.1, 0.1))
    assert SLOW.tpot_s == pytest.approx(0.25)
    assert SLOW.itl_s == pytest.approx((0.5,))
    assert replace(SLOW, usage=None).tpot_s == pytest.approx(0.5)
    assert UNSENT.ttft_s is UNSENT.tpot_s is UNSENT.e2e_s is None


def test_one_token_has_no_time_per_further_token() -> None:
    one = replace(FAST, chunks_s=(1.1,), last_s=1.1, usage=None)
    assert one.tpot_s is None and one.itl_s == ()
    assert summarize(result(one), slo=Slo(tpot_s=0.001)).goodput_frac == 1.0


def test_summary() -> None:
    summary = summarize(
        result(FAST, SLOW, FAILED, CUT_OFF, UNSENT), slo=Slo(ttft_s=1.0, tpot_s=0.2)
    )
    assert summary.duration_s == pytest.approx(4.0)
    assert (summary.num_requests, summary.num_complete, summary.num_interrupted) == (5, 2, 2)
    assert summary.num_cut_off == 1
    assert summary.errors == {"http_503": 1}
    assert (summary.prompt_tokens, summary.cached_tokens, summary.output_tokens) == (32, 4, 8)
    assert summary.num_short == 1
    assert summary.requests_per_s == pytest.approx(0.5)
    assert summary.output_tokens_per_s == pytest.approx(2.0)
    assert summary.total_tokens_per_s == pytest.approx(10.0)
    assert summary.goodput_requests_per_s == pytest.approx(0.25)
    assert summary.goodput_frac == pytest.approx(1 / 3)
    assert summary.mean_concurrency == pytest.approx((0.5 + 2.0 + 1.0 + 3.5) / 4)
    assert summary.ttft is not None and summary.itl is not None
    assert summary.ttft.mean_ms == pytest.approx((100 + 1500 + 1500) / 3)  # with the one cut off
    assert summary.itl.count == 4 + 1 + 1
    assert summary.tpot is not None and summary.e2e is not None
    assert summary.tpot.count == summary.e2e.count == 2
    assert summary.client_lag is not None
    assert summary.client_lag.p50_ms == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("slo", "frac"),
    [(Slo(), None), (Slo(ttft_s=2.0), 1.0), (Slo(tpot_s=0.2), 0.5), (Slo(ttft_s=0.05), 0.0)],
)
def test_goodput_needs_a_target(slo: Slo, frac: float | None) -> None:
    summary = summarize(result(FAST, SLOW), slo=slo)
    assert summary.goodput_frac == frac
    assert (summary.goodput_requests_per_s is None) is (frac is None)


def test_percentiles_lie_between_neighbours() -> None:
    found = spread([None, *(number / 1e3 for number in range(101))])
    assert found == Spread(
        count=101, mean_ms=50, p50_ms=50, p90_ms=90, p95_ms=95, p99_ms=99, max_ms=100
    )
    assert spread([None]) is None


def test_nothing_was_sent() -> None:
    summary = summarize(result(UNSENT), slo=Slo(ttft_s=1.0))
    assert (summary.duration_s, summary.requests_per_s, summary.ttft) == (0.0, 0.0, None)
    assert time_series((UNSENT,)) == ()


def test_time_series() -> None:
    seconds = time_series((FAST, SLOW, FAILED, UNSENT))
    assert [second.start_s for second in seconds] == [0.0, 1.0, 2.0, 3.0]
    assert [second.running for second in seconds] == pytest.approx([1.0, 1.0, 0.5, 1.0])
    tokens = [second.output_tokens_per_s for second in seconds]
    assert tokens == pytest.approx([5.0, 0.0, 3.0, 0.0])
    assert [second.num_first_tokens for second in seconds] == [1, 0, 1, 0]
    assert seconds[0].ttft_ms is not None and seconds[1].ttft_ms is None
    assert seconds[2].ttft_ms == pytest.approx(1500.0)
    assert [second.num_errors for second in seconds] == [0, 0, 0, 1]
