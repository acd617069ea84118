"""A daemon whose live tuner lives faster: every duration of its rule divided, nothing else changed.

``PYTHONPATH=benchmarks python benchmarks/scaled_daemon.py --time-scale 20 --pairs 32 -- --port 8000 ...``
takes the flags of ``sparsed start`` after ``--``; the dwell of regimes is one of those. Windows are never shorter
than two reports of the engine, and what counts as stale stays three of them.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from measured_windows import knob_flags
from trace_replay import SPARSED, Daemon, running_as

from sparsed.controller.config import load_config
from sparsed.controller.daemon import run
from sparsed.tuner.rollout_state import RolloutRule, live_rule

SCALED: Final = (
    "window_s", "washout_s", "probation_s", "expiry_s", "cooldown_s", "max_cooldown_s",
    "quarantine_s", "slo_horizon_s", "min_busy_s",
)  # fmt: skip
MIN_WINDOW_S: Final = 2.0
STOP_S: Final = 60.0
MAX_REQUESTS: Final = 30_000  # of a load that goes by time
EXPLORED_FRAC: Final = RolloutRule().max_explored_frac  # as shipped


def scaled(
    rule: RolloutRule, *, time_scale: float, num_pairs: int, explored_frac: float
) -> RolloutRule:
    """``rule`` with its durations divided by ``time_scale``; ``num_pairs`` of windows a test, of
    which ``explored_frac`` of the busy time may be spent on candidates."""
    times = {name: getattr(rule, name) / time_scale for name in SCALED}
    times["window_s"] = max(MIN_WINDOW_S, times["window_s"])
    acceptance = replace(rule.acceptance, num_pairs=num_pairs)
    return replace(rule, acceptance=acceptance, max_explored_frac=explored_frac, **times)


class Answer(NamedTuple):
    """A request that ended, so many seconds after the begin of the load."""

    ended_s: float
    meets_slo: bool


@dataclass(frozen=True, kw_only=True)
class Served:
    """``summary`` as ``bench serve`` reports it."""

    summary: dict[str, Any]
    answers: list[Answer]


@dataclass(frozen=True, kw_only=True)
class Load:
    """A ``bench serve`` under way and what it writes into ``directory`` at its end."""

    process: subprocess.Popen[bytes]
    directory: Path

    def end(self) -> Served:
        stop(self.process)
        report = json.loads((self.directory / "result.json").read_text())
        with (self.directory / "requests.csv").open(newline="") as file:
            answers = [
                Answer(float(row["ended_s"]), row["meets_slo"] == "1")
                for row in csv.DictReader(file)
                if row["ended_s"] and not row["error"]
            ]
        return Served(summary=report["summary"], answers=answers)


def scaled_daemon(
    state_dir: Path,
    flags: list[str],
    *,
    time_scale: float,
    num_pairs: int,
    explored_frac: float = EXPLORED_FRAC,
) -> AbstractContextManager[Daemon]:
    """Running and ready; stopped at the end. Its log is ``daemon.log`` of ``state_dir``."""
    command = (
        sys.executable, __file__, "--time-scale", str(time_scale), "--pairs", str(num_pairs),
        "--explored-frac", str(explored_frac), "--",
    )  # fmt: skip
    return running_as(command, state_dir, flags)


def ask(state_dir: Path, *words: str) -> Any:
    """What a verb of ``sparsed`` says as JSON."""
    command = (*SPARSED, *words, "--state-dir", str(state_dir), "-o", "json")
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@contextmanager
def under_load(
    daemon: Daemon,
    *,
    clients: int,
    lengths: tuple[str, str],
    flags: Sequence[str] = (),
    num: int = MAX_REQUESTS,
) -> Iterator[Load]:
    """Keep ``clients`` requests under way without a pause, of ``num`` in all, until the block ends.
    ``lengths`` in tokens, of prompts and answers; ``flags``: of ``bench serve``, further ones."""
    with tempfile.TemporaryDirectory() as directory:
        command = bench_serve(daemon, num=num, clients=clients, lengths=lengths)
        command += ["--output-dir", directory, *flags]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield Load(process=process, directory=Path(directory))
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)  # it writes what it has
    process.wait(timeout=STOP_S)


def serve_for(
    daemon: Daemon,
    *,
    seconds: float,
    clients: int,
    lengths: tuple[str, str],
    targets: list[str],
    num: int = MAX_REQUESTS,
) -> Served:
    """What ``bench serve`` got in ``seconds``, its own start included; ``targets``: flags for
    goodput. SystemExit where ``num`` requests were too few for the time."""
    with under_load(daemon, clients=clients, lengths=lengths, flags=targets, num=num) as load:
        with suppress(subprocess.TimeoutExpired):
            code = load.process.wait(timeout=seconds)
            raise SystemExit(
                f"bench serve ended with {code} before the time was over; are {num} requests enough?"
            )
        return load.end()


def bench_serve(
    daemon: Daemon, *, num: int, clients: int, lengths: tuple[Any, Any], seed: int = 0
) -> list[str]:
    return [
        *SPARSED, "bench", "serve", "--url", daemon.url, "--num-prompts", str(num),
        "--request-rate", "inf", "--max-concurrency", str(clients), "--warmup", "0",
        "--input-len", str(lengths[0]), "--output-len", str(lengths[1]), "--seed", str(seed),
    ]  # fmt: skip


def serve_once(
    daemon: Daemon, *, clients: int, lengths: tuple[Any, Any], targets: list[str]
) -> dict[str, Any]:
    """The summary of one round of ``bench serve``, four requests for each client; ``targets``: its
    flags for goodput."""
    with tempfile.TemporaryDirectory() as directory:
        command = bench_serve(daemon, num=4 * clients, clients=clients, lengths=lengths)
        command += ["--output-dir", directory, *targets]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report = json.loads((Path(directory) / "result.json").read_text())
    summary: dict[str, Any] = report["summary"]
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--time-scale", type=float, required=True)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--explored-frac", type=float, default=EXPLORED_FRAC)
    parser.add_argument("flags", nargs="*")
    options = parser.parse_args()
    config = load_config(flags=knob_flags(options.flags), environment={}, file=None)
    rule = live_rule(config.slo, dwell_s=config.regime_dwell_s)
    rule = scaled(
        rule,
        time_scale=options.time_scale,
        num_pairs=options.pairs,
        explored_frac=options.explored_frac,
    )
    raise SystemExit(asyncio.run(run(config, rule=rule)))


if __name__ == "__main__":
    main()
