"""How often the acceptance test accepts nothing, and how often a true gain: simulated windows.

Log goodput of a window is the effect of its configuration, a drift that follows itself, noise, and
now and then a disturbance that takes a quarter. ``PYTHONPATH=src:benchmarks python
benchmarks/acceptance_power.py`` prints a table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import math
import operator
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

from report import environment
from targets import Target, print_targets, write_result

from sparsed.core import (
    AcceptanceRule,
    AcceptanceVerdict,
    AcceptanceWindow,
    DecisionState,
    Guard,
    KnobValue,
    Measurement,
    Objective,
    Slo,
    TrialStatus,
    WindowStage,
)
from sparsed.tuner.acceptance import decide
from sparsed.tuner.schedule import paired_slots
from sparsed.tuner.verification import NUM_CANDIDATES, Verification, offline_rule

RESULT = Path(__file__).parent / "results" / "acceptance-power.json"
PERSISTENCE = 0.92  # of the drift, from window to window
DRIFT_SD = 0.03
NOISE_SD = 0.04
DISTURBED_FRAC = 0.06
DISTURBED_LOG = math.log(0.75)
LATENCIES = (Guard.TTFT, Guard.TPOT)
CONFIDENCE = 0.95
ALONE = "goodput alone"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """``effect_frac``: true gain of the candidate in goodput. ``latency``: whether TTFT and TPOT
    are guarded, and gain as much or nothing. ``is_offline``: the candidate is the best of three,
    ranked first; the other two gain nothing."""

    words: str
    effect_frac: float
    drift_is_steps: bool = False
    latency: str = "not guarded"
    is_offline: bool = False


class Machine:
    """Logarithms of speed, window by window. ``drift_is_steps``: DRIFT_SD is the deviation of the
    drift's steps, not of the drift itself."""

    def __init__(self, *, seed: str, drift_is_steps: bool) -> None:
        self._random = random.Random(seed)
        shrink = math.sqrt(1.0 - PERSISTENCE**2)
        self._step_sd = DRIFT_SD if drift_is_steps else DRIFT_SD * shrink
        self._drift = self._random.gauss(0.0, self._step_sd / shrink)

    def next_window(self) -> float:
        """What drift and disturbance add to this window, without noise."""
        self._drift = PERSISTENCE * self._drift + self._random.gauss(0.0, self._step_sd)
        disturbed = self._random.random() < DISTURBED_FRAC
        return self._drift + (DISTURBED_LOG if disturbed else 0.0)

    def noise(self) -> float:
        return self._random.gauss(0.0, NOISE_SD)


def paired_verdict(scenario: Scenario, *, seed: str) -> AcceptanceVerdict:
    guarded = scenario.latency != "not guarded"
    rule = AcceptanceRule(guards=LATENCIES if guarded else ())
    windows = tuple(simulated_windows(scenario, rule=rule, seed=seed))
    return decide(windows, rule=rule, config_from=config(0), config_to=config(1))


def simulated_windows(
    scenario: Scenario, *, rule: AcceptanceRule, seed: str
) -> Iterator[AcceptanceWindow]:
    machine = Machine(seed=seed, drift_is_steps=scenario.drift_is_steps)
    gain = math.log1p(scenario.effect_frac)
    for number, slot in enumerate(paired_slots(rule.num_pairs)):
        common = machine.next_window()
        speed = common + gain * slot.is_candidate
        eased = speed if scenario.latency == "gain as much" else common
        metrics = {rule.metric: math.exp(speed + machine.noise())}
        metrics |= {guard.value: math.exp(machine.noise() - eased) for guard in LATENCIES}
        if not slot.is_discarded:
            yield AcceptanceWindow(
                number=number,
                stage=WindowStage.TEST,
                round=slot.pair,
                order=0,
                values=config(int(slot.is_candidate)),
                status=TrialStatus.OK,
                metrics=metrics,
            )


