"""The dense engine on one GPU, without a server: prefill, decode, and both under load.

Run from the root on a machine with a CUDA device: ``PYTHONPATH=benchmarks python
benchmarks/gpu_dense.py --output FILE``. It takes about two and a half minutes, 55 GB of the device
and 20 GiB of pinned memory. Random weights of a model's shape; every figure is of the real engine,
in one process, one after the other: loads of requests, decode steps against their graph alone (as
``sparsed bench decode`` measures them), decode attention against a copy in device memory, and the
first token of a long prompt with and without saves to the DRAM tier. Ratios are to ceilings of the
same run. Prints the targets at the end.
"""

from __future__ import annotations

import argparse
import operator
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from report import environment, model_config
from targets import Target, print_targets, write_result

from sparsed.controller.startup import find_device
from sparsed.core import (
    AddRequest,
    Ceiling,
    DecodePoint,
    DecodeSpeed,
    EngineSpec,
    KernelSpeed,
    SamplingParams,
)
from sparsed.engine.engine import Engine
from sparsed.engine.kvcache.order import Saved
from sparsed.engine.kvcache.transfer import Transfer
from sparsed.engine.measure.attention_cases import resident_case
from sparsed.engine.measure.cases import Setting
from sparsed.engine.measure.ceilings import copy_bytes_per_s
from sparsed.engine.measure.clock import Clock
from sparsed.engine.measure.decode import DecodeMeter
from sparsed.engine.measure.kernels import measure_case
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.runner import Runner

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
MAX_REQUESTS, MAX_TOKENS = 64, 33792
SAVE_REPEATS = 3
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """``count`` requests at once, of so many prompt and output tokens."""

    name: str
    prompt_tokens: int
    output_tokens: int
    count: int


WARM_UP = Load(name="warm-up", prompt_tokens=2048, output_tokens=16, count=2)
LOADS = {
    "long-prompt": Load(name="long-prompt", prompt_tokens=32768, output_tokens=64, count=1),
    "short-prompts": Load(name="short-prompts", prompt_tokens=2048, output_tokens=128, count=64),
    "long-prompts": Load(name="long-prompts", prompt_tokens=32768, output_tokens=256, count=24),
}
POINTS = ((1, 2048), (1, 32768), (8, 8192), (32, 4096), (64, 2048))  # requests, tokens of each
ATTENTION = (32, 8192)  # likewise


def make_spec(options: argparse.Namespace) -> EngineSpec:
    device, machine = find_device(options.device)
    dtype = DTYPES[device.partition(":")[0]]
    shape = model_config(options.model).shape
    asked = {
        "sparse_method": "dense",
        "kv_hbm_gib": options.kv_hbm_gib,
        "kv_dram_gib": options.kv_dram_gib,
        "max_num_seqs": MAX_REQUESTS,
        "max_model_len": min(MAX_TOKENS, shape.max_position),
        "prefill_chunk": options.prefill_chunk,
    }
    knobs = resolve_knobs(asked, shape=shape, machine=machine, device=device, dtype=dtype)
    return EngineSpec(
        model=options.model,
        device=device,
        dtype=dtype,
        knobs=knobs,
        plan=plan_memory(knobs, shape=shape, dtype=dtype),
    )


def add_requests(engine: Engine, load: Load, *, vocab_size: int) -> None:
    for number in range(load.count):
        random = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, vocab_size, (load.prompt_tokens,), generator=random).tolist()
        engine.add(
            AddRequest(
                request_id=str(number),
                prompt_tokens=tuple(tokens),
                sampling=SamplingParams(max_tokens=load.output_tokens, temperature=0.0),
            )
        )


def run_load(runner: Runner, engine: Engine, load: Load) -> Row:
    """All at once; seconds from the first step on."""
    add_requests(engine, load, vocab_size=runner.vocab_size)
    times: dict[str, list[float]] = {str(number): [] for number in range(load.count)}
    clock = Clock(runner.kv.arena.pages_NX.device)
    clock.synchronize()
    started_s = time.perf_counter()
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error is None, output.error
            if output.token_id is not None:
                times[output.request_id].append(time.perf_counter() - started_s)
    clock.synchronize()
    total_s = time.perf_counter() - started_s
    spans_s = [(seen[-1] - seen[0]) / (len(seen) - 1) for seen in times.values()]
    return {
        **asdict(load),
        "total_s": total_s,
        "output_tokens_per_s": sum(map(len, times.values())) / total_s,
        "mean_ttft_s": statistics.mean(seen[0] for seen in times.values()),
        "mean_tpot_ms": 1e3 * statistics.mean(spans_s),
    }


def measure_steps(
    runner: Runner, engine: Engine, spec: EngineSpec, *, copy_rate: float
) -> list[DecodeSpeed]:
    meter = DecodeMeter(runner, engine, spec=spec, copy_bytes_per_s=copy_rate)
    points = [DecodePoint(requests=requests, tokens=tokens) for requests, tokens in POINTS]
    return [meter.measure(point) for point in points if meter.fits(point)]


