"""Goodput in the first 60 s of a daemon: from a stored profile, and from nothing.

Run from the root, on a machine that does nothing else: ``PYTHONPATH=src:benchmarks python
benchmarks/warm_start.py --profile FILE --output FILE``; about five minutes. ``--profile`` is what ``sparsed tune
--export FILE.json`` found on this machine, with these versions: of others it would be left out; without it, one is
made of ``--values``, which nobody verified. Two daemons serve the same closed loop of clients (``sparsed bench
serve``), each in a state directory of its own: one that finds the profile (warm), for 60 s and as long again, whose
second half is the final goodput; and one in mode auto that is to look for none (cold), for as long.
``--time-scale`` divides these times.

Prints the share of the final goodput that each reached in the first 60 s (target of warm: 90 %), and when
the cold one first reached 90 % for a sixth of the time, if it did. Goodput: requests that kept both targets,
by when they ended.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from report import environment
from scaled_daemon import Answer, serve_for
from trace_replay import running

from sparsed.core import Objective, Profile, ProfileKey, ProfileStatus, check_knob_values
from sparsed.tuner.export import ExportFormat, parse_profile, render_profile

SPARSED: Final = (sys.executable, "-m", "sparsed")
FIRST_S: Final = 60.0
START_S: Final = 10.0  # at most, until the load has begun
TARGET_FRAC: Final = 0.9
WINDOWS: Final = 6  # of the first time


def goodput(answers: Sequence[Answer], *, begin_s: float, end_s: float) -> float:
    """Requests a second that ended in [begin, end) and kept every target."""
    good = (begin_s <= item.ended_s < end_s and item.meets_slo for item in answers)
    return sum(good) / (end_s - begin_s)


def reached_s(rates: Sequence[float], *, window_s: float, wanted: float) -> float | None:
    """When the first window at ``wanted`` or more ended; None: none was."""
    return next((window_s * (i + 1) for i, rate in enumerate(rates) if rate >= wanted), None)


def profile_of(options: argparse.Namespace, *, key: ProfileKey) -> Profile:
    """The exported profile, or one of ``--values``; for this machine and model in either case."""
    if options.profile is not None:
        return replace(parse_profile(options.profile.read_text(encoding="utf-8")), key=key)
    given = dict(pair.split("=", 1) for pair in options.values)
    values = check_knob_values({name: int(value) for name, value in given.items()})
    return Profile(
        key=key,
        values=values,
        status=ProfileStatus.VERIFIED,
        workload="benchmarks/warm_start.py",
        objective=Objective.GOODPUT,
    )


def find_key(options: argparse.Namespace) -> ProfileKey:
    """Of a start with these options, as a profile would be looked up."""
    from sparsed.controller.config import load_config
    from sparsed.controller.startup import prepare

    flags = {"model": options.model, "device": options.device, "no_profile": True}
    config = load_config(flags=flags, environment={})
    return prepare(config, progress=lambda phase, frac: None).key


def store(profile: Profile, directory: Path) -> None:
    file = directory / "profile.json"
    file.write_text(render_profile(profile, format=ExportFormat.JSON), encoding="utf-8")
    command = (*SPARSED, "profile", "import", str(file), "--state-dir", str(directory))
    subprocess.run(command, check=True)


def measure(
    options: argparse.Namespace, *, profile: Profile | None, seconds: float
) -> dict[str, Any]:
    """Goodput by windows of one daemon that is ready, from the begin of the load on."""
    targets = ["--slo-ttft-ms", str(options.ttft_ms), "--slo-tpot-ms", str(options.tpot_ms)]
    flags = [options.model, "--device", options.device, *targets, *options.flags]

    def prepare(directory: Path) -> None:
        if profile is not None:
            store(profile, directory)

    with running(flags if profile else [*flags, "--no-profile"], prepare=prepare) as daemon:
        if profile is None:
            mode = (*SPARSED, "tuner", "auto", "--state-dir", str(daemon.state_dir))
            subprocess.run(mode, check=True, stdout=subprocess.DEVNULL)
        lengths = str(options.input_tokens), str(options.output_tokens)
        served = serve_for(
            daemon, seconds=seconds + START_S, clients=options.clients, lengths=lengths,
            targets=targets, num=options.max_requests,
        )  # fmt: skip
        took = daemon.status()["profile"]
    if served.summary["duration_s"] < seconds:
        raise SystemExit(f"the load began more than {START_S:.0f} s late: lower --max-requests")
    first_s = FIRST_S / options.time_scale
    window_s = first_s / WINDOWS
    rates = [
        goodput(served.answers, begin_s=i * window_s, end_s=(i + 1) * window_s)
        for i in range(round(seconds / window_s))
    ]
    return {
        "profile": took,
        "window_s": window_s,
        "goodput": rates,
        "first": goodput(served.answers, begin_s=0.0, end_s=first_s),
        "last_half": goodput(served.answers, begin_s=seconds / 2, end_s=seconds),
    }


def summarize(warm: dict[str, Any], cold: dict[str, Any]) -> dict[str, Any]:
    """Shares of the final goodput, which is that of the warm daemon's second half."""
    final = warm["last_half"]
    if not final:
        raise SystemExit("no request kept its targets: give others, or other --values")
    wanted = TARGET_FRAC * final
    return {
        "final_goodput": final,
        "warm_first_frac": warm["first"] / final,
        "cold_first_frac": cold["first"] / final,
        "cold_reached_s": reached_s(cold["goodput"], window_s=cold["window_s"], wanted=wanted),
        "warm_reached_s": reached_s(warm["goodput"], window_s=warm["window_s"], wanted=wanted),
        "meets_target": warm["first"] >= wanted,
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", type=Path, help="as sparsed tune --export FILE.json wrote it")
    parser.add_argument("--values", nargs="+", default=["max_num_active_seqs=2"])
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--max-requests", type=int, default=2000, help="more than a run can serve")
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=24)
    parser.add_argument("--ttft-ms", type=float, default=60_000.0)
    parser.add_argument("--tpot-ms", type=float, default=180.0)
    parser.add_argument("--time-scale", type=float, default=1.0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("flags", nargs="*", help="of sparsed start, after --")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    seconds = 2 * FIRST_S / options.time_scale
    profile = profile_of(options, key=find_key(options))
    warm = measure(options, profile=profile, seconds=seconds)
    cold = measure(options, profile=None, seconds=seconds)
    summary = summarize(warm, cold)
    result = environment() | {"summary": summary, "warm": warm, "cold": cold}
    print(json.dumps(summary, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
