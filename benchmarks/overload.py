"""What each mechanism adds under a load that memory is too small for: a stack of modes, one engine.

Run from the root: ``PYTHONPATH=benchmarks python benchmarks/overload.py --hot-gib 18 --count 24
--trace RECORDING --output FILE``. The real engine in one process, without a server; prompts are
computed, selections are those of the recording (unless there is none). ``--rates`` runs the same
requests as Poisson arrivals at each rate; inf is all at once. A mode is judged by its goodput: the
most output tokens a second of a run that is done, in which the P99 TPOT is at most 25 dense steps at
batch 1 and requests wait 2 s on average before their prompt begins. On a CPU there is one way to
copy and no look-ahead: three modes of the stack are the same there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import torch
from overload_load import (
    AtOnce,
    Driven,
    Load,
    Prompts,
    Watched,
    drive,
    make_requests,
    summarise,
)
from overload_recompute import Recomputing, on_demand
from overload_stack import MODES, STACK, Mode, Runners, Setting, parse_mode
from report import environment, model_config, reference_tokens, resolve_builtin

from sparsed.core import BLOCK_TOKENS, EngineStats, InputError
from sparsed.engine.engine import Engine, Model
from sparsed.engine.kvcache.geometry import num_frames
from sparsed.engine.models.dummy import DUMMY_PREFIX

BUILTIN: Final = "smollm2-135m"
UNIT_TOKENS: Final = 16  # of output, to know a step at batch 1
MAX_UNITS: Final = 25.0
MAX_DELAY_S: Final = 2.0
Row = dict[str, Any]


class Bench:
    """Runs loads in one mode after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        model = str(resolve_builtin()) if options.model == BUILTIN else options.model
        config = model_config(model)
        tokens = () if model.startswith(DUMMY_PREFIX) else reference_tokens(Path(model))
        self._load = Load(
            count=options.count,
            prompt_tokens=options.prompt_tokens,
            output_tokens=options.output_tokens,
            seed=options.seed,
        )
        self._prompts = Prompts(vocab_size=config.vocab_size, tokens=tokens, seed=options.seed)
        self._limit_s = options.limit_s
        longest = options.prompt_tokens + max(options.output_tokens, UNIT_TOKENS)
        self._runners = Runners(
            Setting(
                model=model,
                device=options.device,
                shape=config.shape,
                tokens=longest,
                kv_tokens=options.count * num_frames(longest) * BLOCK_TOKENS,
                max_num_seqs=options.max_num_seqs or min(options.count, 64),
                token_budget=options.budget,
                hot_gib=options.hot_gib,
                dram_gib=options.dram_gib,
                page_size=options.page_size,
                prefill_chunk=options.prefill_chunk,
                trace=options.trace,
            )
        )

    def run(self, mode: Mode, rates: Sequence[float]) -> Iterator[Row]:
        """A row for every rate."""
        runner, spec = self._runners.get(mode)
        watched = Watched(cast(Model, runner))
        shares = runner.kv.shares
        with on_demand(shares) if mode.recomputes else nullcontext():
            engine = Engine(cast(Model, watched), knobs=spec.knobs, gates=mode.gates)
            unit_ms = self._warm_up(engine, watched)
            for rate in rates:
                load = replace(self._load, rate=rate)
                before = read_stats(engine)
                front: AtOnce | Recomputing = AtOnce(engine)
                if mode.recomputes:
                    front = Recomputing(engine, lane_blocks=shares.lane_blocks)
                began_s = time.process_time()
                driven = self._drive(engine, watched, load, front=front)
                cpu_s = time.process_time() - began_s
                row = {"mode": mode.name, "rate": rate, "unit_ms": unit_ms, **summarise(driven)}
                row |= {"cpu_s": cpu_s}  # where others share the CPU, this is what a load took
                row |= moved(before, read_stats(engine))
                if isinstance(front, Recomputing):
                    row["recomputed"] = front.num_preempted
                row["errors"] = sorted({c.error for c in driven.courses if c.error})
                yield row

    def _warm_up(self, engine: Engine, watched: Watched) -> float | None:
        """Meet every kernel; milliseconds of a dense step at batch 1, None where memory is too small
        for one request."""
        load = replace(self._load, count=2, output_tokens=UNIT_TOKENS)
        self._drive(engine, watched, load)
        alone = self._drive(engine, watched, replace(load, count=1), is_sparse=False)
        unit_ms: float | None = summarise(alone)["mean_tpot_ms"]
        return unit_ms

    def _drive(
        self,
        engine: Engine,
        watched: Watched,
        load: Load,
        *,
        is_sparse: bool = True,
        front: Any = None,
    ) -> Driven:
        return drive(
            engine,
            watched,
            make_requests(load, self._prompts, is_sparse=is_sparse),
            arrivals_s=load.arrivals_s(),
            front=front or AtOnce(engine),
            limit_s=self._limit_s,
        )


