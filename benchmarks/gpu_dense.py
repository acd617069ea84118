"""The dense engine on one GPU, without a server: prefill, decode, and both under load.

Random weights of a model's shape; every figure is measured on the real engine, in one process, one
after the other. ``graph_ms`` is a decode step's graph replayed alone: what a step takes beyond it
is host time that is not hidden. Ratios are to ceilings measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsed.core import AddRequest, EngineSpec, MachineFacts, SamplingParams
from sparsed.engine.engine import Engine
from sparsed.engine.models.dummy import dummy_config
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.runner import Runner

NUM_STEPS = 40  # of a measured decode
Row = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Load:
    """``count`` requests at once, of so many prompt and output tokens."""

    name: str
    prompt_tokens: int
    output_tokens: int
    count: int


LOADS = (
    Load(name="one long prompt", prompt_tokens=32768, output_tokens=64, count=1),
    Load(name="many short prompts", prompt_tokens=2048, output_tokens=128, count=64),
    Load(name="many long prompts", prompt_tokens=32768, output_tokens=256, count=24),
)
STEPS = ((1, 2048), (1, 32768), (8, 8192), (32, 4096), (64, 2048))  # requests, tokens of each


def make_engine(options: argparse.Namespace, machine: MachineFacts) -> tuple[Runner, Engine]:
    shape = dummy_config(options.model).shape
    asked = {
        "sparse_method": "dense",
        "kv_hbm_gib": options.kv_hbm_gib,
        "kv_dram_gib": options.kv_dram_gib,
        "max_num_seqs": 64,
        "max_model_len": 33792,
        "prefill_chunk": options.prefill_chunk,
    }
    knobs = resolve_knobs(asked, shape=shape, machine=machine, device="cuda:0", dtype="bfloat16")
    spec = EngineSpec(
        model=options.model,
        device="cuda:0",
        dtype="bfloat16",
        knobs=knobs,
        plan=plan_memory(knobs, shape=shape, dtype="bfloat16"),
    )
    runner = Runner(spec, on_progress=_announce)
    return runner, Engine(runner, knobs=knobs)


def add_requests(engine: Engine, load: Load) -> None:
    for number in range(load.count):
        random = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, 100_000, (load.prompt_tokens,), generator=random).tolist()
        engine.add(
            AddRequest(
                request_id=str(number),
                prompt_tokens=tuple(tokens),
                sampling=SamplingParams(max_tokens=load.output_tokens, temperature=0.0),
            )
        )


def run_load(engine: Engine, load: Load) -> Row:
    """All at once; seconds from the first step on."""
    add_requests(engine, load)
    times: dict[str, list[float]] = {str(number): [] for number in range(load.count)}
    started = time.perf_counter()
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error is None, output.error
            if output.token_id is not None:
                times[output.request_id].append(time.perf_counter() - started)
    torch.cuda.synchronize()
    total_s = time.perf_counter() - started
    spans = [(seen[-1] - seen[0]) / (len(seen) - 1) for seen in times.values()]
    row: Row = {
        "load": load.name,
        "requests": load.count,
        "prompt_tokens": load.prompt_tokens,
        "output_tokens": load.output_tokens,
        "total_s": total_s,
        "output_tokens_per_s": sum(map(len, times.values())) / total_s,
        "mean_ttft_s": statistics.mean(seen[0] for seen in times.values()),
        "mean_tpot_ms": 1e3 * statistics.mean(spans),
    }
    print(row, flush=True)
    return row


def measure_steps(runner: Runner, engine: Engine, count: int, tokens: int) -> Row:
    """A decode step in its steady state, against its graph alone."""
    load = Load(name="", prompt_tokens=tokens - 64, output_tokens=128, count=count)
    add_requests(engine, load)
    while not _all_decode(engine, count):
        engine.step()
    for _ in range(5):
        engine.step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(NUM_STEPS):
        engine.step()
    torch.cuda.synchronize()
    step_ms = (time.perf_counter() - started) / NUM_STEPS * 1e3
    assert runner.resident is not None
    graph_ms = median_ms(lambda: runner.resident.replay(count))
    for number in range(count):
        engine.abort(str(number))
    while engine.has_work:
        engine.step()
    row: Row = {
        "requests": count,
        "tokens": tokens,
        "step_ms": step_ms,
        "graph_ms": graph_ms,
        "not_hidden_ms": step_ms - graph_ms,
        "floor_ratio": step_ms / _floor_ms(runner, count, tokens),
    }
    print(row, flush=True)
    return row


def _all_decode(engine: Engine, count: int) -> bool:
    stats = engine.stats()
    return stats.num_running == count and stats.prompt_tokens > 0 and engine.num_decoding == count


def hbm_bytes_per_s() -> float:
    """A large copy on the device, bytes read and written."""
    source = torch.randint(0, 100, (1 << 28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda: target.copy_(source)) / 1e3)


def median_ms(work: Callable[[], object], *, repeats: int = 15) -> float:
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)
