"""The live tuner from a cold start: what it makes of a daemon whose shipped default is bad for the load.

Run from the root, on a machine that does nothing else: ``PYTHONPATH=benchmarks python benchmarks/cold_start.py
--minutes 90 --time-scale 10 --output FILE.json -- --max-model-len 2048``. No trial is stored and no profile. A
daemon in mode ``auto`` whose durations are divided by ``--time-scale`` serves a steady number of clients; of its
busy time ``--explored-frac`` may be spent on candidates. At the end the values it came to, the shipped default and
each ``--grid`` point are set by hand and served in turns. Says the goodput over time, the ratio of the last to the
default, the share of exploring, and of the time below 0.9 of the incumbent (what was committed last): by what the
tests of candidates found, and, with all the noise of single windows, by tokens a second of windows that keep the
targets, means of ten seconds, in all and under other values. Knobs given after ``--`` are fixed. A scaled test has
shorter windows and so more noise than the shipped one.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final, NamedTuple, Self

from report import environment
from scaled_daemon import ask, scaled_daemon, serve_for, serve_once
from trace_replay import Daemon

from sparsed.controller.cli.session import connect
from sparsed.tuner.rollout_regime import LIVE_KNOBS
from sparsed.tuner.targets import missed

GAIN_TARGET: Final = 1.3
BELOW_FRAC: Final = 0.9
BELOW_TARGET: Final = 0.01
SMOOTH: Final = 10  # samples, a second each
TOLD: Final = ("config_from", "config_to", "decided_at", "verdict")


class Sample(NamedTuple):
    """``at``: seconds since the epoch; ``rate``: tokens/s, 0 where the window missed a target;
    ``knobs``: hot ones in force."""

    at: float
    rate: float
    knobs: Mapping[str, Any]


def below(
    samples: Sequence[Sample], commits: Sequence[tuple[float, Mapping[str, Any]]]
) -> tuple[float, float]:
    """Share of the samples whose mean over the last ten is under 0.9 of the incumbent: the median
    of what was measured under it since it was committed. Of all, with what disturbs the incumbent
    itself, and of those under other values than its own. ``commits``, in order: when, and what
    they changed; before the first one the incumbent is what ran first."""
    num_below = num_tried = 0
    coming, incumbent, usual = list(commits), dict(samples[0].knobs) if samples else {}, []
    for i, sample in enumerate(samples):
        while coming and coming[0][0] <= sample.at:
            incumbent |= coming.pop(0)[1]
            usual = []
        is_own = sample.knobs == incumbent
        recent = [one.rate for one in samples[max(0, i + 1 - SMOOTH) : i + 1]]
        if len(usual) >= SMOOTH and fmean(recent) < BELOW_FRAC * median(usual):
            num_below += 1
            num_tried += not is_own
        if is_own:
            usual.append(sample.rate)
    return num_below / max(1, len(samples)), num_tried / max(1, len(samples))


def committed(rollouts: Sequence[Mapping[str, Any]]) -> list[tuple[float, Mapping[str, Any]]]:
    """When the live tuner committed what, or took it back on probation, in order."""
    found, on_probation = [], None
    for one in sorted(rollouts, key=lambda one: one["at"]):
        if one["reason"] == "committed":
            on_probation = one["config_to"]
            found.append((one["at"], one["config_to"]))
        elif one["state"] == "reverted" and one["config_to"] == on_probation:
            found.append((one["at"], one["config_from"]))
    return found


def worse_frac(
    rollouts: Sequence[Mapping[str, Any]], decisions: Sequence[Mapping[str, Any]], *, seconds: float
) -> float:
    """Share of ``seconds`` that served candidates which gave less than 0.9 of the incumbent by the
    windows of their own test, of which every second one was theirs; a test that ended without a
    verdict counts as such. Free of the noise of single windows, unlike ``below``."""
    worse_s, began = 0.0, None
    for one in sorted(rollouts, key=lambda one: one["at"]):
        if one["reason"] == "canary":
            began = one
        elif began is not None and one["config_to"] == began["config_to"]:
            worse_s += 0.0 if _held_up(began, one, decisions) else (one["at"] - began["at"]) / 2
            began = None
    return worse_s / seconds


def _held_up(
    began: Mapping[str, Any], ended: Mapping[str, Any], decisions: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether the test between these two was decided, and gave 0.9 of the incumbent or more."""
    return any(
        one["config_to"] == began["config_to"]
        and began["at"] <= one["decided_at"] <= ended["at"] + 1.0
        and one["verdict"]["hl"] is not None
        and one["verdict"]["hl"] >= math.log(BELOW_FRAC)
        for one in decisions
    )


def told(decision: Mapping[str, Any]) -> dict[str, Any]:
    """A decision without its windows; ``kept``: of those in which each side met its targets."""
    sides = [
        [one["status"] == "ok" for one in decision["windows"] if one["values"] == decision[side]]
        for side in ("config_from", "config_to")
    ]
    return {name: decision[name] for name in TOLD} | {"kept": [sum(side) for side in sides]}


