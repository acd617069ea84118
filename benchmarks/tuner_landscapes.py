"""Searches against each other on simulated loads, at equal budget.

Run from the root: ``PYTHONPATH=benchmarks python benchmarks/tuner_landscapes.py --output FILE``.
Each search sees what an engine exports, with noise; it is judged by the truth of what it
recommends, and of all that it tried. ``landscape.py`` is the engine, ``tuner_simulator.py`` what
is seen of it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import Pool
from pathlib import Path
from statistics import fmean, median
from typing import Final

from landscape import LOADS
from report import environment
from scipy.stats import wilcoxon
from tuner_simulator import Simulator

from sparsed.core import KnobValue
from sparsed.tuner.beliefs import expect_nothing
from sparsed.tuner.constrained import ConstrainedSearch
from sparsed.tuner.policy import Crash, GridSearch, RandomSearch, SearchBackend
from sparsed.tuner.stock import StockSearch

NUM_TRIALS: Final = 40
NUM_SEEDS: Final = 10

Job = tuple[str, str, int, int]  # load, method, seed, number of trials
METHODS: Final = (
    "constrained",
    "kappa 2.5",
    "no roofline",
    "nothing known",
    "fills first",
    "skopt",
    "random",
    "grid",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """``share``: truth of what is recommended in the end, over the optimum. ``num_broken``: trials
    whose truth breaks a limit; ``num_seen_broken``: whose noisy figures do."""

    load: str
    method: str
    seed: int
    share: float
    num_broken: int
    num_out_of_memory: int
    num_seen_broken: int
    num_trials: int
    seconds: float
    values: Mapping[str, KnobValue]
    reason: str


def make_backend(method: str, *, simulator: Simulator, seed: int) -> SearchBackend:
    space = simulator.space
    constrained = ConstrainedSearch(
        space=space, seed=seed, memory=simulator.memory_limit(), prior=simulator.prior
    )
    backends: Mapping[str, SearchBackend] = {
        "constrained": constrained,
        "kappa 2.5": replace(constrained, kappa=2.5),
        "no roofline": replace(constrained, prior=expect_nothing),
        "nothing known": ConstrainedSearch(space=space, seed=seed),
        "fills first": replace(constrained, num_initial=8, kappa=1.3),
        "skopt": StockSearch(space=space, seed=seed),
        "random": RandomSearch(space=space, seed=seed),
        "grid": GridSearch(space=space, seed=seed),
    }
    return backends[method]


@cache
def simulator_of(name: str) -> Simulator:
    """Of a load by its name; made once in each process."""
    return Simulator(next(load for load in LOADS if load.name == name))


def run_search(job: Job) -> Run:
    """One search, with the default's trial first."""
    name, method, seed, num_trials = job
    simulator = simulator_of(name)
    backend = make_backend(method, simulator=simulator, seed=seed)
    generator = random.Random(f"{name}:{seed}")
    incumbent = simulator.space.default_values
    observations = [simulator.measure(incumbent, generator=generator)]
    started = time.perf_counter()
    for num_left in range(num_trials - 1, 0, -1):
        found = backend.suggest(observations, incumbent=incumbent, num_left=num_left)
        if found is None:
            break
        observations.append(simulator.measure(found.values, generator=generator))
    chosen = backend.recommend(observations, incumbent=incumbent)
    return Run(
        load=name,
        method=method,
        seed=seed,
        share=round(simulator.share(chosen.values), 4),
        num_broken=sum(simulator.share(item.values) == 0.0 for item in observations),
        num_out_of_memory=sum(item.crash is Crash.OOM_DEVICE for item in observations),
        num_seen_broken=sum(not item.is_feasible for item in observations),
        num_trials=len(observations),
        seconds=round(time.perf_counter() - started, 2),
        values=chosen.values,
        reason=chosen.reason,
    )


def compare(runs: Sequence[Run], ours: str, theirs: str) -> dict[str, object]:
    """Wilcoxon's signed-rank test over pairs of the same load and seed, two-sided."""
    shares = {(run.method, run.load, run.seed): run.share for run in runs}
    pairs = sorted((load, seed) for method, load, seed in shares if method == ours)
    gains = [shares[ours, *pair] - shares[theirs, *pair] for pair in pairs]
    return {
        "ours": ours,
        "theirs": theirs,
        "num_pairs": len(gains),
        "median_gain": round(median(gains), 4),
        "num_better": sum(gain > 0 for gain in gains),
        "num_worse": sum(gain < 0 for gain in gains),
        "p": float(wilcoxon(gains).pvalue) if any(gains) else 1.0,
    }


def summarize(runs: Sequence[Run]) -> list[dict[str, object]]:
    """A row a load and method."""
    rows: list[dict[str, object]] = []
    for load in LOADS:
        for method in METHODS:
            mine = [run for run in runs if (run.load, run.method) == (load.name, method)]
            if mine:
                shares = [run.share for run in mine]
                rows.append(
                    {
                        "load": load.name,
                        "method": method,
                        "share_median": round(median(shares), 3),
                        "share_min": min(shares),
                        "broken_mean": round(fmean(run.num_broken for run in mine), 1),
                        "broken_max": max(run.num_broken for run in mine),
                        "seen_broken_max": max(run.num_seen_broken for run in mine),
                        "out_of_memory": sum(run.num_out_of_memory for run in mine),
                        "trials_min": min(run.num_trials for run in mine),
                        "seconds_median": round(median(run.seconds for run in mine), 1),
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=NUM_TRIALS)
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    jobs = [
        (load.name, method, seed, options.trials)
        for method in options.methods
        for load in LOADS
        for seed in seeds
    ]
    runs: list[Run] = []
    with Pool(options.processes) as pool:
        for run in pool.imap(run_search, jobs):
            print(run, flush=True)
            runs.append(run)
    simulators = [simulator_of(load.name) for load in LOADS]
    rows = summarize(runs)
    tests = [
        compare(runs, ours, theirs)
        for ours in options.methods
        for theirs in ("skopt", "random")
        if theirs in options.methods and ours not in ("skopt", "random")
    ]
    result = environment() | {
        "num_trials": options.trials,
        "loads": [
            asdict(one.load)
            | {
                "optimum_requests_per_s": round(one.optimum, 4),
                "default_share": round(one.share(one.space.default_values), 4),
                "good_frac": round(one.frac_above(0.9), 5),
            }
            for one in simulators
        ],
        "rows": rows,
        "tests": tests,
        "runs": [asdict(run) for run in runs],
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in (*rows, *tests):
        print(row)


if __name__ == "__main__":
    main()
