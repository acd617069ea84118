"""Sparse decode over two tiers on a CUDA device: the same float32 tokens wherever the pages lie and
however a step is launched, and no wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_tokens_gpu import (
    MakeRunner,
    assert_same_texts,
    engine_of,
    expected_alone,
    make_runner,
    no_synchronisation,
    request,
    run,
)

from sparsed.core import NO_RECALL, AddRequest, SparseOptions, VerifyMode
from sparsed.engine.runner import Runner

__all__ = ["make_runner"]  # a fixture

pytestmark = pytest.mark.gpu

NUM_TOKENS = 150
LENGTHS = (700, 90, 1300, 400, 1024, 801, 3, 655)
KNOBS = {"max_model_len": 2048, "token_budget": 256, "sparse_method": "mean-key"}
LANE_BLOCKS = 30  # a few more than the selections of all requests take


def sparse_requests(vocab_size: int) -> list[AddRequest]:
    generator = torch.Generator().manual_seed(11)
    return [
        request(
            str(i),
            torch.randint(3, vocab_size, (length,), generator=generator).tolist(),
            NUM_TOKENS,
        )
        for i, length in enumerate(LENGTHS)
    ]


def settled(runner: Runner) -> Runner:
    """Once the device is idle, so that counters are those of now."""
    torch.cuda.synchronize()
    runner.stats()
    torch.cuda.synchronize()
    return runner


@pytest.fixture(params=["dummy:tiny", "llama", "smollm2"])
def model(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> str | Path:
    if request.param == "smollm2":
        directory: Path = request.getfixturevalue("smollm2")
        return directory
    if request.param == "llama":
        return tiny_checkpoint("llama", max_position_embeddings=4096)
    return str(request.param)


@pytest.mark.parametrize("page_size", [8, 32])
def test_float32_tokens_are_the_same_wherever_the_pages_lie(
    make_runner: MakeRunner, model: str | Path, page_size: int
) -> None:
    """Launched one by one or captured, alone or together, all hot or most pages in DRAM."""
    knobs = {**KNOBS, "page_size": page_size}
    eager = make_runner(model, enforce_eager=True, **knobs)
    requests = sparse_requests(eager.vocab_size)
    expected = expected_alone(eager, requests)
    del eager
    hot = make_runner(model, **knobs)
    assert_same_texts(run(engine_of(hot), requests), expected, what="graphs, all hot")
    assert settled(hot).stats().hot_misses == 0
    del hot
    cold = make_runner(model, lane_blocks=LANE_BLOCKS, verify_kv=VerifyMode.FULL, **knobs)
    assert_same_texts(run(engine_of(cold), requests), expected, what="graphs, two tiers")
    stats = settled(cold).stats()
    assert stats.hot_misses > 0 and stats.evicted_pages > 0 and stats.overflow_pages == 0
    assert stats.verify_checked_pages > 0 and stats.verify_mismatches == 0
    cold.kv.check_integrity()


def test_sparse_steps_do_not_wait_for_the_device(make_runner: MakeRunner) -> None:
    """But for samples of attention recall, of which there are none here."""
    runner = make_runner("dummy:tiny", "bfloat16", lane_blocks=LANE_BLOCKS, page_size=8, **KNOBS)
    runner.attention.tiers.recall_stride = NO_RECALL
    engine = engine_of(runner)
    for one in sparse_requests(runner.vocab_size)[:4]:
        engine.add(replace(one, sampling=replace(one.sampling, max_tokens=400)))
    for _ in range(140):
        engine.step()
    torch.cuda.synchronize()
    with no_synchronisation():
        found = [len(engine.step().outputs) for _ in range(140)]
    assert found == [4] * 140
    while engine.has_work:
        engine.step()
    assert settled(runner).stats().hot_misses > 0


def test_recall_is_the_same_wherever_the_pages_lie(make_runner: MakeRunner) -> None:
    """Samples of captured steps, read late: through the staging area for what is cold."""
    means = []
    for lane_blocks in (None, LANE_BLOCKS):
        runner = make_runner("dummy:tiny", lane_blocks=lane_blocks, page_size=8, **KNOBS)
        runner.attention.tiers.recall_stride = 4
        run(engine_of(runner), sparse_requests(runner.vocab_size))
        stats = settled(runner).stats()
        assert stats.recall_samples > NUM_TOKENS // 8
        means.append(stats.recall_sum / stats.recall_samples)
        assert stats.working_set_pages == 0, "all requests have ended"
    assert 0.1 < means[0] < 0.9999
    assert means[1] == pytest.approx(means[0], abs=1e-3)


def test_requests_of_other_budgets_run_beside(make_runner: MakeRunner) -> None:
    """A larger budget than the graphs were made for goes another way, to the same end."""
    runner = make_runner("dummy:tiny", page_size=8, **KNOBS)
    requests: Sequence[AddRequest] = [
        replace(one, sparse=SparseOptions(token_budget=budget))
        for one, budget in zip(
            sparse_requests(runner.vocab_size)[:4], (None, None, 512, None), strict=True
        )
    ]
    expected = expected_alone(runner, requests)
    assert_same_texts(run(engine_of(runner), requests), expected, what="mixed budgets")
