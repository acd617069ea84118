"""What a stride of retrieval saves and costs: misses, attention recall and time of a step, by stride.

Run from the root: ``PYTHONPATH=src:benchmarks python benchmarks/retrieval_stride.py --output FILE.json``. Requests
of technical documentation are decoded along their own text, not along what the model would say, so that selections
move as reading moves them. Each stride begins anew on the same text; recall is the mean of a sample in each second step,
layers in turn, in a run of its own, for a sample takes time and fetches. Prints ratios to a stride of 1 of the same run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from report import environment, reference_tokens, resolve_builtin, this_machine

from sparsed.core import NO_RECALL, EngineSpec, EngineStats, Knobs, SparseMethod
from sparsed.engine.batch import DecodeRow, PromptChunk, StepPlan
from sparsed.engine.models.config import load_config
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.runner import Runner

CHUNK: Final = 1024
WARM_UP: Final = 16  # tokens before anything is counted: the hot tier is filled


def make_spec(directory: Path, options: argparse.Namespace) -> EngineSpec:
    shape = load_config(directory).shape
    asked = {
        "page_size": options.page_size,
        "token_budget": options.token_budget,
        "hbm_budget": options.hbm_budget,
        "max_num_seqs": options.requests,
        "max_model_len": options.context + options.tokens + 1,
        "prefill_chunk": CHUNK,
        "kv_hbm_gib": options.kv_hbm_gib,
        "kv_dram_gib": options.kv_dram_gib,
    }
    device, dtype = options.device, options.dtype
    knobs = resolve_knobs(asked, shape=shape, machine=this_machine(), device=device, dtype=dtype)
    plan = plan_memory(knobs, shape=shape, dtype=dtype)
    return EngineSpec(model=str(directory), device=device, dtype=dtype, knobs=knobs, plan=plan)


def prefill(runner: Runner, tokens: Sequence[int], *, length: int) -> int:
    """The row of a request whose first ``length`` tokens ran as its prompt."""
    row = runner.kv.add(len(tokens), method=SparseMethod.MEAN_KEY, token_budget=None)
    for start in range(0, length, CHUNK):
        end = min(start + CHUNK, length)
        chunk = PromptChunk(
            row=row,
            tokens=tuple(tokens[start:end]),
            start=start,
            prompt_length=length,
            logits_from=length - 1,
        )
        runner.run(StepPlan(chunks=(chunk,), decodes=()))
    return row


def decode(runner: Runner, texts: Sequence[Sequence[int]], *, context: int) -> dict[str, float]:
    """Seconds, misses and selected pages of a step, and recall where it is sampled."""
    rows = [prefill(runner, text, length=context) for text in texts]
    before, began_s = EngineStats(), 0.0
    num_tokens = len(texts[0]) - context
    for step in range(num_tokens):
        if step == WARM_UP:
            before, began_s = settled(runner), time.perf_counter()
        decodes = tuple(
            DecodeRow(row=row, token=text[context + step], position=context + step)
            for row, text in zip(rows, texts, strict=True)
        )
        runner.run(StepPlan(chunks=(), decodes=decodes))
    stats = settled(runner)
    seconds = time.perf_counter() - began_s
    for row in rows:
        runner.kv.free(row)
    num_steps = num_tokens - WARM_UP
    samples = stats.recall_samples - before.recall_samples
    return {
        "step_s": seconds / num_steps,
        "misses": (stats.hot_misses - before.hot_misses) / num_steps,
        "selected": (
            stats.hot_hits + stats.hot_misses - before.hot_hits - before.hot_misses
        ) / num_steps,
        "recall": (stats.recall_sum - before.recall_sum) / samples if samples else 0.0,
    }  # fmt: skip


def settled(runner: Runner) -> EngineStats:
    """Counters once the device has done everything: those read are of the call before."""
    for _ in range(2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        stats = runner.stats()
    return stats


def measure(spec: EngineSpec, texts: Sequence[Sequence[int]], options: Any) -> list[dict[str, Any]]:
    timed = Runner(replace(spec, recall_stride=NO_RECALL), on_progress=lambda *_: None)
    sampled = Runner(replace(spec, recall_stride=2), on_progress=lambda *_: None)
    found: list[dict[str, Any]] = []
    for stride in options.strides:
        for runner in (timed, sampled):
            take(runner, replace(spec.knobs, retrieval_stride=stride))
        row = decode(timed, texts, context=options.context)
        row["recall"] = decode(sampled, texts, context=options.context)["recall"]
        found.append({"stride": stride} | row)
        print(line(found[-1], found[0]), flush=True)
    return found


def take(runner: Runner, knobs: Knobs) -> None:
    runner.ask(knobs)
    while runner.readiness < 1.0:
        runner.prepare(idle=True)
    runner.apply(knobs)


def line(row: dict[str, Any], first: dict[str, Any]) -> str:
    return (
        f"stride {row['stride']:2}: step {1e3 * row['step_s']:.2f} ms "
        f"({row['step_s'] / first['step_s']:.3f}), misses {row['misses'] / row['selected']:.2%} "
        f"({row['misses'] / max(1e-9, first['misses']):.2f}), recall {row['recall']:.4f} "
        f"({row['recall'] / first['recall']:.4f})"
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a directory; default: the built-in model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--strides", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=2)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=144)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--token-budget", type=int, default=512)
    parser.add_argument("--hbm-budget", type=int, default=768)
    parser.add_argument("--kv-hbm-gib", type=float, default=1.0)
    parser.add_argument("--kv-dram-gib", type=float, default=2.0)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    directory = options.model or resolve_builtin()
    text = reference_tokens(directory)
    length = options.context + options.tokens
    texts = [text[i * length : (i + 1) * length] for i in range(options.requests)]
    rows = measure(make_spec(directory, options), texts, options)
    if options.output:
        result = environment() | {"rows": rows}
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
