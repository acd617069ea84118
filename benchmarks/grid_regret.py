"""What the search of ``sparsed tune`` misses of the best point of a whole grid, on the real engine.

Run from the root, on a machine that does nothing else, until it says that it is done: ``PYTHONPATH=benchmarks
python benchmarks/grid_regret.py --rows FILE.jsonl --limit-s 540 --workers 4 --output FILE.json -- --kv-hbm-gib 0.2``.
Every point of the grid is served twice with the window that ``sparsed tune`` serves, then the constrained
search takes its trials on the same grid through the same measure, then what it recommends and the grid's best
are served in turns. Every row is appended as it is measured, so a run that was cut off goes on where it
stopped; rows hold only for the same options. Workers serve points side by side, on cores of their own; the
search and the turns run on the cores of one. ``sparsed start``'s flags after ``--`` hold for all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec
from measured_windows import Bench
from report import environment

from sparsed.controller.search_model import search_model
from sparsed.core import KnobValue, Objective, Slo, Workload
from sparsed.tuner.constrained import ConstrainedSearch
from sparsed.tuner.policy import Observation
from sparsed.tuner.space import Ladder, SearchSpace

MAX_POINTS: Final = 64
NUM_WINDOWS: Final = 2  # of a point, as of a trial
TARGET: Final = 0.05
LADDERS: Final = {
    "hbm_budget": (2048, 3072, 4096, 8192),
    "max_num_active_seqs": (1, 2, 4, 8),
    "prefill_chunk": (128, 256, 512, 2048),
}

Row = dict[str, Any]
Values = Mapping[str, KnobValue]


def share(items: Sequence[Any], *, part: int, num_parts: int) -> list[Any]:
    """Every ``num_parts``-th item; the parts are disjoint and hold everything."""
    return list(items[part::num_parts])


def cores_of(cores: Sequence[int], *, part: int, num_parts: int) -> list[int]:
    """Neighbouring cores, as many for each part; ValueError with fewer cores than parts."""
    each = len(cores) // num_parts
    if each == 0:
        raise ValueError(f"{num_parts} workers need a core each, and there are {len(cores)}")
    return list(cores[part * each : (part + 1) * each])


def score(row: Row) -> float | None:
    """Median of a point's windows; None where one of them failed."""
    values = row["scores"]
    return None if None in values or not values else median(values)


def best(rows: Sequence[Row]) -> Row:
    """ValueError where no point could be served."""
    known = [row for row in rows if score(row) is not None]
    if not known:
        raise ValueError("no point of the grid could be served; see the rows' reasons")
    return max(known, key=lambda row: score(row) or 0.0)


def regret(turns: Sequence[Row]) -> float:
    """One minus the geometric mean of the ratios recommended / best of each turn."""
    logs = [math.log(turn["recommended"] / turn["best"]) for turn in turns]
    return 1.0 - math.exp(sum(logs) / len(logs))


def read_rows(file: Path, kind: str) -> list[Row]:
    """Whole lines only: the last one may have been cut off."""
    if not file.exists():
        return []
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def append(file: Path, row: Row) -> None:
    with file.open("a") as opened:
        opened.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def grid_space(bench: Bench) -> SearchSpace:
    ladders = []
    knobs = bench.plan.spec.knobs
    for name, rungs in LADDERS.items():
        cap = knobs.max_num_seqs if name == "max_num_active_seqs" else knobs.max_model_len
        kept = tuple(rung for rung in rungs if rung <= cap)
        auto = kept[-1] if name == "hbm_budget" else None  # with room for it, all that there is
        ladders.append(Ladder(name=name, rungs=kept, auto_rung=auto))
    space = SearchSpace(default=knobs, ladders=tuple(ladders))
    assert len(list(space.points())) <= MAX_POINTS, "the grid is to be exhausted"
    return space


async def serve_grid(bench: Bench, file: Path, *, part: int, num_parts: int) -> None:
    space = grid_space(bench)
    done = [row["values"] for row in read_rows(file, "point")]
    points = [space.decode(point) for point in space.points()]
    for values in share(points, part=part, num_parts=num_parts):
        if values not in done:
            row = await bench.windows(values, num=NUM_WINDOWS)
            append(file, {"kind": "point", "values": values} | row)


async def search(bench: Bench, file: Path, *, num_trials: int, seed: int) -> Values:
    """Trials up to ``num_trials``, and what the search recommends by them."""
    space = grid_space(bench)
    model = search_model(
        bench.plan,
        bench.workload,
        objective=Objective.THROUGHPUT,
        slo=Slo(),
        calibration=bench.engine.calibration,
    )
    backend = ConstrainedSearch(space=space, seed=seed, prior=model.prior, memory=model.memory)
    start = space.decode(space.encode({}))
    rows = read_rows(file, "trial")
    while len(rows) < num_trials:
        observed = [observation(row) for row in rows]
        left = num_trials - len(rows)
        asked = backend.suggest(observed, incumbent=start, num_left=left) if rows else None
        if rows and asked is None:
            break
        values = asked.values if asked else start
        row = {"kind": "trial", "values": values} | await bench.windows(values, num=NUM_WINDOWS)
        append(file, row)
        rows.append(row)
    return backend.recommend([observation(row) for row in rows], incumbent=start).values