class Watch:
    """Samples the daemon every second beside the load."""

    def __init__(self, state_dir: Path) -> None:
        self.samples: list[Sample] = []
        self._state_dir = state_dir
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        with connect(self._state_dir) as client:
            while not self._end.wait(1.0):
                status = client.status()
                if status.snapshot is not None and status.snapshot.steps:
                    knobs = {name: getattr(status.knobs, name) for name in LIVE_KNOBS}
                    rate = status.snapshot.generated_tokens_per_s
                    in_time = not missed(status.snapshot, status.slo)
                    self.samples.append(Sample(time.time(), rate if in_time else 0.0, knobs))


def set_knobs(daemon: Daemon, values: Mapping[str, Any]) -> None:
    words = (f"{name}={'auto' if value is None else value}" for name, value in values.items())
    ask(daemon.state_dir, "knobs", "set", *words)


def hot_knobs(daemon: Daemon) -> dict[str, Any]:
    knobs = daemon.status()["knobs"]
    return {name: knobs[name] for name in LIVE_KNOBS}


def in_turns(
    daemon: Daemon, configs: Mapping[str, Mapping[str, Any]], options: Any, *, targets: list[str]
) -> dict[str, list[float]]:
    """Goodput of each configuration, one round a turn, the order reversed every other time."""
    found: dict[str, list[float]] = {name: [] for name in configs}
    for turn in range(options.turns):
        for name in list(configs)[:: 1 if turn % 2 == 0 else -1]:
            set_knobs(daemon, configs[name])
            summary = serve_once(
                daemon, clients=options.clients, lengths=options.lengths, targets=targets
            )
            found[name].append(summary[options.metric] or 0.0)  # None: nothing in time
    return found


def run(options: Any) -> dict[str, Any]:
    targets = [
        "--slo-ttft-ms", str(options.slo_ttft_ms), "--slo-tpot-ms", str(options.slo_tpot_ms),
    ]  # fmt: skip
    flags = ["--model", options.model, "--device", "cpu", *targets, *options.flags]
    with tempfile.TemporaryDirectory() as directory:
        state_dir = Path(directory)
        with scaled_daemon(
            state_dir,
            flags,
            time_scale=options.time_scale,
            num_pairs=options.pairs,
            explored_frac=options.explored_frac,
        ) as daemon:
            default, started_s = hot_knobs(daemon), time.monotonic()
            ask(state_dir, "tuner", "auto")
            with Watch(state_dir) as watch:
                served = serve_for(
                    daemon, seconds=60 * options.minutes, clients=options.clients,
                    lengths=options.lengths, targets=targets,
                )  # fmt: skip
            seconds, state = time.monotonic() - started_s, ask(state_dir, "tuner", "off")
            decisions = ask(state_dir, "decision", "list")
            configs = {"default": default, "converged": hot_knobs(daemon)}
            configs |= {text: default | point(text) for text in options.grid}
            turns = in_turns(daemon, configs, options, targets=targets)
    middle = {name: median(values) for name, values in turns.items()}
    best_point = max(middle.values())
    below_frac, tried_below_frac = below(watch.samples, committed(state["rollouts"]))
    return {
        "seconds": seconds, "configs": configs, "turns": turns,
        "served": served.summary,
        "gain": middle["converged"] / middle["default"] if middle["default"] else None,
        "gain_target": GAIN_TARGET,
        "of_best_point": middle["converged"] / best_point if best_point else None,
        "explored_frac": state["explored_frac"], "explored_limit": options.explored_frac,
        "below_frac": below_frac, "tried_below_frac": tried_below_frac,
        "worse_frac": worse_frac(state["rollouts"], decisions, seconds=seconds),
        "below_target": BELOW_TARGET, "hold": state["hold"], "advice": state["decisions"],
        "rollouts": state["rollouts"],
        "decisions": [told(one) for one in decisions],
    }  # fmt: skip


def point(text: str) -> dict[str, int | None]:
    """``name=value,...`` as knobs; ValueError for what is no hot knob."""
    pairs = [item.partition("=") for item in text.split(",")]
    if unknown := [name for name, _, _ in pairs if name not in LIVE_KNOBS]:
        raise ValueError(f"{unknown} are no hot knobs; give any of {LIVE_KNOBS}")
    return {name: None if value == "auto" else int(value) for name, _, value in pairs}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--time-scale", type=float, default=10.0)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--explored-frac", type=float, default=0.35)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--lengths", nargs=2, default=("48:80", "16:32"), metavar=("IN", "OUT"))
    parser.add_argument("--slo-ttft-ms", type=float, default=60_000.0)
    parser.add_argument("--slo-tpot-ms", type=float, default=200.0)
    parser.add_argument("--metric", default="goodput_requests_per_s")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--grid", nargs="*", default=[], metavar="NAME=VALUE,...")
    parser.add_argument("--output", type=Path)
    parser.add_argument("flags", nargs="*", help="of sparsed start, after --: --name value")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    result = environment() | run(options)
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
