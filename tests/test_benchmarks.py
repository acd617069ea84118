"""Benchmarks can be run, and the quality benchmark measures what the engine does."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable
from pathlib import Path

import lane_quotas
import numpy as np
import pytest
import quality
from acceptance_run import STEPS, command_of, environment_of

from sparsed.engine.evaluate.recording import Recording, RecordingHeader
from sparsed.engine.evaluate.texts import Window

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
NUM_CONTEXT = 700
NUM_SCORED = 40
NUM_LAYERS = 2


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return random.Random(0).choices(range(3, 320), k=NUM_CONTEXT + NUM_SCORED + 1)


@pytest.mark.parametrize(
    ("page_size", "dense_layers", "token_budget"), [(8, 0, 256), (16, 1, 256), (32, 0, 280)]
)
def test_scores_are_those_of_the_runner(
    page_size: int,
    dense_layers: int,
    token_budget: int,
    checkpoint: Path,
    tokens: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shares of the context and budgets of a lane are the same pages, fully read layers or not."""
    monkeypatch.setattr(quality, "CONTEXT_TOKENS", NUM_CONTEXT)
    arguments = f"--methods cuboid-mean --budgets {token_budget} --page-sizes {page_size}"
    options = quality.parse_options([*arguments.split(), "--dense-layers", str(dense_layers)])
    (choice,) = quality.make_choices(options, num_layers=NUM_LAYERS)
    window = Window(context=tuple(tokens[:NUM_CONTEXT]), scored=tuple(tokens[NUM_CONTEXT:]))
    agreement = quality.verify(checkpoint, window, choice, token_budget=token_budget)
    assert agreement.num_tokens == NUM_SCORED
    assert agreement.max_difference < 1e-4
    assert agreement.hot_misses > 0


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


def test_rebalanced_lanes_miss_less_of_a_recording() -> None:
    """One lane of four selects pages at random, the others always the same ones."""
    header = RecordingHeader(
        model="any", text="any", method="any", commit="any", context_tokens=2048, page_size=8,
        token_budget=256, sink_pages=1, recent_pages=1, num_kv_heads=2, dense_layers=0,
    )  # fmt: skip
    numbers = np.random.default_rng(0)
    ranked_SLR = np.tile(np.arange(1, 41, dtype=np.int32), (200, 4, 1))
    ranked_SLR[:, 2] = [1 + numbers.permutation(150)[:40] for _ in range(200)]
    shares = lane_quotas.compare(Recording(header=header, ranked_SLR=ranked_SLR), 3)
    assert shares.rebalanced < 0.9 * shares.equal
    assert shares.simulated_divided < 0.9 * shares.simulated_equal
    assert abs(shares.simulated_equal - shares.equal) < 0.1 * shares.equal