def read_stats(engine: Engine) -> EngineStats:
    """Those of now: a busy device answers with those of the call before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        engine.stats()
        torch.cuda.synchronize()
    return engine.stats()


def moved(before: EngineStats, after: EngineStats) -> Row:
    """What a load has moved and waited for. ``loads_per_step``: pages loaded for decodes, on
    average; ``miss_frac``: of the pages selected, those that a layer had to wait for."""

    def since(name: str) -> int:
        return int(getattr(after, name) - getattr(before, name))

    def counted(kind: str) -> dict[str, int]:
        counts = {str(item.reason): item.count for item in getattr(after, kind)}
        for item in getattr(before, kind):
            counts[str(item.reason)] -= item.count
        return {reason: count for reason, count in counts.items() if count}

    steps, misses = since("steps"), since("hot_misses")
    selected = misses + since("hot_hits")
    return {
        "steps": steps,
        "loads_per_step": (misses + since("foreseen_pages")) / max(1, steps),
        "misses": misses,
        "foreseen": since("foreseen_pages"),
        "miss_frac": misses / selected if selected else None,
        "h2d_bytes": since("h2d_bytes"),
        "d2h_bytes": since("d2h_bytes"),
        "spills": since("spills"),
        "restores": since("restores"),
        "waits": counted("waits"),
        "refusals": counted("refusals"),
    }


def judge(rows: Sequence[Row]) -> None:
    """Add to each row whether it keeps its promise, and its factor in output tokens a second over
    the mode of the stack before it (where there is none, the first mode) at the same rate. A step
    at batch 1 is the fastest that any mode has shown: a slow engine must not get more time for it.
    """
    step_ms = min((row["unit_ms"] for row in rows if row["unit_ms"] is not None), default=None)
    before: dict[float, Row] = {}
    for row in rows:
        row["step_ms"], row["keeps_slo"] = step_ms, keeps_slo(row, step_ms)
        other = before.get(row["rate"])
        row["factor_over"] = other["mode"] if other else None
        row["factor"] = None
        if other and other["output_tokens_per_s"]:
            row["factor"] = row["output_tokens_per_s"] / other["output_tokens_per_s"]
        if other is None or row["mode"] in {mode.name for mode in STACK}:
            before[row["rate"]] = row


def keeps_slo(row: Row, step_ms: float | None) -> bool:
    """Whether tokens come in time and requests are let in soon, in a load that was done."""
    tpot_ms, delay_s = row["p99_tpot_ms"], row["mean_delay_s"]
    if row["is_cut"] or step_ms is None or tpot_ms is None:
        return False
    return bool(tpot_ms <= MAX_UNITS * step_ms and delay_s <= MAX_DELAY_S)


def goodputs(rows: Sequence[Row]) -> dict[str, Row]:
    """Of each mode, the best row that keeps the promise: its rate and tokens a second; 0 if none
    does."""
    best: dict[str, Row] = {}
    for row in rows:
        found = best.setdefault(row["mode"], {"rate": None, "output_tokens_per_s": 0.0})
        if row["keeps_slo"] and row["output_tokens_per_s"] > found["output_tokens_per_s"]:
            found |= {name: row[name] for name in found}
    return best


COLUMNS: Final[Sequence[tuple[str, str, str]]] = (
    ("total s", "total_s", "8.1f"),
    ("tokens/s", "output_tokens_per_s", "9.1f"),
    ("factor", "factor", "7.2f"),
    ("TTFT s", "mean_ttft_s", "7.2f"),
    ("P99", "p99_ttft_s", "7.2f"),
    ("TPOT ms", "mean_tpot_ms", "8.1f"),
    ("P99", "p99_tpot_ms", "8.1f"),
    ("delay s", "mean_delay_s", "8.2f"),
    ("loads/step", "loads_per_step", "11.1f"),
    ("misses", "miss_frac", "7.2%"),
    ("spills", "spills", "6d"),
    ("refused", "refused", "7d"),
)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of a table of judged rows. After the numbers: whether it was cut, whether the promise
    is kept, and why requests waited."""
    names = [f"{name:>{int(form.split('.')[0].rstrip('d'))}}" for name, _, form in COLUMNS]
    yield f"{'mode':16} {'rate':>5} {' '.join(names)}"
    for row in rows:
        yield f"{row['mode']:16} {row['rate']:5g} {_figures(row)}{_words(row)}"


