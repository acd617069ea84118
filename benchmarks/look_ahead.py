"""What look-ahead leaves to be waited for, what it fetches for that, and how much for nothing.

Run from the root: ``PYTHONPATH=benchmarks python benchmarks/look_ahead.py --output FILE``. The
built-in model on a CPU reads a text token by token, by queued steps over two bounded tiers, with
look-ahead and without it. The text is given, so that both select the same pages. Nothing is timed:
pages are counted, of all layers and KV heads, after a few steps that are not.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from report import cache_directory, environment, reference_tokens, resolve_builtin, this_machine

from sparsed.core import NO_RECALL, WARMUP_STEPS, EngineSpec, EngineStats, SparseMethod
from sparsed.engine.batch import DecodeRow, PromptChunk, StepPlan
from sparsed.engine.models.config import load_config
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.runner import Runner

CHUNK_TOKENS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """Pages of the counted steps. ``missed``: fetched because a layer waited for them."""

    looks_ahead: bool
    resident_ratio: float  # hot tier over selection
    selected: int
    missed: int
    foreseen: int
    wasted: int

    @classmethod
    def between(
        cls, before: EngineStats, after: EngineStats, *, looks_ahead: bool, resident_ratio: float
    ) -> Count:
        """What was counted from one look to the other."""
        missed = after.hot_misses - before.hot_misses
        return cls(
            looks_ahead=looks_ahead,
            resident_ratio=resident_ratio,
            selected=after.hot_hits - before.hot_hits + missed,
            missed=missed,
            foreseen=after.foreseen_pages - before.foreseen_pages,
            wasted=after.wasted_pages - before.wasted_pages,
        )

    def __str__(self) -> str:
        parts = (self.missed, self.foreseen, self.wasted)
        missed, foreseen, wasted = (f"{part / self.selected:6.2%}" for part in parts)
        return (
            f"{self.resident_ratio:3.1f}x  look-ahead {'on ' if self.looks_ahead else 'off'}  of "
            f"{self.selected} pages selected: missed {missed}, fetched ahead {foreseen}, of these "
            f"for nothing {wasted}"
        )


def make_runner(directory: Path, options: argparse.Namespace, *, resident_ratio: float) -> Runner:
    """A runner for one request with a hot tier of so many times its selection."""
    shape = load_config(directory).shape
    asked = {
        "sparse_method": SparseMethod.MEAN_KEY.value,
        "page_size": options.page_size,
        "token_budget": options.budget,
        "hbm_budget": round(options.budget * resident_ratio),
        "prefill_chunk": CHUNK_TOKENS,
        "max_num_seqs": 1,
        "max_model_len": shape.max_position,
        "kv_hbm_gib": 1.0,
        "kv_dram_gib": 1.0,
    }
    knobs = resolve_knobs(asked, shape=shape, machine=this_machine(), device="cpu", dtype="float32")
    spec = EngineSpec(
        model=str(directory),
        device="cpu",
        dtype="float32",
        knobs=knobs,
        plan=plan_memory(knobs, shape=shape, dtype="float32"),
        recall_stride=NO_RECALL,
        enforce_eager=True,
        cache_dir=str(cache_directory()),
    )
    return Runner(spec, on_progress=lambda phase, frac: None)


def count(
    runner: Runner,
    tokens: Sequence[int],
    options: argparse.Namespace,
    *,
    looks_ahead: bool,
    resident_ratio: float,
) -> Count:
    """Prefill the context, then feed the tokens after it, those of the warm-up uncounted."""
    runner.look_ahead(looks_ahead)
    row = runner.kv.add(len(tokens), method=SparseMethod.MEAN_KEY, token_budget=None)
    prefill(runner, row, tokens[: options.context])
    first = options.context + WARMUP_STEPS
    decode(runner, row, tokens[:first], first=options.context)
    before = runner.stats()
    decode(runner, row, tokens, first=first)
    after = runner.stats()
    runner.kv.free(row)
    return Count.between(before, after, looks_ahead=looks_ahead, resident_ratio=resident_ratio)


def prefill(runner: Runner, row: int, tokens: Sequence[int]) -> None:
    for start in range(0, len(tokens), CHUNK_TOKENS):
        part = tuple(tokens[start : start + CHUNK_TOKENS])
        chunk = PromptChunk(
            row=row,
            tokens=part,
            start=start,
            prompt_length=len(tokens),
            logits_from=start + len(part),
        )
        runner.run(StepPlan(chunks=(chunk,), decodes=()))


def decode(runner: Runner, row: int, tokens: Sequence[int], *, first: int) -> None:
    """A step for each of the tokens from ``first`` on, all of them queued ones."""
    for position, token in enumerate(tokens[first:], start=first):
        request = DecodeRow(row=row, token=token, position=position)
        assert runner.steps is not None and runner.steps.row_of(request) is not None
        runner.run(StepPlan(chunks=(), decodes=(request,)))


def measure(directory: Path, options: argparse.Namespace) -> list[Count]:
    """With look-ahead and without it at each size of the hot tier."""
    length = options.context + WARMUP_STEPS + options.steps
    tokens, counts = reference_tokens(directory)[:length], []
    for ratio in options.ratios:
        runner = make_runner(directory, options, resident_ratio=ratio)
        for looks_ahead in (False, True):
            counts.append(
                count(runner, tokens, options, looks_ahead=looks_ahead, resident_ratio=ratio)
            )
            print(counts[-1], flush=True)
    return counts


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    parser.add_argument("--context", type=int, default=4096, help="tokens prefilled")
    parser.add_argument("--steps", type=int, default=256, help="counted, after the warm-up")
    parser.add_argument("--budget", type=int, default=512, help="tokens selected")
    parser.add_argument("--page-size", type=int, default=8)
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.5, 2.0, 4.0])
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_options()
    counts = measure(resolve_builtin(), options)
    if options.output:
        setting = {
            "model": "smollm2-135m",
            "dtype": "float32",
            "text": "documentation",
            "context_tokens": options.context,
            "token_budget": options.budget,
            "page_size": options.page_size,
            "warmup_steps": WARMUP_STEPS,
            "steps": options.steps,
        }
        result = environment() | setting | {"rows": [asdict(count) for count in counts]}
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
