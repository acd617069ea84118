"""Prefill and decode speed of the engine against transformers ``generate``, in one run.

Same weights, dtype and threads; prompts are Python's own reference text. Prints tokens per second
and the ratio to transformers for each context and batch, and writes them with ``--output``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from report import environment, reference_tokens, resolve_builtin, this_machine
from transformers.generation.streamers import BaseStreamer

from sparsed.core import AddRequest, EngineSpec, SamplingParams, Service
from sparsed.engine.engine import Engine
from sparsed.engine.models.config import load_config
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.runner import Runner

CONTEXTS = (512, 2048, 7168)
BATCHES = (1, 4)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second of all requests together."""

    prefill: float
    decode: float


def time_engine(engine: Engine, prompts: list[list[int]], new_tokens: int) -> Speed:
    """Prefill ends with the first token of the last request; decode is the rest."""
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=new_tokens + 1, temperature=0.0, ignore_eos=True)
        engine.add(
            AddRequest(request_id=str(number), prompt_tokens=tuple(prompt), sampling=sampling)
        )
    started = time.perf_counter()
    waiting = {str(number) for number in range(len(prompts))}
    produced_before = produced = 0
    first = started
    while engine.has_work:
        outputs = engine.step().outputs
        produced += len(outputs)
        if waiting:
            waiting -= {output.request_id for output in outputs}
            first, produced_before = time.perf_counter(), produced
    ended = time.perf_counter()
    return Speed(
        prefill=sum(map(len, prompts)) / (first - started),
        decode=(produced - produced_before) / (ended - first),
    )


class TokenClock(BaseStreamer):
    """Notes when each token of ``generate`` is there; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        pass


def time_transformers(
    model: transformers.PreTrainedModel, prompts: list[list[int]], new_tokens: int
) -> Speed:
    ids, clock = torch.tensor(prompts), TokenClock()
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new_tokens + 1,
            max_new_tokens=new_tokens + 1,
            streamer=clock,
        )
    started_s, first_s, *_, last_s = clock.times_s
    return Speed(
        prefill=ids.numel() / (first_s - started_s),
        decode=len(prompts) * new_tokens / (last_s - first_s),
    )


def make_engine(directory: Path, knobs: dict[str, object]) -> Engine:
    shape = load_config(directory).shape
    asked = {"max_num_seqs": max(BATCHES), "kv_dram_gib": 2, "kv_hbm_gib": 2.5, **knobs}
    resolved = resolve_knobs(
        asked, shape=shape, machine=this_machine(), device="cpu", dtype="float32"
    )
    plan = plan_memory(resolved, shape=shape, dtype="float32")
    spec = EngineSpec(
        model=str(directory), device="cpu", dtype="float32", knobs=resolved, plan=plan
    )
    runner = Runner(spec, on_progress=lambda phase, frac: None)
    return Engine(runner, knobs=resolved, service=Service(recall_floor=0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--contexts", type=int, nargs="*", default=CONTEXTS)
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--token-budget", type=int, default=1024)
    options = parser.parse_args()
    directory = resolve_builtin()
    text = reference_tokens(directory)
    engine = make_engine(directory, {"token_budget": options.token_budget})
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    warm_up = [text[:256]]
    time_engine(engine, warm_up, 4)
    time_transformers(model, warm_up, 4)
    rows = []
    for context in options.contexts:
        for batch in options.batches:
            prompts = [text[i * context : (i + 1) * context] for i in range(batch)]
            ours, theirs = [], []
            for _ in range(options.repeats):  # in turn, so that drift hits both
                ours.append(time_engine(engine, prompts, options.new_tokens))
                theirs.append(time_transformers(model, prompts, options.new_tokens))
            rows.append(report_row(context, batch, ours, theirs))
    if options.output:
        result = {"options": {k: str(v) for k, v in vars(options).items()}, "rows": rows}
        options.output.write_text(json.dumps(environment() | result, indent=2) + "\n")


def report_row(
    context: int, batch: int, ours: list[Speed], theirs: list[Speed]
) -> dict[str, object]:
    row: dict[str, object] = {"context": context, "batch": batch}
    for name in ("prefill", "decode"):
        mine = statistics.median(getattr(speed, name) for speed in ours)
        other = statistics.median(getattr(speed, name) for speed in theirs)
        row[name] = {"sparsed": mine, "transformers": other, "ratio": mine / other}
        print(
            f"context {context:5} batch {batch} {name:8}"
            f"{mine:9.1f} tok/s, transformers {other:9.1f}, ratio {mine / other:.2f}",
            flush=True,
        )
    row["runs"] = {
        "sparsed": [asdict(s) for s in ours],
        "transformers": [asdict(s) for s in theirs],
    }
    return row


if __name__ == "__main__":
    main()
