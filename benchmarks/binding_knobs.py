"""Three loads, each bound by another knob: does the tuner find it, change it, and keep the evidence?

Run from the root, on a machine that does nothing else: ``PYTHONPATH=benchmarks python benchmarks/binding_knobs.py
--output FILE.json``; ``--scenarios KNOB`` plays one. *page_size* is searched by ``sparsed tune`` with every other
knob fixed. *hbm_budget*, on a GPU, and *max_num_active_seqs* begin at a bad value under a steady load: a live
tuner in mode ``auto``, without trials, its durations divided by ``--time-scale``, is given until it has accepted a
change, ``--minutes`` at the most. ``--explored-frac`` of its time may go to candidates: by the default of 1 it tests
at once. Whatever was accepted is then served by hand in turns with the value before, A B B A. Prints knob, from,
to, gain with its interval, and the number of the decision; exits with 1 where a scenario has no accepted decision
or a gain that is not there by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final

from cold_start import set_knobs
from report import environment
from scaled_daemon import ask, scaled_daemon, under_load
from scipy.stats import t as student
from trace_replay import SPARSED, Daemon

from sparsed.core import KNOBS_BY_NAME, KnobClass

CONFIDENCE: Final = 0.95
IN_TIME: Final = {"slo-ttft-ms": "60000", "slo-tpot-ms": "5000"}  # latency is no object
POLL_S: Final = 5.0
VOCAB_SIZE: Final = 512  # of the smallest of the models


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """``start``: the bad value of the knob, None: the default; ``fixed``: flags that make it bind."""

    knob: str
    start: int | None
    clients: int
    lengths: tuple[str, str]
    num_requests: int  # more than are served
    fixed: Mapping[str, str]

    @property
    def is_hot(self) -> bool:
        return KNOBS_BY_NAME[self.knob].klass is KnobClass.HOT


SCENARIOS: Final = (
    Scenario(
        knob="page_size", start=None, clients=4, lengths=("7168", "256"),
        num_requests=10_000,
        fixed={"model": "dummy:tiny", "device": "cpu", "token-budget": "512", "hbm-budget": "1024",
               "max-num-active-seqs": "4", "prefill-chunk": "2048", "max-model-len": "7680"},
    ),
    Scenario(
        knob="hbm_budget", start=1024, clients=64, lengths=("1280", "512:1024"),
        num_requests=20_000,
        fixed=IN_TIME
        | {"model": "dummy:llama-3.1-8b", "device": "cuda:0", "token-budget": "1024",
           "max-num-active-seqs": "64", "max-num-seqs": "64", "kv-hbm-gib": "18",
           "kv-dram-gib": "24", "max-model-len": "2560"},
    ),
    Scenario(
        knob="max_num_active_seqs", start=1, clients=8, lengths=("96", "12"),
        num_requests=30_000,
        fixed=IN_TIME
        | {"model": "smollm2-135m", "device": "cpu", "token-budget": "512",
           "prefill-chunk": "2048", "max-model-len": "1024"},
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
    pairs = (word for name, value in scenario.fixed.items() for word in (f"--{name}", value))
    return [*pairs, *options.flags]


def tune_live(scenario: Scenario, state_dir: Path, options: argparse.Namespace) -> None:
    with serve(scenario, state_dir, options, flags=[]) as daemon:
        set_knobs(daemon, {scenario.knob: scenario.start})
        ask(state_dir, "tuner", "auto")
        with loaded(scenario, daemon):
            ends_s = time.monotonic() + 60 * options.minutes
            while time.monotonic() < ends_s:
                time.sleep(POLL_S)
                if accepted(ask(state_dir, "decision", "list"), scenario.knob):
                    return


def tune_offline(scenario: Scenario, state_dir: Path, options: argparse.Namespace) -> None:
    workload = state_dir / "workload.jsonl"
    lengths = dict(zip(("input_length", "output_length"), map(int, scenario.lengths), strict=True))
    workload.write_text((json.dumps({"timestamp": 0} | lengths) + "\n") * scenario.clients)
    no_floor = ("--min-recall", "0")  # the recall of random weights says nothing
    command = (
        *SPARSED, "tune", *flags_of(scenario, options), "--workload", str(workload),
        "--trials", "5", "--method", "grid", "--trial-seconds", str(options.trial_s),
        "--state-dir", str(state_dir), *no_floor,
    )  # fmt: skip
    subprocess.run(command, check=True)


def serve(
    scenario: Scenario, state_dir: Path, options: argparse.Namespace, *, flags: Sequence[str]
) -> AbstractContextManager[Daemon]:
    return scaled_daemon(
        state_dir, [*flags_of(scenario, options), "--regime-dwell", str(options.dwell_s), *flags],
        time_scale=options.time_scale, num_pairs=options.pairs,
        explored_frac=options.explored_frac,
    )  # fmt: skip


def loaded(scenario: Scenario, daemon: Daemon) -> AbstractContextManager[Any]:
    return under_load(
        daemon, clients=scenario.clients, lengths=scenario.lengths, num=scenario.num_requests,
        flags=["--vocab-size", str(VOCAB_SIZE)],
    )  # fmt: skip


def tokens_per_s(daemon: Daemon, *, settle_s: float, seconds: float) -> float:
    """Tokens a second that the daemon itself counts, once a change has settled."""
    time.sleep(settle_s)
    began_s, before = time.monotonic(), generated(daemon)
    time.sleep(seconds)
    return (generated(daemon) - before) / (time.monotonic() - began_s)


def generated(daemon: Daemon) -> int:
    count: int = daemon.status()["stats"]["generated_tokens"]
    return count


def by_hand(
    scenario: Scenario, pair: Sequence[Any], state_dir: Path, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Tokens/s of both values, in turns; a knob of a restart takes a daemon each turn."""
    names = ("before", "after")
    found: dict[str, list[float]] = {name: [] for name in names}
    times = {"settle_s": options.settle_s, "seconds": options.turn_s}
    turns = [at for turn in range(options.turns) for at in ((0, 1) if turn % 2 == 0 else (1, 0))]
    fresh = ["--no-profile", "true"]
    if scenario.is_hot:
        with serve(scenario, state_dir, options, flags=fresh) as daemon:
            ask(state_dir, "tuner", "off")
            with loaded(scenario, daemon):
                time.sleep(options.fill_s)
                for at in turns:
                    set_knobs(daemon, {scenario.knob: pair[at]})
                    found[names[at]].append(tokens_per_s(daemon, **times))
        return found
    option = f"--{scenario.knob.replace('_', '-')}"
    for at in turns:
        flags = [*fresh, option, str(pair[at])]
        with serve(scenario, state_dir, options, flags=flags) as daemon, loaded(scenario, daemon):
            found[names[at]].append(tokens_per_s(daemon, **times))
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
    knobs = [scenario.knob for scenario in SCENARIOS]
    parser.add_argument("--scenarios", nargs="*", choices=knobs, default=knobs)
    parser.add_argument("--minutes", type=float, default=15.0, help="of live traffic at the most")
    parser.add_argument("--time-scale", type=float, default=30.0)
    parser.add_argument("--dwell-s", type=float, default=20.0, help="of a regime")
    parser.add_argument("--explored-frac", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--trial-s", type=float, default=8.0, help="of the offline study")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--turn-s", type=float, default=10.0)
    parser.add_argument("--settle-s", type=float, default=4.0)
    parser.add_argument("--fill-s", type=float, default=20.0, help="before the first turn")
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
