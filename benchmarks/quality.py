"""What sparse attention costs in quality: perplexity against dense on real text, and recall.

A window is 6,000 tokens of context, prefilled densely, and 1,024 scored tokens, each attended to
as a decode step would, all at once (``parallel_decode``). The first window is also fed through
the real runner token by token, over two bounded tiers, and the two must agree (``--verify``).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import numpy.typing as npt
import torch
from parallel_decode import ORACLE, RANDOM, Choice, Context, Scores, score_text
from report import cache_directory, environment, resolve_builtin
from serial_decode import Agreement, compare, make_runner
from tokenizers import Tokenizer

from sparsed.core import PAGE_SIZES, SparseMethod
from sparsed.engine.evaluate.texts import TEXTS, Window, cut_windows
from sparsed.engine.models.decoder import Decoder
from sparsed.engine.runner import Runner

CONTEXT_TOKENS = 6000
SCORED_TOKENS = 1024
NUM_WINDOWS = 3
VERIFIED_TOKENS = 200
METHODS = (SparseMethod.CUBOID_MEAN, SparseMethod.QUEST, ORACLE, RANDOM)
DENSE = Choice(method=SparseMethod.DENSE, token_budget=CONTEXT_TOKENS)
NUM_RESAMPLES = 2_000
HEADING = (
    "text, method, token budget, page size, dense layers, perplexity, ratio to dense [95 %], "
    "recall mean / p10 / p01"
)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """One text under one choice. ``ratio`` is perplexity over that of dense; the interval of 95 %
    is a bootstrap over tokens, each paired with itself under dense. Recall is over layers, query
    heads and positions; None for dense."""

    text: str
    choice: Choice
    num_tokens: int
    perplexity: float
    ratio: float
    ratio_low: float
    ratio_high: float
    recall_mean: float | None = None
    recall_p10: float | None = None
    recall_p01: float | None = None

    def __str__(self) -> str:
        recall = (self.recall_mean, self.recall_p10, self.recall_p01)
        shares = " / ".join("-" if share is None else f"{share:.3f}" for share in recall)
        return (
            f"{self.text:14} {describe(self.choice)} {self.perplexity:8.3f}   "
            f"{self.ratio:.4f} [{self.ratio_low:.4f}, {self.ratio_high:.4f}]   {shares}"
        )


def measure_quality(
    text: str, choice: Choice, scores: list[Scores], dense: list[Scores]
) -> Quality:
    """Pool the windows of one text."""
    logprobs, base = (torch.cat([s.logprobs_N for s in each]).numpy() for each in (scores, dense))
    low, high = bootstrap_ratio(base - logprobs)
    recall = torch.cat([s.recall_LNH.flatten() for s in scores]).numpy()
    p10, p01 = np.quantile(recall, (0.10, 0.01)).tolist() if recall.size else (None, None)
    return Quality(
        text=text,
        choice=choice,
        num_tokens=len(logprobs),
        perplexity=math.exp(-logprobs.mean()),
        ratio=math.exp((base - logprobs).mean()),
        ratio_low=low,
        ratio_high=high,
        recall_mean=float(recall.mean()) if recall.size else None,
        recall_p10=p10,
        recall_p01=p01,
    )


def bootstrap_ratio(losses_N: Floats) -> tuple[float, float]:
    """95 % interval of exp(mean) of what each token loses against dense (nats)."""
    generator = np.random.default_rng(0)
    means = [generator.choice(losses_N, size=len(losses_N)).mean() for _ in range(NUM_RESAMPLES)]
    low, high = np.exp(np.quantile(means, (0.025, 0.975))).tolist()
    return low, high


def score_windows(
    decoder: Decoder, windows: list[Window], choices: Sequence[Choice]
) -> dict[Choice, list[Scores]]:
    """Every choice on every window; the context of a window is prefilled once."""
    scores: dict[Choice, list[Scores]] = {choice: [] for choice in choices}
    for number, window in enumerate(windows, start=1):
        started = time.perf_counter()
        context = Context(decoder, window.context, num_scored=SCORED_TOKENS)
        log(f"  window {number}: prefill", started)
        for choice in choices:
            started = time.perf_counter()
            scored = score_text(decoder, context, window.scored, choice=choice)
            scores[choice].append(scored)
            log(f"  window {number}: {describe(choice)}", started)
    return scores


def describe(choice: Choice) -> str:
    return (
        f"{choice.method:11} {choice.token_budget:4} {choice.page_size:3} {choice.dense_layers:2}"
    )


def log(what: str, started: float) -> None:
    print(f"{what}, {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


def verify(runner: Runner, window: Window, scores: Scores, choice: Choice) -> Agreement:
    """Feed the first scored tokens of a window through the runner; print how they compare."""
    tokens = window.scored[: VERIFIED_TOKENS + 1]
    expected_N = scores.logprobs_N[:VERIFIED_TOKENS]
    agreement = compare(runner, window.context, tokens, choice=choice, expected_N=expected_N)
    print(agreement, flush=True)
    return agreement


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    parser.add_argument(
        "--texts", nargs="+", default=["documentation", "prose"], choices=list(TEXTS)
    )
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--budgets", nargs="+", type=int, default=[1024])
    parser.add_argument("--page-sizes", nargs="+", type=int, default=[16], choices=PAGE_SIZES)
    parser.add_argument("--dense-layers", nargs="+", type=int, default=[0])
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def make_choices(options: argparse.Namespace) -> list[Choice]:
    """Every combination of what was asked for."""
    return [
        Choice(method=method, token_budget=budget, page_size=page_size, dense_layers=dense_layers)
        for dense_layers in options.dense_layers
        for page_size in options.page_sizes
        for budget in options.budgets
        for method in options.methods
    ]


def main() -> None:
    options = parse_options()
    directory = resolve_builtin()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    choices = make_choices(options)
    checked = replace(choices[0], method=SparseMethod.CUBOID_MEAN)
    runner = make_runner(directory, checked)
    rows: list[Quality] = []
    agreement = None
    print(HEADING, flush=True)
    for text in options.texts:
        windows = cut_windows(
            text,
            tokenizer=tokenizer,
            cache_dir=cache_directory(),
            count=NUM_WINDOWS,
            context_tokens=CONTEXT_TOKENS,
            scored_tokens=SCORED_TOKENS,
        )
        scores = score_windows(runner.decoder, windows, [DENSE, *choices])
        for choice, scored in scores.items():
            rows.append(measure_quality(text, choice, scored, scores[DENSE]))
            print(rows[-1], flush=True)
        if options.verify and agreement is None and checked in scores:
            agreement = verify(runner, windows[0], scores[checked][0], checked)
    if options.output:
        result = {
            "model": "smollm2-135m",
            "dtype": "float32",
            "context_tokens": CONTEXT_TOKENS,
            "windows": NUM_WINDOWS,
            "agreement": asdict(agreement) if agreement else None,
            "rows": [asdict(row) for row in rows],
        }
        options.output.write_text(json.dumps(environment() | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
