"""Two loads in turns: an incumbent for each, against the best that one setting can do for both.

Run from the root: ``PYTHONPATH=benchmarks python benchmarks/regimes.py --output FILE``. The engine
is that of ``tuner_simulator.py``. The live tuner's own state machine (``tuner/rollout.py``) sees a
window every four seconds, with contexts of requests that are drawn, and is told nothing of the load.
Only hot knobs change. The incumbents are what the search recommends for each load from noisy
windows, put in once their regime is known, as an accepted test does.

Everything is judged by the truth: goodput within all limits, over that of the best hot knobs for
the load of the moment (the oracle, which switches at once), mean over time.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Final

from landscape import LOADS, Load
from report import environment
from tuner_simulator import AUTO_HBM_BUDGET, Simulator

from sparsed.core import Knobs, KnobValue, RolloutReason, Slo, Snapshot, TunerMode
from sparsed.profiler.context import ContextMeter
from sparsed.tuner.constrained import ConstrainedSearch
from sparsed.tuner.regimes import with_incumbent
from sparsed.tuner.rollout import advance
from sparsed.tuner.rollout_regime import live_values
from sparsed.tuner.rollout_state import Apply, Controls, Note, Rollout, RolloutRule, Settle, Ticked
from sparsed.tuner.space import SearchSpace, build_space

DEFAULT_ACTIVE_SEQS: Final = 8
NUM_TRIALS: Final = 80
WINDOW_S: Final = 4.0
INTERACTIVE: Final = Load(  # beside those of the searches, for a target that only few at once meet
    name="interactive",
    input_tokens=1000,
    output_tokens=200,
    ttft_s=0.3,
    tpot_s=0.012,
    default_active_seqs=DEFAULT_ACTIVE_SEQS,
)
ALL_LOADS: Final = (*LOADS, INTERACTIVE)
NUM_PHASES: Final = 6  # that count, after two that teach the regimes
LENGTH_SIGMA: Final = 0.5  # of the logarithm of lengths, over requests
OFFERED_FRAC: Final = 0.9  # of what the best setting serves
TARGET_OF_ORACLE: Final = 0.95
TARGET_OVER_STATIC: Final = 1.3

Values = Mapping[str, KnobValue]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One pair of loads. Figures are shares of the oracle; ``static_values``: the best single
    setting, chosen by the truth; ``at_once``: the incumbents, if a load were known as it comes;
    ``tuned_for_*``: one incumbent for both loads."""

    first: str
    second: str
    phase_s: float
    seed: int
    ours: float
    at_once: float
    best_static: float
    over_static: float
    default: float
    tuned_for_first: float
    tuned_for_second: float
    num_regimes: int
    num_switches: int
    num_wrong: int  # windows in which a settled regime was that of the other load
    num_windows: int
    static_values: Values
    incumbents: tuple[Values, Values]


@cache
def simulator_of(name: str) -> Simulator:
    """All loads from one default, so that one daemon can serve them."""
    load = next(load for load in ALL_LOADS if load.name == name)
    return Simulator(replace(load, default_active_seqs=DEFAULT_ACTIVE_SEQS))


def hot_space(simulator: Simulator) -> SearchSpace:
    default = simulator.space.default
    return build_space(default, auto_hbm_budget=AUTO_HBM_BUDGET, fixed=frozenset({"page_size"}))


@cache
def shares(name: str) -> dict[tuple[int, ...], float]:
    """Of every point of the hot knobs, over the best of them."""
    simulator = simulator_of(name)
    space = hot_space(simulator)
    found = {point: simulator.share(space.decode(point)) for point in space.points()}
    best = max(found.values())
    return {point: share / best for point, share in found.items()}


def share_of(name: str, values: Values) -> float:
    return shares(name)[hot_space(simulator_of(name)).encode(values)]


@cache
def find_incumbent(name: str, *, seed: int) -> Values:
    """What the search recommends for a load after ``NUM_TRIALS`` noisy windows."""
    simulator = simulator_of(name)
    space, page = hot_space(simulator), {"page_size": simulator.space.default.page_size}
    memory = simulator.memory_limit()
    search = ConstrainedSearch(
        space=space,
        seed=seed,
        memory=replace(memory, predict=lambda values: memory.predict({**page, **values})),
        prior=simulator.prior,
    )
    generator = random.Random(f"{name}:{seed}")
    incumbent = space.default_values
    observations = [simulator.measure(incumbent, generator=generator)]
    for num_left in range(NUM_TRIALS - 1, 0, -1):
        found = search.suggest(observations, incumbent=incumbent, num_left=num_left)
        if found is None:
            break
        observations.append(simulator.measure(found.values, generator=generator))
    return search.recommend(observations, incumbent=incumbent).values


def best_static(first: str, second: str) -> tuple[float, Values]:
    """The point that is best for both loads in equal parts."""
    one, other = shares(first), shares(second)
    point = max(one, key=lambda at: one[at] + other[at])
    return (one[point] + other[point]) / 2, hot_space(simulator_of(first)).decode(point)


