"""A warm-up computes what a first request would, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sparsed.engine.runner import Runner
from sparsed.engine.warmup import warm_up

MakeRunner = Callable[..., Runner]


@pytest.mark.parametrize("prefill_chunk", [16, 300, 4096])
def test_the_cache_is_empty_after_it(
    make_runner: MakeRunner, tiny_checkpoint: Callable[..., Path], prefill_chunk: int
) -> None:
    model = tiny_checkpoint("qwen3", max_position_embeddings=2048)
    runner = make_runner(model, prefill_chunk=prefill_chunk, page_size=16)
    seen: list[str] = []
    knobs = runner.kv._knobs
    warm_up(runner, knobs, on_progress=lambda phase, frac: seen.append(f"{phase} {frac}"))
    assert seen == ["warming up 0.0", "warming up 0.5"]
    assert not runner.kv.rows
    runner.kv.check_integrity()
    assert runner.stats().d2h_bytes > 0, "its pages were saved"


def test_tiers_without_room_are_left_alone(make_runner: MakeRunner) -> None:
    runner = make_runner(num_frames=1, max_model_len=128)
    warm_up(runner, runner.kv._knobs, on_progress=lambda *_: None)
    assert not runner.kv.rows
    runner.kv.check_integrity()
