"""A production trace replayed on the real daemon: does it answer everything, and give back what it took?

Run from the root, on a machine that does nothing else: ``PYTHONPATH=benchmarks python
benchmarks/trace_replay.py --output FILE``. Starts a daemon of the built-in model, sends the first slice of
``examples/traces/conversation.jsonl`` at a scaled rate (``sparsed bench serve``), then asks what is left:
requests, blocks, frames, and how much memory its processes have gained since half of the time, when both
tiers have been touched. Exits with 1 where a request failed but for a refusal that the daemon counts with
its reason, or anything was not given back.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
from report import environment

ROOT: Final = Path(__file__).resolve().parents[1]
SPARSED: Final = (sys.executable, "-m", "sparsed")
TRACE: Final = ROOT / "examples" / "traces" / "conversation.jsonl"
REFUSALS: Final = ("http_429", "http_503")  # with a reason and a time to come back
READY_S: Final = 300.0
SAMPLE_S: Final = 10.0
GIVEN_BACK: Final = (
    "num_running", "num_waiting", "num_spilled", "hot_used_bytes", "dram_used_bytes",
    "verify_mismatches",
)  # fmt: skip
KEPT: Final = (
    *GIVEN_BACK, "steps", "requests_finished", "prompt_tokens", "generated_tokens", "hot_hits",
    "hot_misses", "evicted_pages", "overflow_pages", "h2d_bytes", "d2h_bytes", "spills", "restores",
    "verify_checked_pages", "waits", "refusals",
)  # fmt: skip
MAX_GAIN: Final = 0.1  # of its memory: allocators keep what prompts of new lengths need


class Daemon:
    """A running daemon and the memory of its processes."""

    def __init__(self, process: subprocess.Popen[bytes], *, url: str, state_dir: Path) -> None:
        self.url = url
        self.state_dir = state_dir
        self._process = process

    def wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + READY_S
        while time.monotonic() < deadline_s and self._process.poll() is None:
            with suppress(httpx.TransportError):  # nobody listens yet
                if httpx.get(f"{self.url}/ready", timeout=5.0).status_code == 200:
                    return
            time.sleep(0.2)
        raise SystemExit("the daemon did not become ready")

    def status(self) -> dict[str, Any]:
        command = (*SPARSED, "status", "--state-dir", str(self.state_dir), "-o", "json")
        # Its exit status says whether the daemon is degraded, and the text is there all the same.
        text = subprocess.run(command, check=False, capture_output=True, text=True).stdout
        status: dict[str, Any] = json.loads(text)
        return status

    def own_bytes(self) -> int:
        """Memory that no other process shares: the pool, whose pages stay, is not in it."""
        root = psutil.Process(self._process.pid)
        return sum(one.memory_full_info().uss for one in (root, *root.children(recursive=True)))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def running(
    flags: list[str], *, prepare: Callable[[Path], None] = lambda state_dir: None
) -> Iterator[Daemon]:
    """A daemon that is ready, in a state directory that ``prepare`` has seen before it."""
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory))
        where = ("--port", str(free_port()), "--state-dir", directory)
        log = (Path(directory) / "daemon.log").open("wb")
        process = subprocess.Popen((*SPARSED, "start", *where, *flags), stdout=log, stderr=log)
        daemon = Daemon(process, url=f"http://127.0.0.1:{where[1]}", state_dir=Path(directory))
        try:
            daemon.wait_until_ready()
            yield daemon
        finally:
            process.terminate()
            process.wait(timeout=60)
            log.close()


def replay(daemon: Daemon, options: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    """Send the load; what ``bench serve`` reports, and the memory every ten seconds."""
    command = (
        *SPARSED, "bench", "serve", "--url", daemon.url, "--trace", str(TRACE),
        "--num-prompts", str(options.requests), "--time-scale", str(options.time_scale),
        "--max-input-len", str(options.max_input_len),
        "--max-output-len", str(options.max_output_len), "--output-dir", str(output_dir),
    )  # fmt: skip
    started_s, memory_bytes = time.monotonic(), []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as client:
        while client.poll() is None:
            time.sleep(SAMPLE_S)
            memory_bytes.append(daemon.own_bytes())
    seconds = time.monotonic() - started_s
    report = json.loads((output_dir / "result.json").read_text())
    summary, status = report["summary"], daemon.status()
    return {
        "seconds": seconds,
        "workload": report["workload"],
        "summary": {name: value for name, value in summary.items() if name != "client_lag"},
        "memory_bytes": memory_bytes,
        "restarts": status["engine_restarts"],
        "stats": {name: status["stats"][name] for name in KEPT},
    }


def faults(result: dict[str, Any]) -> list[str]:
    """What ought not to be: other failures than refusals, and what was not given back."""
    found = [
        f"{count} requests failed: {kind}"
        for kind, count in result["summary"]["errors"].items()
        if kind not in REFUSALS
    ]
    found += [f"{name}: {result['stats'][name]}" for name in GIVEN_BACK if result["stats"][name]]
    refused = sum(result["summary"]["errors"].get(kind, 0) for kind in REFUSALS)
    told = sum(item["count"] for item in result["stats"]["refusals"])
    if refused != told:
        found.append(f"{refused} refusals, of which the daemon counts {told}")
    if result["restarts"]:
        found.append(f"{result['restarts']} restarts of the engine")
    half, last = (result["memory_bytes"][place] for place in (len(result["memory_bytes"]) // 2, -1))
    if last - half > MAX_GAIN * half:
        found.append(f"{(last - half) / 1e6:.0f} MB more memory than after half of the time")
    return found


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--time-scale", type=float, default=0.065, help="of the trace's arrivals")
    parser.add_argument("--max-input-len", type=int, default=2048)
    parser.add_argument("--max-output-len", type=int, default=128)
    parser.add_argument("--output", type=Path)
    parser.add_argument("flags", nargs="*", help="of sparsed start, after --")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    with running(options.flags) as daemon, tempfile.TemporaryDirectory() as directory:
        result = environment() | replay(daemon, options, Path(directory))
    result["faults"] = faults(result)
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(bool(result["faults"]))


if __name__ == "__main__":
    main()