def _figures(row: Mapping[str, Any]) -> str:
    shown = []
    for _, key, form in COLUMNS:
        width = form.split(".")[0].rstrip("d")
        shown.append(f"{'-':>{width}}" if row[key] is None else f"{row[key]:{form}}")
    return " ".join(shown)


def _words(row: Mapping[str, Any]) -> str:
    waits = ", ".join(f"{reason} {count}" for reason, count in row["waits"].items())
    recomputed = f"; {row['recomputed']} recomputed" if "recomputed" in row else ""
    cut = f"; cut, {row['finished']} of {row['requests']} done" if row["is_cut"] else ""
    return (
        f"  SLO {'kept' if row['keeps_slo'] else 'missed'}{cut}{recomputed}; waits: {waits or '-'}"
    )


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="dummy:llama-3.1-8b", help=f"{BUILTIN}, or a directory")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trace", help="a recording whose selections are replayed")
    parser.add_argument(
        "--modes",
        nargs="+",
        default=[mode.name for mode in STACK],
        help=f"of {', '.join(MODES)}, and static-MULTIPLE; factors are over the mode before",
    )
    parser.add_argument(
        "--no-look-ahead", action="store_true", help="in no mode, whatever its name"
    )
    parser.add_argument("--count", type=int, default=24, help="requests")
    parser.add_argument("--prompt-tokens", type=int, default=32768)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[math.inf], help="requests a second"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hot-gib", type=float, default=18.0, help="KV memory of the device")
    parser.add_argument("--dram-gib", type=float, default=98.0, help="at most")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--page-size", type=int, help="of sparse modes")
    parser.add_argument("--prefill-chunk", type=int)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument(
        "--limit-s", type=float, default=math.inf, help="of each load; then it is cut"
    )
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    return parser.parse_args(arguments)


def make_modes(options: argparse.Namespace) -> list[Mode]:
    modes = [parse_mode(name) for name in options.modes]
    if options.no_look_ahead:
        modes = [replace(mode, looks_ahead=False) for mode in modes]
    return modes


def in_turn(mode: Mode) -> tuple[bool, ...]:
    """Modes of one runner come together, and those that need another, which takes minutes to make
    for a large model, after them; the slowest last."""
    return mode.plain_copies, mode.is_sparse, mode.looks_ahead


def main() -> None:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        modes, bench = make_modes(options), Bench(options)
    except InputError as error:
        raise SystemExit(str(error)) from error
    rows: list[Row] = []
    for mode in sorted(modes, key=in_turn):
        for row in bench.run(mode, options.rates):
            rows.append(row)
            rows.sort(key=lambda row: options.modes.index(row["mode"]))  # as asked, and stable
            print(f"{row['mode']} at {row['rate']:g}: {row['total_s']:.1f} s", flush=True)
            write(options, rows)  # all that there is, should a later mode fail
    judge(rows)
    print(*table(rows), sep="\n")
    write(options, rows)


def write(options: argparse.Namespace, rows: Sequence[Row]) -> None:
    if options.output is None:
        return
    judged = [dict(row) for row in rows]
    judge(judged)
    for row in judged:
        row["rate"] = None if math.isinf(row["rate"]) else row["rate"]  # as JSON knows no infinity
    asked = {name: str(value) for name, value in vars(options).items()}
    result = environment() | {"options": asked, "rows": judged, "goodput": goodputs(judged)}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
