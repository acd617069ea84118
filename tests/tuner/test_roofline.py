"""The model of a step and of a queue: monotone, and never below what its bytes take."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sparsed.core import Bound, GpuRates, ModelShape
from sparsed.tuner.queueing import Job, all_at_once, at_rate, full_batch
from sparsed.tuner.roofline import (
    StepLoad,
    StepTime,
    prompt_flop,
    prompt_time_s,
    step_time,
)

SHAPE = ModelShape(
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    hidden_size=4096,
    intermediate_size=14336,
    vocab_size=128256,
    max_position=131072,
    num_parameters=8_030_261_248,
)
GPU = GpuRates(
    name="any",
    hbm_bytes=80 << 30,
    copy_bytes_per_s=3e12,
    link_bytes_per_s=50e9,
    matmul_flop_per_s=8e14,
    is_measured=False,
)
nbytes = st.floats(0, 1e12)
loads = st.builds(
    StepLoad,
    requests=st.integers(1, 1024),
    weights_bytes=st.integers(1, 10**11),
    element_bytes=st.sampled_from((2, 4)),
    kv_bytes=nbytes,
    summary_bytes=nbytes,
    link_bytes=nbytes,
    selects=st.booleans(),
)
jobs = st.builds(
    Job,
    prompt_s=st.floats(1e-4, 100),
    chunks=st.floats(0.01, 1000),
    output_tokens=st.integers(1, 4096),
)
steps_s = st.floats(1e-4, 1.0)


def seconds(load: StepLoad, gpu: GpuRates = GPU) -> float:
    return step_time(load, SHAPE, gpu).step_s


@given(loads, st.sampled_from(("weights_bytes", "kv_bytes", "summary_bytes", "link_bytes")),
       st.integers(1, 10**12))  # fmt: skip
def test_more_bytes_are_never_faster(load: StepLoad, part: str, more: int) -> None:
    assert seconds(replace(load, **{part: getattr(load, part) + more})) >= seconds(load)


@given(loads, st.integers(1, 1000))
def test_a_larger_batch_is_never_faster(load: StepLoad, more: int) -> None:
    assert seconds(replace(load, requests=load.requests + more)) >= seconds(load)


@given(loads, st.floats(1.01, 10))
def test_a_faster_gpu_is_never_slower(load: StepLoad, factor: float) -> None:
    for rate in ("copy_bytes_per_s", "link_bytes_per_s", "matmul_flop_per_s"):
        faster = replace(GPU, **{rate: getattr(GPU, rate) * factor})
        assert seconds(load, faster) <= seconds(load)


@given(loads)
def test_no_step_is_below_its_floor(load: StepLoad) -> None:
    told = step_time(load, SHAPE, GPU)
    assert told.step_s >= told.floor_s * (1 - 1e-9)
    assert told.floor_s == pytest.approx(max(load.hbm_bytes / 3e12, load.link_bytes / 50e9))


@pytest.mark.parametrize(
    ("part", "bound"),
    [
        ("weights_s", Bound.HBM),
        ("kv_s", Bound.HBM),
        ("link_s", Bound.LINK),
        ("arithmetic_s", Bound.COMPUTE),
        ("latency_s", Bound.LATENCY),
    ],
)
def test_the_largest_part_binds(part: str, bound: Bound) -> None:
    parts = dict.fromkeys(("weights_s", "arithmetic_s", "kv_s", "latency_s", "link_s"), 1.0)
    assert StepTime(**{**parts, part: 9.0}, floor_s=1.0).bound is bound


@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_prompts_cost_more_than_in_proportion(tokens: int, more: int) -> None:
    longer = tokens + more
    assert prompt_flop(SHAPE, longer) / longer >= prompt_flop(SHAPE, tokens) / tokens
    assert prompt_time_s(SHAPE, GPU, num_tokens=longer) > prompt_time_s(
        SHAPE, GPU, num_tokens=tokens
    )


def test_arithmetic_of_a_prompt_is_counted_by_hand() -> None:
    small = replace(
        SHAPE, num_layers=1, num_heads=2, head_dim=4, vocab_size=10, hidden_size=8,
        num_parameters=2 * 80 + 1000,
    )  # fmt: skip
    assert prompt_flop(small, 3) == 2 * 1000 * 3 + 4 * 6 * 2 * 4
    tied = replace(small, num_parameters=80 + 1000, tied_embeddings=True)
    assert prompt_flop(tied, 3) == prompt_flop(small, 3)


@given(jobs, steps_s, st.integers(1, 100), st.floats(0.01, 0.99))
def test_a_rate_is_served_up_to_that_of_a_full_batch(
    job: Job, step_s: float, most: int, share: float
) -> None:
    full = full_batch(job, requests=most, step_s=step_s)
    assert full.output_tokens_per_s == pytest.approx(full.requests_per_s * job.output_tokens)
    service = at_rate(
        job, rate_per_s=share * full.requests_per_s, most=most, step_s=lambda _: step_s
    )
    if job.chunks >= 1:  # else several prompts share a step, and the queue is the stricter one
        assert service is not None
    if service is not None:
        assert service.requests <= most
        assert service.tpot_s >= step_s
        assert service.ttft_s >= job.prompt_s


@given(jobs, steps_s, st.integers(1, 100), st.floats(1.01, 10))
def test_more_arrivals_are_never_served_sooner(
    job: Job, step_s: float, most: int, factor: float
) -> None:
    rate = full_batch(job, requests=most, step_s=step_s).requests_per_s / 20

    less, more = (
        at_rate(job, rate_per_s=served, most=most, step_s=lambda number: step_s * (1 + number))
        for served in (rate, rate * factor)
    )
    assume(less is not None and more is not None)
    assert less is not None and more is not None
    assert more.ttft_s >= less.ttft_s and more.tpot_s >= less.tpot_s
    assert more.requests >= less.requests


def test_a_rate_beyond_the_prompts_is_refused() -> None:
    job = Job(prompt_s=1.0, chunks=4, output_tokens=2)
    assert at_rate(job, rate_per_s=1.0, most=9, step_s=lambda _: 1e-6) is None


def test_a_burst_of_two_waves_by_hand() -> None:
    job = Job(prompt_s=1.0, chunks=1.0, output_tokens=11)
    burst = all_at_once(job, count=4, at_once=2, step_s=0.1)
    assert burst.total_s == pytest.approx(4 * 1 + 2 * 10 * 0.1)
    assert burst.mean_ttft_s == pytest.approx(0.5 * 3.0 + 1.5)
    assert burst.mean_tpot_s == pytest.approx(0.1 + 0.75 * 1.0 / 10)
