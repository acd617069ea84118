"""The same text through the real runner, token by token, over two bounded tiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from report import this_machine
from torch import Tensor

from sparsed.core import Choice, EngineSpec, SparseMethod
from sparsed.engine.batch import DecodeRow, PromptChunk, StepPlan
from sparsed.engine.evaluate.parallel import token_logprobs
from sparsed.engine.evaluate.texts import Window
from sparsed.engine.models.config import load_config
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.runner import Runner

PREFILL_CHUNK = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Log-probabilities of the runner against the parallel evaluation, in nats. Hits and misses
    are page reads that found their page in the hot tier, or fetched it."""

    num_tokens: int
    max_difference: float
    mean_difference: float
    hot_hits: int
    hot_misses: int

    def __str__(self) -> str:
        missed = self.hot_misses / max(1, self.hot_hits + self.hot_misses)
        return (
            f"runner against parallel evaluation, {self.num_tokens} tokens: log-probabilities "
            f"differ by at most {self.max_difference:.1e}, {self.mean_difference:.1e} on average; "
            f"{missed:.1%} of {self.hot_hits + self.hot_misses} page reads came from DRAM"
        )


def make_runner(directory: Path, choice: Choice, *, token_budget: int) -> Runner:
    """A runner for one request whose hot tier holds twice what a lane of it reads."""
    asked = {
        "sparse_method": choice.method,
        "token_budget": token_budget,
        "hbm_budget": 2 * token_budget,
        "page_size": choice.page_size,
        "dense_layers": choice.dense_layers,
        "prefill_chunk": PREFILL_CHUNK,
        "max_num_seqs": 1,
        "kv_hbm_gib": 0.5,
        "kv_dram_gib": 0.5,
    }
    shape = load_config(directory).shape
    knobs = resolve_knobs(asked, shape=shape, machine=this_machine(), device="cpu", dtype="float32")
    plan = plan_memory(knobs, shape=shape, dtype="float32")
    spec = EngineSpec(model=str(directory), device="cpu", dtype="float32", knobs=knobs, plan=plan)
    return Runner(spec, on_progress=lambda phase, frac: None)


def decode_text(runner: Runner, window: Window, *, method: SparseMethod) -> Tensor:
    """Log-probabilities (N) of all scored tokens but the first, each given those before it."""
    context, tokens = window.context, window.scored
    row = runner.kv.add(len(context) + len(tokens), method=method, token_budget=None)
    for chunk in _chunks(context, row=row):
        runner.run(StepPlan(chunks=(chunk,), decodes=()))
    logits = []
    for position, token in enumerate(tokens[:-1], start=len(context)):
        decode = DecodeRow(row=row, token=token, position=position)
        logits.append(runner.run(StepPlan(chunks=(), decodes=(decode,))).logits_NV.clone())
    runner.kv.free(row)
    return token_logprobs(torch.cat(logits), torch.tensor(tokens[1:]))


def compare(
    runner: Runner, window: Window, *, method: SparseMethod, expected_N: Tensor
) -> Agreement:
    """Decode the scored tokens and hold the result against ``expected_N``."""
    difference_N = (decode_text(runner, window, method=method) - expected_N).abs()
    stats = runner.stats()
    return Agreement(
        num_tokens=len(difference_N),
        max_difference=float(difference_N.max()),
        mean_difference=float(difference_N.mean()),
        hot_hits=stats.hot_hits,
        hot_misses=stats.hot_misses,
    )


def _chunks(tokens: Sequence[int], *, row: int) -> list[PromptChunk]:
    return [
        PromptChunk(
            row=row,
            tokens=tuple(tokens[start : start + PREFILL_CHUNK]),
            start=start,
            prompt_length=len(tokens),
            logits_from=min(start + PREFILL_CHUNK, len(tokens)),
        )
        for start in range(0, len(tokens), PREFILL_CHUNK)
    ]
