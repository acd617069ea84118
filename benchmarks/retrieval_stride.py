"""What a stride of retrieval saves and costs: misses, attention recall and time of a step, by stride.

Run from the root: ``PYTHONPATH=src:benchmarks python benchmarks/retrieval_stride.py --output FILE.json``. Requests
of technical documentation are decoded along their own text, not along what the model would say, so that selections
move as reading moves them; a model with random weights (``--model dummy:SHAPE``) reads random tokens: that says what
ranking less often saves of a step, nothing of selections. Each stride begins anew on the same text, in rounds of turning
order; the first row is of an engine that never kept a list, the others of one that does, at a stride of 1 too. Recall
is the mean of a sample in each second step, layers in turn, in a run of its own, for a sample takes time and fetches.
Times are given as ratios to the first row in the same round.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from report import environment, model_config, reference_tokens, resolve_builtin

from sparsed.core import NO_RECALL, EngineSpec, EngineStats, Knobs, SparseMethod
from sparsed.engine.batch import DecodeRow, PromptChunk, StepPlan
from sparsed.engine.models.dummy import DUMMY_PREFIX
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.runner import Runner
from sparsed.profiler.machine import read_machine

CHUNK: Final = 1024
WARM_UP: Final = 16  # tokens before anything is counted: the hot tier is filled


def make_spec(model: str, options: argparse.Namespace) -> EngineSpec:
    shape = model_config(model).shape
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
    knobs = resolve_knobs(asked, shape=shape, machine=read_machine(), device=device, dtype=dtype)
    plan = plan_memory(knobs, shape=shape, dtype=dtype)
    return EngineSpec(
        model=model,
        device=device,
        dtype=dtype,
        knobs=knobs,
        plan=plan,
        always_select=options.always_select,
    )


def texts_of(model: str, options: argparse.Namespace) -> list[list[int]]:
    """One for each request, as long as its prompt and what is decoded."""
    length, count = options.context + options.tokens, options.requests
    if model.startswith(DUMMY_PREFIX):
        numbers = torch.Generator().manual_seed(0)
        size = (count, length)
        return torch.randint(model_config(model).vocab_size, size, generator=numbers).tolist()
    text = reference_tokens(Path(model))
    return [text[i * length : (i + 1) * length] for i in range(count)]


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
    """A row for each stride, behind one for a stride of 1 of an engine that never kept a list."""
    spec = replace(spec, recall_stride=NO_RECALL)
    never, keeping = (Runner(spec, on_progress=lambda *_: None) for _ in range(2))
    take(keeping, replace(spec.knobs, retrieval_stride=2))
    tried = [(never, 1), *((keeping, stride) for stride in options.strides)]
    rounds: list[list[dict[str, float]]] = [[] for _ in tried]
    for number in range(options.rounds):
        for i in range(len(tried))[:: 1 if number % 2 == 0 else -1]:
            runner, stride = tried[i]
            take(runner, replace(spec.knobs, retrieval_stride=stride))
            rounds[i].append(decode(runner, texts, context=options.context))
    return [
        {"stride": stride, "keeps": runner is keeping} | summary(rows, rounds[0])
        for (runner, stride), rows in zip(tried, rounds, strict=True)
    ]


def summary(
    rows: Sequence[Mapping[str, float]], first: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """Of all rounds; ``step_ratio``: to the ``first`` way in the same round."""
    ratios = [mine["step_s"] / other["step_s"] for mine, other in zip(rows, first, strict=True)]
    return {
        "step_s": [row["step_s"] for row in rows],
        "step_ratio": median(ratios),
        "misses": median(row["misses"] for row in rows),
        "selected": median(row["selected"] for row in rows),
    }


def add_recall(
    found: Sequence[dict[str, Any]], spec: EngineSpec, texts: Sequence[Sequence[int]], options: Any
) -> None:
    runner = Runner(replace(spec, recall_stride=2), on_progress=lambda *_: None)
    for row in found:
        if row["keeps"]:  # from the first stride above 1 on
            take(runner, replace(spec.knobs, retrieval_stride=2))
        take(runner, replace(spec.knobs, retrieval_stride=row["stride"]))
        row["recall"] = decode(runner, texts, context=options.context)["recall"]


def take(runner: Runner, knobs: Knobs) -> None:
    runner.ask(knobs)
    while runner.readiness < 1.0:
        runner.prepare(idle=True)
    runner.apply(knobs)


def line(row: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    return (
        f"stride {row['stride']:2}{' kept' if row['keeps'] else '     '}: step "
        f"{1e3 * median(row['step_s']):.2f} ms ({row['step_ratio']:.3f}), "
        f"misses {row['misses'] / row['selected']:.2%} "
        f"({row['misses'] / max(1e-9, first['misses']):.2f})"
        + (f", recall {row['recall']:.4f}" if "recall" in row else "")
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a directory or dummy:SHAPE; default: the built-in model")
    parser.add_argument("--always-select", action="store_true", help="even where all pages are hot")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--strides", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
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
    model = options.model or str(resolve_builtin())
    spec, texts = make_spec(model, options), texts_of(model, options)
    rows = measure(spec, texts, options)
    if not model.startswith(DUMMY_PREFIX):
        add_recall(rows, spec, texts, options)
    for row in rows:
        print(line(row, rows[0]))
    if options.output:
        result = environment() | {"rows": rows}
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