def observation(row: Row) -> Observation:
    """What the search learns of a trial; a failed one gave nothing, of a load that others bear."""
    value = score(row)
    return Observation(values=row["values"], objective=math.log(value or 1e-9))


async def take_turns(bench: Bench, file: Path, *, pair: Mapping[str, Values], num: int) -> None:
    """Both configurations in other arrival orders, A B B A; the same one has no turns to take."""
    for turn in range(len(read_rows(file, "turn")), num):
        row: Row = {"kind": "turn", "values": dict(pair)}
        for name in ("recommended", "best") if turn % 2 == 0 else ("best", "recommended"):
            (row[name],) = (await bench.windows(pair[name], num=1, order=1 + turn))["scores"]
        append(file, row)


def run_workers(options: argparse.Namespace, *, left_s: float) -> None:
    """Serve the grid by processes of this script, each on its own cores, for ``left_s``."""
    command = [sys.executable, *sys.argv]
    at = command.index("--") if "--" in command else len(command)
    workers = []
    for part in range(options.workers):
        own = [*command[:at], "--part", str(part), *command[at:]]
        workers.append(subprocess.Popen(own))
    deadline_s = time.monotonic() + left_s
    for worker in workers:
        try:
            worker.wait(timeout=max(0.1, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.terminate()
            worker.wait()


def pin(options: argparse.Namespace, *, part: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    own = cores_of(cores, part=part, num_parts=options.workers)
    os.sched_setaffinity(0, own)
    os.environ["OMP_NUM_THREADS"] = str(len(own))


async def work(options: argparse.Namespace, *, left_s: float) -> Row | None:
    """One worker's share of the grid, or, without a part, all that comes after; None: a worker."""
    (header,) = read_rows(options.rows, "workload")
    workload = msgspec.convert(header["workload"], Workload)
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(options.model, directory, options.flags, trial_s=options.window_s * 2)
        try:
            async with asyncio.timeout(left_s):
                await bench.prepare(workload)
                if options.part is not None:
                    await serve_grid(
                        bench, options.rows, part=options.part, num_parts=options.workers
                    )
                    return None
                chosen = await search(
                    bench, options.rows, num_trials=options.trials, seed=options.seed
                )
                pair = {
                    "recommended": chosen,
                    "best": best(read_rows(options.rows, "point"))["values"],
                }
                if pair["recommended"] != pair["best"]:
                    await take_turns(bench, options.rows, pair=pair, num=options.turns)
                return summary(options.rows, pair)
        finally:
            await bench.close()


def summary(file: Path, pair: Mapping[str, Values]) -> Row:
    points, turns = read_rows(file, "point"), read_rows(file, "turn")
    same = pair["recommended"] == pair["best"]
    if not same and any(turn[name] is None for turn in turns for name in pair):
        raise SystemExit("a window of the turns failed; drop its row and run again")
    value = 0.0 if same else regret(turns)
    return {
        **pair, "regret": value, "target": TARGET, "is_met": value <= TARGET, "points": points,
        "trials": read_rows(file, "trial"), "turns": turns,
    }  # fmt: skip


async def write_header(options: argparse.Namespace) -> None:
    """The workload, cut once for every worker by what one of them takes."""
    if read_rows(options.rows, "workload"):
        return
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(options.model, directory, options.flags, trial_s=options.window_s * 2)
        try:
            workload = await bench.prepare(None)
        finally:
            await bench.close()
    append(options.rows, {"kind": "workload", "workload": msgspec.to_builtins(workload)})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--window-s", type=float, default=9.0)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=540.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("flags", nargs="*", help="of sparsed start, after --: --name value")
    return parser.parse_args()


def main() -> None:
    options, started_s = parse_options(), time.monotonic()
    facts = environment()
    every_core = os.sched_getaffinity(0)
    pin(options, part=options.part or 0)
    result = None
    try:
        if options.part is None:
            asyncio.run(write_header(options))
            os.sched_setaffinity(0, every_core)
            run_workers(options, left_s=options.limit_s - (time.monotonic() - started_s))
            pin(options, part=0)
        left_s = options.limit_s - (time.monotonic() - started_s)
        result = asyncio.run(work(options, left_s=max(0.1, left_s)))
    except TimeoutError:
        raise SystemExit("not done: run the same command again") from None
    if result is not None:
        print(f"regret {result['regret']:.1%}, target {TARGET:.0%}")
        if options.output:
            options.output.write_text(json.dumps(facts | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
