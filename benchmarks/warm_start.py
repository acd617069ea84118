"""Goodput in the first 60 s of a daemon: from a stored profile, and from nothing.

Run from the root, on a machine that does nothing else: ``PYTHONPATH=src:benchmarks python
benchmarks/warm_start.py --profile FILE --output FILE``; about five minutes. ``--profile`` is what ``sparsed tune
--objective goodput --export FILE.json`` found on this machine, with these versions: of others it would be left
out; without it, one is made of ``--values``, which nobody verified. Two daemons serve the same closed loop of
clients, each in a state directory of its own: one that finds the profile (warm), for 60 s and as long again,
whose second half is the final goodput; and one in mode auto that finds nothing (cold), for as long.
``--time-scale`` divides these times.

Prints the share of the final goodput that each reached in the first 60 s (target of warm: 90 %), and when
the cold one first reached 90 % for a sixth of the time, if it did. Goodput: requests that kept both targets,
by when they ended.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any, Final

import httpx
from report import environment
from trace_replay import Daemon, running

from sparsed.core import Objective, Profile, ProfileKey, ProfileStatus, check_knob_values
from sparsed.tuner.export import ExportFormat, parse_profile, render_profile

SPARSED: Final = (sys.executable, "-m", "sparsed")
FIRST_S: Final = 60.0
TARGET_FRAC: Final = 0.9
WINDOWS: Final = 6  # of the first time


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Seconds; ``ended_s`` counts from the beginning of the load."""

    ended_s: float
    ttft_s: float
    tpot_s: float


def goodput(
    answers: Sequence[Answer], *, begin_s: float, end_s: float, ttft_s: float, tpot_s: float
) -> float:
    """Requests a second that ended in [begin, end) and kept both targets."""
    good = (
        begin_s <= item.ended_s < end_s and item.ttft_s <= ttft_s and item.tpot_s <= tpot_s
        for item in answers
    )
    return sum(good) / (end_s - begin_s)


def reached_s(rates: Sequence[float], *, window_s: float, wanted: float) -> float | None:
    """When the first window at ``wanted`` or more ended; None: none was."""
    return next((window_s * (i + 1) for i, rate in enumerate(rates) if rate >= wanted), None)


def ask(url: str, *, prompt: str, max_tokens: int, began_s: float) -> Answer | None:
    """None: it failed."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    sent_s, arrivals = time.monotonic(), []
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=600.0) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    arrivals.append(time.monotonic())
    except httpx.HTTPError:
        return None
    if not arrivals:
        return None
    return Answer(
        ended_s=arrivals[-1] - began_s,
        ttft_s=arrivals[0] - sent_s,
        tpot_s=(arrivals[-1] - arrivals[0]) / max(1, max_tokens - 1),
    )


def load(daemon: Daemon, options: argparse.Namespace, *, seconds: float) -> list[Answer]:
    """``--clients`` that each send the next request when the last is answered."""
    answers: list[Answer] = []
    began_s = time.monotonic()

    def run_client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() - began_s < seconds:
            prompt = " ".join(str(draw.randrange(1000)) for _ in range(options.input_words))
            answer = ask(
                daemon.url, prompt=prompt, max_tokens=options.output_tokens, began_s=began_s
            )
            if answer is not None:
                answers.append(answer)

    clients = [
        Thread(target=run_client, args=(number,), daemon=True) for number in range(options.clients)
    ]
    for client in clients:
        client.start()
    time.sleep(max(0.0, seconds - (time.monotonic() - began_s)))
    return list(answers)


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

    config = load_config(
        flags={"model": options.model, "device": "cpu", "no_profile": True}, environment={}
    )
    return prepare(config, progress=lambda phase, frac: None).key


def store(profile: Profile, directory: Path) -> None:
    file = directory / "profile.json"
    file.write_text(render_profile(profile, format=ExportFormat.JSON), encoding="utf-8")
    command = (*SPARSED, "profile", "import", str(file), "--state-dir", str(directory))
    subprocess.run(command, check=True)


def measure(
    options: argparse.Namespace, *, profile: Profile | None, seconds: float
) -> dict[str, Any]:
    """Goodput by windows of one daemon from when it is ready."""
    flags = [
        options.model, "--device", "cpu", "--slo-ttft-ms", str(options.ttft_ms),
        "--slo-tpot-ms", str(options.tpot_ms), *options.flags,
    ]  # fmt: skip

    def prepare(directory: Path) -> None:
        if profile is not None:
            store(profile, directory)

    with running(flags, prepare=prepare) as daemon:
        if profile is None:
            mode = (*SPARSED, "tuner", "auto", "--state-dir", str(daemon.state_dir))
            subprocess.run(mode, check=True, stdout=subprocess.DEVNULL)
        answers = load(daemon, options, seconds=seconds)
        took = daemon.status()["profile"]
    first_s = FIRST_S / options.time_scale
    limits = {"ttft_s": options.ttft_ms / 1e3, "tpot_s": options.tpot_ms / 1e3}
    window_s = first_s / WINDOWS
    rates = [
        goodput(answers, begin_s=i * window_s, end_s=(i + 1) * window_s, **limits)
        for i in range(round(seconds / window_s))
    ]
    return {
        "profile": took,
        "window_s": window_s,
        "goodput": rates,
        "first": goodput(answers, begin_s=0.0, end_s=first_s, **limits),
        "last_half": goodput(answers, begin_s=seconds / 2, end_s=seconds, **limits),
        "answers": [asdict(item) for item in answers],
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
    parser.add_argument("--profile", type=Path, help="as sparsed tune --export FILE.json wrote it")
    parser.add_argument("--values", nargs="+", default=["max_num_active_seqs=2"])
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--input-words", type=int, default=32)
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
