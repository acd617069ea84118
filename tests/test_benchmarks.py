"""The quality benchmark says what the engine does: its shortcut equals real decode steps."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from acceptance_run import STEPS, command_of, environment_of
from parallel_decode import ORACLE, RANDOM, Choice, Context, Scores, score_text
from quality import bootstrap_ratio
from serial_decode import decode_text, make_runner

from sparsed.engine.runner import Runner

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
NUM_CONTEXT = 700
NUM_SCORED = 40


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return random.Random(0).choices(range(3, 320), k=NUM_CONTEXT + NUM_SCORED + 1)


def score(runner: Runner, tokens: list[int], choice: Choice) -> Scores:
    context = Context(runner.decoder, tokens[:NUM_CONTEXT], num_scored=NUM_SCORED)
    return score_text(runner.decoder, context, tokens[NUM_CONTEXT:], choice=choice)


@pytest.mark.parametrize(
    "choice",
    [
        Choice(method="cuboid-mean", token_budget=256, page_size=8),
        Choice(method="quest", token_budget=256, page_size=32),
        Choice(method="cuboid-mean", token_budget=256, page_size=16, dense_layers=1),
    ],
    ids=str,
)
def test_equals_the_runner_step_by_step(
    choice: Choice, checkpoint: Path, tokens: list[int]
) -> None:
    runner = make_runner(checkpoint, choice)
    context, scored = tokens[:NUM_CONTEXT], tokens[NUM_CONTEXT:]
    serial_N = decode_text(runner, context, scored, choice=choice)
    parallel = score(runner, tokens, choice)
    torch.testing.assert_close(parallel.logprobs_N, serial_N, rtol=0, atol=1e-4)
    dense = score(runner, tokens, Choice(method="dense", token_budget=256))
    assert (dense.logprobs_N - serial_N).abs().max() > 1e-2  # sparsity does matter here
    assert runner.stats().hot_misses > 0


def test_oracle_covers_most_and_random_least(checkpoint: Path, tokens: list[int]) -> None:
    """On the first layer, where every choice sees the same queries and keys."""
    methods = (ORACLE, "cuboid-mean", RANDOM)
    choices = [Choice(method=method, token_budget=256, page_size=8) for method in methods]
    runner = make_runner(checkpoint, choices[1])
    best_N, ranked_N, any_N = (score(runner, tokens, c).recall_LNH[0].mean(-1) for c in choices)
    assert (best_N >= ranked_N - 1e-5).all()
    assert best_N.mean() > ranked_N.mean() > any_N.mean()


def test_interval_holds_the_ratio() -> None:
    losses = np.random.default_rng(1).normal(0.03, 0.2, size=3000).astype(np.float32)
    low, high = bootstrap_ratio(losses)
    assert low < np.exp(losses.mean()) < high
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / 3000**0.5, rel=0.15)


def test_only_the_tests_without_a_gpu_run_in_parallel() -> None:
    for name in STEPS:
        assert command_of(name, workers=1) == STEPS[name]
        assert environment_of(name, workers=1, num_cpus=8) == {}
    assert command_of("gpu tests", workers=4) == STEPS["gpu tests"]
    parallel = command_of("other tests", workers=4)
    assert parallel == (*STEPS["other tests"], "-n", "4", "--dist", "loadfile")
    for num_cpus, threads in ((16, "4"), (2, "1")):
        changes = environment_of("other tests", workers=4, num_cpus=num_cpus)
        assert changes["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize("name", sorted(file.stem for file in BENCHMARKS.glob("*.py")))
def test_every_file_can_be_imported_and_says_what_it_does(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    if hasattr(module, "main"):  # else it is a part of others
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 0
        assert "usage:" in capsys.readouterr().out