def measure_attention(runner: Runner, clock: Clock, *, copy_rate: float) -> KernelSpeed:
    """Decode attention alone, at the sizes of the model."""
    batch, context = ATTENTION
    setting = Setting(
        device=clock.device,
        dtype=runner.kv.arena.pages_NX.dtype,
        shape=runner.decoder.config.shape,
        page_size=runner.kv.geometry.page_size,
        batches=(batch,),
        contexts=(context,),
    )
    case = resident_case(setting, batch=batch, context=context)
    speed = measure_case(case, clock=clock, ceilings={Ceiling.COPY: copy_rate})
    assert speed is not None, "no memory for decode attention"
    return speed


def measure_saves(runner: Runner, engine: Engine) -> Row:
    """First token of the long prompt, by turns with and without copies to the DRAM tier."""
    load = replace(LOADS["long-prompt"], name="saves", output_tokens=2)
    with_s, without_s = [], []
    for _ in range(SAVE_REPEATS):
        with_s.append(run_load(runner, engine, load)["mean_ttft_s"])
        with no_saves(runner.kv.transfer):
            without_s.append(run_load(runner, engine, load)["mean_ttft_s"])
    return {
        "ttft_with_s": with_s,
        "ttft_without_s": without_s,
        "ratio": statistics.median(with_s) / statistics.median(without_s),
    }


@contextmanager
def no_saves(transfer: Transfer) -> Iterator[None]:
    """Nothing reaches the DRAM tier; requests whose pages stay in the hot tier do not notice."""

    def keep(*_arguments: object, **_options: object) -> Saved:
        return Saved()

    transfer.save = transfer.save_blocks = keep  # type: ignore[method-assign]
    try:
        yield
    finally:
        del transfer.save, transfer.save_blocks


def list_targets(result: Row) -> list[Target]:
    loads = {row["name"]: row for row in result.get("loads", ())}
    one, many = loads.get("long-prompt", {}), loads.get("short-prompts", {})
    alone = [row for row in result.get("steps", ()) if row["requests"] == 1]
    not_hidden_ms = [row["not_hidden_ms"] for row in alone if row["graph_ms"] is not None]
    return [
        Target("32k prompt alone: first token, s", one.get("mean_ttft_s"), operator.le, 1.25),
        Target("then ms a token", one.get("mean_tpot_ms"), operator.le, 8.0),
        Target(
            "64 x (2048 + 128): output tokens/s",
            many.get("output_tokens_per_s"),
            operator.ge,
            1685.0,
        ),
        Target(
            "24 x (32768 + 256): s", loads.get("long-prompts", {}).get("total_s"), operator.le, 47.0
        ),
        Target(
            "batch 1: host time not hidden, ms", max(not_hidden_ms, default=None), operator.le, 0.3
        ),
        Target(
            "decode attention 32 x 8192, of the copy rate",
            result.get("attention", {}).get("ratio"),
            operator.ge,
            0.80,
        ),
        Target(
            "32k prompt: first token with saves, over that without",
            result.get("saves", {}).get("ratio"),
            operator.le,
            1.03,
        ),
    ]


def measure(options: argparse.Namespace) -> Row:
    """Every part that was asked for, each with the seconds it took."""
    parts = Parts()
    spec = make_spec(options)
    runner = parts.time("start", lambda: Runner(spec, on_progress=lambda *_: None))
    engine = Engine(runner, knobs=spec.knobs)
    clock = Clock(torch.device(spec.device))
    copy_rate = copy_bytes_per_s(clock)
    parts.time("warm-up", lambda: run_load(runner, engine, WARM_UP))
    loads = [
        parts.time(name, lambda name=name: run_load(runner, engine, LOADS[name]))
        for name in options.loads
    ]
    result: Row = {
        "model": options.model,
        "knobs": spec.knobs.as_dict(),
        "facts": asdict(replace(runner.facts, calibration=None)),
        "copy_bytes_per_s": copy_rate,
        "loads": loads,
    }
    if "steps" in options.parts:
        steps = parts.time(
            "steps", lambda: measure_steps(runner, engine, spec, copy_rate=copy_rate)
        )
        result["steps"] = [asdict(step) for step in steps]
    if "saves" in options.parts:
        result["saves"] = parts.time("saves", lambda: measure_saves(runner, engine))
    if "attention" in options.parts:
        speed = parts.time(
            "attention", lambda: measure_attention(runner, clock, copy_rate=copy_rate)
        )
        result["attention"] = asdict(speed)
    return result | {"seconds": parts.seconds}


class Parts:
    """Runs one part after the other; prints and remembers what each gave and took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        started_s = time.perf_counter()
        found = work()
        self.seconds[name] = time.perf_counter() - started_s
        shown = "" if isinstance(found, Runner) else f": {found}"
        print(f"{name} in {self.seconds[name]:.1f} s{shown}", flush=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="dummy:llama-3.1-8b", help="or a directory")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--kv-hbm-gib", type=float, default=18.0)
    parser.add_argument("--kv-dram-gib", type=float, default=20.0)
    parser.add_argument("--prefill-chunk", type=int, default=8192)
    parser.add_argument("--loads", nargs="*", choices=LOADS, default=list(LOADS))
    names = ("steps", "saves", "attention")
    parser.add_argument("--parts", nargs="*", choices=names, default=list(names))
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    result = environment() | measure(options)
    targets = list_targets(result)
    print_targets(targets)
    if options.output:
        write_result(options.output, result, targets)


if __name__ == "__main__":
    main()