def offline_verdict(scenario: Scenario, *, seed: str) -> AcceptanceVerdict:
    """As ``sparsed tune`` verifies: three candidates, the first of which has the true gain."""
    machine = Machine(seed=seed, drift_is_steps=scenario.drift_is_steps)
    gains = {1: math.log1p(scenario.effect_frac)}

    def measure(values: Mapping[str, KnobValue], _order: int) -> Measurement:
        number = values["token_budget"]
        assert isinstance(number, int)
        speed = machine.next_window() + gains.get(number, 0.0) + machine.noise()
        return Measurement(
            duration_s=math.exp(-speed),
            output_tokens=1000,
            ttft_s=(1.0,),
            tpot_s=(1.0,),
            sparse_steps=0,
            attention_recall=None,
            hot_hit_frac=None,
            h2d_bytes=0,
            hot_peak_bytes=0,
        )

    slo = Slo(min_recall=0.5)
    verification = Verification(
        measure,
        objective=Objective.THROUGHPUT,
        slo=slo,
        rule=offline_rule(objective=Objective.THROUGHPUT, slo=slo),
        record=lambda window: None,
    )
    candidates = [config(number) for number in range(1, 1 + NUM_CANDIDATES)]
    return verification.run(config(0), candidates).verdict


def config(number: int) -> dict[str, KnobValue]:
    return {"token_budget": number}


class Interval(NamedTuple):
    low: float
    high: float


def binomial_interval(successes: int, trials: int) -> Interval:
    """At 95 %. Source: E. B. Wilson, Probable Inference, 1927."""
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    share, weight = successes / trials, z * z / trials
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / trials + weight / trials / 4) / (1 + weight)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def run(scenario: Scenario, *, num_decisions: int, seed: int) -> dict[str, Any]:
    judge = offline_verdict if scenario.is_offline else paired_verdict
    verdicts = [
        judge(scenario, seed=f"{seed} {scenario} {number}") for number in range(num_decisions)
    ]
    accepted = sum(verdict.state is DecisionState.ACCEPTED for verdict in verdicts)
    return {
        **asdict(scenario),
        "decisions": num_decisions,
        "accepted": accepted,
        "accepted_frac": accepted / num_decisions,
        "interval": binomial_interval(accepted, num_decisions),
        "reasons": dict(Counter(verdict.reason.value for verdict in verdicts).most_common()),
    }


def scenarios() -> list[Scenario]:
    found = []
    for words, changes in (
        (ALONE, {}),
        ("goodput, drift in steps of .03", {"drift_is_steps": True}),
        ("latencies gain as much", {"latency": "gain as much"}),
        ("latencies gain nothing", {"latency": "gain nothing"}),
        ("best of three, ranked first", {"is_offline": True}),
    ):
        found += [Scenario(words=words, effect_frac=gain, **changes) for gain in (0.0, 0.05)]
    found += [Scenario(words=ALONE, effect_frac=gain) for gain in (0.03, 0.1)]
    return found


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    print("| scenario | true gain | accepted | 95 % interval | other reasons |")
    print("|--|--|--|--|--|")
    for row in rows:
        others = {name: n for name, n in row["reasons"].items() if name != "accepted"}
        told = ", ".join(f"{name} {n / row['decisions']:.1%}" for name, n in others.items())
        low, high = row["interval"]
        print(
            f"| {row['words']} | {row['effect_frac']:.0%} | {row['accepted_frac']:.1%} | "
            f"{low:.1%} to {high:.1%} | {told} |"
        )


def targets_of(rows: Sequence[Mapping[str, Any]]) -> list[Target]:
    """Of the test itself; the other rows say what a harsher drift, guards and ranking cost."""
    alone = {row["effect_frac"]: row["accepted_frac"] for row in rows if row["words"] == ALONE}
    return [
        Target("false accepts without an effect", alone[0.0], operator.le, 0.05),
        Target("accepted of a true +5 %", alone[0.05], operator.ge, 0.8),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decisions", type=int, default=2000, help="of each row (2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = [
        run(scenario, num_decisions=options.decisions, seed=options.seed)
        for scenario in scenarios()
    ]
    print_rows(rows)
    targets = targets_of(rows)
    print_targets(targets)
    write_result(options.output, {**environment(), "seed": options.seed, "rows": rows}, targets)


if __name__ == "__main__":
    main()
