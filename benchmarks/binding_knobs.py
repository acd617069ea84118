"""Three loads, each bound by another knob: does the tuner find it, change it, and keep the evidence?

Run from the root, on a machine that does nothing else: ``PYTHONPATH=benchmarks python benchmarks/binding_knobs.py
--output FILE.json``. *page_size* is searched by ``sparsed tune`` with every other knob fixed; *hbm_budget* and
*max_num_active_seqs* begin at a bad value and are changed by the live tuner in mode ``auto``, its durations
divided by ``--time-scale``, after a study that is cut off before its test. Whatever was accepted is then
served by hand in turns with the value before, A B B A. Prints knob, from, to, gain with its interval, and the
number of the decision; exits with 1 where a scenario has no accepted decision or a gain that is not there by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final

from cold_start import in_turns, set_knobs
from report import environment
from scaled_daemon import ask, load, scaled_daemon, study
from scipy.stats import t as student
from trace_replay import SPARSED

CONFIDENCE: Final = 0.95
METRIC: Final = "output_tokens_per_s"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """``start``: the bad value of the knob, None: the default; ``fixed``: flags that make it bind."""

    knob: str
    start: int | None
    is_hot: bool
    clients: int
    lengths: tuple[int, int]
    fixed: Mapping[str, str] = field(default_factory=dict)


SCENARIOS: Final = (
    Scenario(
        knob="page_size", start=None, is_hot=False, clients=4, lengths=(4096, 64),
        fixed={"token-budget": "512", "hbm-budget": "1024", "max-num-active-seqs": "4",
               "prefill-chunk": "2048"},
    ),
    Scenario(
        knob="hbm_budget", start=512, is_hot=True, clients=4, lengths=(4096, 64),
        fixed={"token-budget": "512", "max-num-active-seqs": "4", "prefill-chunk": "2048"},
    ),
    Scenario(
        knob="max_num_active_seqs", start=1, is_hot=True, clients=8, lengths=(512, 64),
        fixed={"token-budget": "512", "prefill-chunk": "2048"},
    ),
)  # fmt: skip


def interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Gain of ``after`` over ``before``, pair by pair, as a share: geometric mean and the 95 %
    limits of Student's t over the logarithms. ValueError with fewer than two pairs."""
    if len(before) != len(after) or len(before) < 2:
        raise ValueError(f"{len(before)} and {len(after)} turns: an interval takes two pairs")
    logs = [math.log(b / a) for a, b in zip(before, after, strict=True)]
    half = student.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    low, middle, high = (math.expm1(fmean(logs) + way * half) for way in (-1, 0, 1))
    return middle, low, high


def accepted(decisions: Sequence[Mapping[str, Any]], knob: str) -> Mapping[str, Any] | None:
    """The newest accepted decision that changed ``knob``; decisions come newest first."""
    for decision in decisions:
        changes = decision["config_from"].get(knob) != decision["config_to"].get(knob)
        if decision["verdict"]["state"] == "accepted" and changes:
            return decision
    return None


def flags_of(scenario: Scenario, options: argparse.Namespace) -> list[str]:
    pairs = {"model": options.model, "device": "cpu"} | dict(scenario.fixed)
    return [
        *(word for name, value in pairs.items() for word in (f"--{name}", value)),
        *options.flags,
    ]


def tune_live(scenario: Scenario, state_dir: Path, options: argparse.Namespace) -> None:
    flags = flags_of(scenario, options)
    study(state_dir, flags, num_trials=options.trials, search_s=options.study_s)
    with scaled_daemon(
        state_dir, flags, time_scale=options.time_scale, num_pairs=options.pairs
    ) as daemon:
        set_knobs(daemon, {scenario.knob: scenario.start})
        ask(state_dir, "tuner", "auto")
        load(
            daemon, seconds=60 * options.minutes, clients=scenario.clients,
            lengths=scenario.lengths, targets=[],
        )  # fmt: skip


