"""What sparse attention costs in quality: perplexity against dense on real text, and recall.

A window is 6,000 tokens of context, prefilled densely, and 1,024 scored tokens, each attended to
as a decode step would, all at once (``sparsed.engine.evaluate``). The first window is also fed
through the real runner with cuboid-mean, token by token, over two bounded tiers, and the two must
agree (``--verify``).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from report import cache_directory, environment, resolve_builtin
from serial_decode import Agreement, compare, make_runner
from tokenizers import Tokenizer

from sparsed.core import (
    PAGE_SIZES,
    Choice,
    GroupRule,
    MetadataFormat,
    Quality,
    RankMethod,
    SparseMethod,
)
from sparsed.engine.assembly import load_decoder
from sparsed.engine.evaluate.context import Context
from sparsed.engine.evaluate.race import Race
from sparsed.engine.evaluate.texts import TEXTS, Window, cut_windows, load_tokenizer
from sparsed.engine.models.config import load_config
from sparsed.engine.sparse.base import recent_pages

CONTEXT_TOKENS = 6000
SCORED_TOKENS = 1024
NUM_WINDOWS = 3
VERIFIED_TOKENS = 200
METHODS = (RankMethod.CUBOID_MEAN, RankMethod.QUEST, RankMethod.ORACLE, RankMethod.RANDOM)
HEADING = "text, choice, perplexity, ratio to dense [95 %], recall mean / p10 / p01"


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
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
    return parser.parse_args(arguments)


def make_choices(options: argparse.Namespace, *, num_layers: int) -> list[Choice]:
    """Every combination of what was asked for. Summaries are in float32, as the runner's are."""
    return [
        Choice(
            method=RankMethod(method),
            share=mean_share(token_budget // page_size * page_size, dense_layers / num_layers),
            page_size=page_size,
            recent_pages=recent_pages(page_size),  # as the runner
            group_rule=GroupRule.SOFTMAX_SUM if method == RankMethod.ORACLE else GroupRule.MEAN,
            metadata=MetadataFormat.FP32,
            dense_layers=dense_layers,
        )
        for dense_layers in options.dense_layers
        for page_size in options.page_sizes
        for token_budget in options.budgets
        for method in options.methods
    ]


def mean_share(token_budget: int, dense_frac: float) -> float:
    """Share of the context read in the mean over layers, if the sparse ones read the budget."""
    return dense_frac + (1 - dense_frac) * token_budget / CONTEXT_TOKENS


def cut(text: str, tokenizer: Tokenizer) -> list[Window]:
    return cut_windows(
        text,
        tokenizer=tokenizer,
        cache_dir=cache_directory(),
        count=NUM_WINDOWS,
        context_tokens=CONTEXT_TOKENS,
        scored_tokens=SCORED_TOKENS,
    )


def verify(directory: Path, window: Window, choice: Choice, *, token_budget: int) -> Agreement:
    """Score the first tokens of a window all at once, and feed them through the runner."""
    runner = make_runner(directory, choice, token_budget=token_budget)
    begun = replace(window, scored=window.scored[: VERIFIED_TOKENS + 1])
    race = Race(runner.decoder, [choice], calibration=None)
    context = Context(runner.decoder, begun.context, num_scored=len(begun.scored))
    expected_N = race.score_window(begun, choice, context).logprobs_N
    return compare(runner, begun, method=SparseMethod(choice.method), expected_N=expected_N)


def run(race: Race, text: str, windows: list[Window]) -> list[Quality]:
    """Every choice on one text; prints how they did."""
    rows = race.run_text(text, windows, on_progress=log)
    print(*map(describe, rows), sep="\n", flush=True)
    return rows


def describe(row: Quality) -> str:
    """One line of the table."""
    recall = (row.recall_mean, row.recall_p10, row.recall_p01)
    shares = " / ".join("-" if share is None else f"{share:.3f}" for share in recall)
    return (
        f"{row.text:14} {row.choice!s:64} {row.perplexity:8.3f}   "
        f"{row.ratio:.4f} [{row.ratio_low:.4f}, {row.ratio_high:.4f}]   {shares}"
    )


def log(phase: str, frac: float) -> None:
    print(f"  {phase}", file=sys.stderr, flush=True)


def write(path: Path, rows: list[Quality], agreement: Agreement | None) -> None:
    """Keep the rows with where they come from."""
    result = {
        "model": "smollm2-135m",
        "dtype": "float32",
        "context_tokens": CONTEXT_TOKENS,
        "windows": NUM_WINDOWS,
        "agreement": asdict(agreement) if agreement else None,
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(environment() | result, indent=2) + "\n")


def main() -> None:
    options = parse_options()
    directory = resolve_builtin()
    tokenizer = load_tokenizer(directory)
    texts = {name: cut(name, tokenizer) for name in options.texts}
    choices = make_choices(options, num_layers=load_config(directory).shape.num_layers)
    checked = next((x for x in choices if x.method is RankMethod.CUBOID_MEAN), None)
    agreement = None
    if options.verify and checked:
        window = texts[options.texts[0]][0]
        agreement = verify(directory, window, checked, token_budget=options.budgets[0])
        print(agreement, flush=True)
    decoder = load_decoder(
        str(directory),
        device=torch.device("cpu"),
        dtype=torch.float32,
        on_progress=lambda phase, frac: None,
    )
    race = Race(decoder, choices, calibration=None)
    print(HEADING, flush=True)
    rows = [row for name, windows in texts.items() for row in run(race, name, windows)]
    if options.output:
        write(options.output, rows, agreement)


if __name__ == "__main__":
    main()