class Daemon:
    """The state machine, an engine that obeys at once, and clients of one load at a time."""

    def __init__(self, knobs: Knobs, *, seed: int) -> None:
        self.rule = RolloutRule()
        self.state = Rollout(
            controls=Controls(mode=TunerMode.AUTO), base=live_values(knobs), good={}
        )
        self.knobs = knobs
        self.at = 0.0
        self.num_switches = 0
        self._meter = ContextMeter()
        self._draw = random.Random(seed)

    def window(self, load: Load, *, served: float, rate: float) -> None:
        """``served``: share that meets the targets, of ``rate`` requests a second; all finish."""
        self.at += WINDOW_S
        snapshot = self._snapshot(load, tokens_per_s=served * rate * load.output_tokens)
        context = self._meter.add(
            snapshot,
            input_tokens=self._lengths(load.input_tokens, rate),
            output_tokens=self._lengths(load.output_tokens, rate),
        )
        snapshot = replace(snapshot, context=context)
        event = Ticked(at=self.at, snapshot=snapshot)
        self.state, actions = advance(self.state, event, rule=self.rule, slo=Slo())
        for action in actions:
            if isinstance(action, Apply):
                self.knobs = self.knobs.with_values(action.values)
            elif isinstance(action, Note | Settle):
                self.num_switches += action.record.reason is RolloutReason.REGIME_SWITCHED

    def verify(self, values: Values) -> None:
        """What an accepted test leaves for the regime in force."""
        self.knobs = self.knobs.with_values(values)
        regimes = with_incumbent(
            self.state.regimes, live_values(self.knobs), at=self.at, versions={}
        )
        self.state = replace(self.state, regimes=regimes, good=live_values(self.knobs))

    def _lengths(self, middle: int, rate: float) -> Sequence[int]:
        count, spent_s = 0, self._draw.expovariate(1.0)
        while spent_s < rate * WINDOW_S:
            count, spent_s = count + 1, spent_s + self._draw.expovariate(1.0)
        return [
            max(1, round(self._draw.lognormvariate(0, LENGTH_SIGMA) * middle)) for _ in range(count)
        ]

    def _snapshot(self, load: Load, *, tokens_per_s: float) -> Snapshot:
        noise = self._draw.lognormvariate(0.0, 0.05)
        return Snapshot(
            ended_at=self.at,
            window_s=WINDOW_S,
            steps=50,
            step_p50_s=load.tpot_s,
            step_p95_s=load.tpot_s,
            step_p99_s=load.tpot_s,
            prompt_tokens_per_s=0.0,
            generated_tokens_per_s=max(1.0, tokens_per_s * noise),
            hot_hit_frac=None,
            misses_per_step=None,
            miss_bytes_per_step=None,
            h2d_bytes=0,
            d2h_bytes=0,
            h2d_gb_per_s=None,
            d2h_gb_per_s=None,
            attention_recall=None,
            num_running=self.knobs.max_num_active_seqs,
            num_waiting=0,
            hot_used_frac=0.5,
            dram_used_frac=0.5,
            working_set_pages=0,
            working_set_bytes=0,
            metadata_bytes=0,
            requests_finished=1,
            step_s=WINDOW_S,
            knobs=self.knobs,
        )


def play(first: str, second: str, *, phase_s: float, seed: int) -> Row:
    names = (first, second)
    incumbents = tuple(find_incumbent(name, seed=seed) for name in names)
    daemon = Daemon(simulator_of(first).space.default, seed=seed)
    regime_of: dict[str, int | None] = {}
    found: list[float] = []
    num_wrong = 0
    for phase in range(2 + NUM_PHASES):
        name = names[phase % 2]
        load = simulator_of(name).load
        rate = OFFERED_FRAC * simulator_of(name).optimum
        known: dict[Knobs, float] = {}
        for _ in range(round(phase_s / WINDOW_S)):
            if daemon.knobs not in known:
                known[daemon.knobs] = share_of(name, live_values(daemon.knobs))
            served = known[daemon.knobs]
            daemon.window(load, served=served, rate=rate)
            if phase >= 2:
                found.append(served)
                regimes = daemon.state.regimes
                others = {regime_of[other] for other in names if other != name}
                num_wrong += regimes.elsewhere is None and regimes.current in others
        if phase < 2:
            regime_of[name] = daemon.state.regimes.current
            daemon.verify(incumbents[phase])
    static, static_values = best_static(first, second)
    fixed = [
        fmean(share_of(name, values) for name in names)
        for values in (hot_space(simulator_of(first)).default_values, *incumbents)
    ]
    ours = fmean(found)
    return Row(
        first=first,
        second=second,
        phase_s=phase_s,
        seed=seed,
        ours=round(ours, 4),
        at_once=round(fmean(map(share_of, names, incumbents)), 4),
        best_static=round(static, 4),
        over_static=round(ours / static, 3),
        default=round(fixed[0], 4),
        tuned_for_first=round(fixed[1], 4),
        tuned_for_second=round(fixed[2], 4),
        num_regimes=len(daemon.state.regimes.known),
        num_switches=daemon.num_switches,
        num_wrong=num_wrong,
        num_windows=len(found),
        static_values=static_values,
        incumbents=(incumbents[0], incumbents[1]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--phase-hours", type=float, nargs="+", default=[1.0, 3.0, 6.0])
    options = parser.parse_args()
    rows = []
    for first, second in combinations([load.name for load in ALL_LOADS], 2):
        for hours in options.phase_hours:
            for seed in range(options.seeds):
                rows.append(play(first, second, phase_s=3600 * hours, seed=seed))
                print(rows[-1], flush=True)
    result = environment() | {
        "dwell_s": RolloutRule().dwell_s,
        "num_phases": NUM_PHASES,
        "targets": {"of_oracle": TARGET_OF_ORACLE, "over_static": TARGET_OVER_STATIC},
        "rows": [asdict(row) for row in rows],
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