def tune_offline(scenario: Scenario, state_dir: Path, options: argparse.Namespace) -> None:
    workload = state_dir / "workload.jsonl"
    row = {"timestamp": 0}
    row |= dict(zip(("input_length", "output_length"), scenario.lengths, strict=True))
    workload.write_text((json.dumps(row) + "\n") * scenario.clients)
    command = (
        *SPARSED, "tune", *flags_of(scenario, options), "--workload", str(workload),
        "--trials", "5", "--method", "grid", "--trial-seconds", str(options.trial_s),
        "--state-dir", str(state_dir),
    )  # fmt: skip
    subprocess.run(command, check=True)


def by_hand(
    scenario: Scenario, pair: Sequence[Any], state_dir: Path, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Tokens/s of both values, in turns; a knob of a restart takes a daemon each turn."""
    flags = [*flags_of(scenario, options), "--no-profile", "true"]
    serve = partial(
        scaled_daemon, state_dir, time_scale=options.time_scale, num_pairs=options.pairs
    )
    served = argparse.Namespace(
        turns=options.turns, clients=scenario.clients, lengths=scenario.lengths, metric=METRIC
    )
    names = ("before", "after")
    if scenario.is_hot:
        configs = {name: {scenario.knob: value} for name, value in zip(names, pair, strict=True)}
        with serve(flags=flags) as daemon:
            return in_turns(daemon, configs, served, targets=[])
    served.turns = 1
    found: dict[str, list[float]] = {name: [] for name in names}
    option = f"--{scenario.knob.replace('_', '-')}"
    for turn in range(options.turns):
        for at in (0, 1) if turn % 2 == 0 else (1, 0):
            with serve(flags=[*flags, option, str(pair[at])]) as daemon:
                found[names[at]] += in_turns(daemon, {"one": {}}, served, targets=[])["one"]
    return found


def play(scenario: Scenario, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        state_dir = Path(directory)
        (tune_live if scenario.is_hot else tune_offline)(scenario, state_dir, options)
        decisions = ask(state_dir, "decision", "list")
        found = accepted(decisions, scenario.knob)
        result: dict[str, Any] = {"knob": scenario.knob, "decisions": decisions, "decision": None}
        if found is None:
            return result
        pair = [found[side][scenario.knob] for side in ("config_from", "config_to")]
        turns = by_hand(scenario, pair, state_dir, options)
    gain, low, high = interval(turns["before"], turns["after"])
    return result | {
        "decision": found["decision_id"], "from": pair[0], "to": pair[1], "turns": turns,
        "gain": gain, "low": low, "high": high,
    }  # fmt: skip


def line(result: Mapping[str, Any]) -> str:
    if result["decision"] is None:
        return f"{result['knob']}: no accepted decision among {len(result['decisions'])}"
    return (
        f"{result['knob']}: {result['from']} -> {result['to']}, gain {result['gain']:+.1%} "
        f"({result['low']:+.1%} to {result['high']:+.1%}), decision {result['decision']}"
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    knobs = [scenario.knob for scenario in SCENARIOS]
    parser.add_argument("--scenarios", nargs="*", choices=knobs, default=knobs)
    parser.add_argument("--minutes", type=float, default=60.0, help="of live traffic each")
    parser.add_argument("--time-scale", type=float, default=20.0)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--study-s", type=float, default=300.0)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--trial-s", type=float, default=18.0, help="of the offline study")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--output", type=Path)
    parser.add_argument("flags", nargs="*", help="of sparsed start, after --: --name value")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    results = []
    for scenario in SCENARIOS:
        if scenario.knob in options.scenarios:
            results.append(play(scenario, options))
            print(line(results[-1]), flush=True)
    if options.output:
        result = environment() | {"scenarios": results}
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(any(item["decision"] is None or item["low"] <= 0 for item in results))


if __name__ == "__main__":
    main()
