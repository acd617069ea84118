"""What the continuous profiler costs: output tokens a second with it and without, in one run.

Run from the root, on a machine that does nothing else: ``PYTHONPATH=benchmarks python
benchmarks/profiler_overhead.py --output FILE.json -- --model dummy:tiny --device cpu``; what follows ``--``
are flags of ``sparsed start``. One daemon serves a fixed number of streams; the knob ``profiler`` goes on, off,
off, on, and in the next turn the other way round, with streams begun anew in each block. While it is on ``/metrics`` is read once a second. A stream's rate is that between its first and last
token of a block, so that no block ends in the middle of a step. Prints the share of throughput that the profiler takes and its
interval (signed ranks over the turns).
"""

from __future__ import annotations

import argparse
import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
from report import environment
from trace_replay import Daemon, running

from sparsed.controller.cli.session import connect
from sparsed.tuner.signed_rank import hodges_lehmann, upper_bound

TARGET: Final = 0.01
ALPHA: Final = 0.025
SETTLE_S: Final = 1.0  # after a switch
WARM_TOKENS: Final = 16
ORDER: Final = (True, False, False, True)
READY_S: Final = 120.0


def rate(times: Sequence[float], *, since_s: float, until_s: float) -> float:
    """Tokens a second of one stream between its first and its last token of a span."""
    inside = [at for at in times if since_s <= at < until_s]
    return (len(inside) - 1) / (inside[-1] - inside[0]) if len(inside) > 1 else 0.0


def cost(turns: Sequence[Sequence[tuple[bool, float]]]) -> dict[str, float]:
    """Share of throughput that is lost with the profiler on, and its 95 % interval."""
    logs = [_log_ratio(turn) for turn in turns]
    low, high = -upper_bound([-x for x in logs], alpha=ALPHA), upper_bound(logs, alpha=ALPHA)
    return {
        "cost_frac": 1 - math.exp(hodges_lehmann(logs)),
        "low_frac": 1 - math.exp(high),
        "high_frac": 1 - math.exp(low),
    }


def _log_ratio(turn: Sequence[tuple[bool, float]]) -> float:
    on = [math.log(value) for is_on, value in turn if is_on]
    off = [math.log(value) for is_on, value in turn if not is_on]
    return sum(on) / len(on) - sum(off) / len(off)


class Stream:
    """One completion, streamed until it is told to stop; when each of its tokens came."""

    def __init__(self, url: str, *, model: str, prompt: list[int], max_tokens: int) -> None:
        self.times: list[float] = []
        self._url = f"{url}/v1/completions"
        self._body = {
            "model": model, "prompt": prompt, "max_tokens": max_tokens, "stream": True,
            "ignore_eos": True,
        }  # fmt: skip
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=READY_S) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self.times.append(time.perf_counter())
                if self._stop.is_set():
                    return


@contextmanager
def streams(daemon: Daemon, options: argparse.Namespace) -> Iterator[list[Stream]]:
    """So many streams, all of which have begun to answer."""
    model = httpx.get(f"{daemon.url}/v1/models").json()["data"][0]["id"]
    prompt = [1 + at % 400 for at in range(options.prompt_tokens)]
    begun = [
        Stream(daemon.url, model=model, prompt=prompt, max_tokens=options.max_tokens)
        for _ in range(options.streams)
    ]
    try:
        deadline_s = time.perf_counter() + READY_S
        while any(len(one.times) < WARM_TOKENS for one in begun):
            if time.perf_counter() > deadline_s or not all(one.is_alive for one in begun):
                raise SystemExit("the streams did not begin: see the daemon's log")
            time.sleep(0.05)
        yield begun
    finally:
        for one in begun:
            one.stop()


def measure(
    daemon: Daemon, options: argparse.Namespace, *, order: Sequence[bool]
) -> list[tuple[bool, float]]:
    """One turn: whether the profiler was on, and the tokens a second of all streams. Each block has
    streams of its own, so that all have contexts of the same length."""
    found = []
    with connect(daemon.state_dir, write=True) as admin:
        for is_on in order:
            values = {"profiler": "on" if is_on else "off"}
            admin.set_knobs(values, validate_only=False, reason="its cost is measured")
            found.append((is_on, _block(daemon, options, scrapes=is_on)))
    return found


def _block(daemon: Daemon, options: argparse.Namespace, *, scrapes: bool) -> float:
    """Tokens a second of all streams."""
    with streams(daemon, options) as begun:
        time.sleep(SETTLE_S)
        since_s = time.perf_counter()
        _wait(daemon, seconds=options.block_s, scrapes=scrapes)
        until_s = time.perf_counter()
        if not all(one.is_alive for one in begun):
            raise SystemExit("a stream ended within a block; raise --max-tokens")
    return sum(rate(one.times, since_s=since_s, until_s=until_s) for one in begun)


def _wait(daemon: Daemon, *, seconds: float, scrapes: bool) -> None:
    until_s = time.perf_counter() + seconds
    while (left_s := until_s - time.perf_counter()) > 0:
        if scrapes:
            httpx.get(f"{daemon.url}/metrics").raise_for_status()
        time.sleep(max(0.0, min(1.0, left_s)))


def run(options: argparse.Namespace) -> dict[str, Any]:
    with running(options.flags) as daemon:
        measure(daemon, options, order=ORDER)  # compiles, records graphs, fills caches
        turns = []
        for number in range(options.turns):
            order = ORDER if number % 2 == 0 else [not is_on for is_on in ORDER]
            turns.append(measure(daemon, options, order=order))
            print(f"turn {number + 1}: {turns[-1]}", flush=True)
    return {"turns": turns, **cost(turns), "target_frac": TARGET}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=8000)
    parser.add_argument("--block-s", type=float, default=4.0)
    parser.add_argument("--turns", type=int, default=12, help="of four blocks; 6 at least")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("flags", nargs="*", help="of sparsed start, after --")
    options = parser.parse_args()
    result = run(options)
    print(
        f"the profiler takes {result['cost_frac']:.2%} of throughput "
        f"({result['low_frac']:.2%} to {result['high_frac']:.2%}); target {TARGET:.0%}"
    )
    options.output.write_text(json.dumps({**environment(), **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
