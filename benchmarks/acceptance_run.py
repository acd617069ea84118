"""The tests and the demo on this machine, recorded: what passed, how long it took, what was said.

For machines that the continuous checks never see, above all those with a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from report import environment

ROOT = Path(__file__).resolve().parents[1]
PYTEST = (sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider")
STEPS: dict[str, tuple[str, ...]] = {
    "gpu tests": (*PYTEST, "-m", "gpu", "-s", "tests"),
    "demo": (sys.executable, "examples/demo.py"),
    "other tests": (*PYTEST, "-m", "not gpu", "tests"),
}
PARALLEL_STEP = "other tests"  # those of a GPU share the one there is


def command_of(name: str, *, workers: int) -> tuple[str, ...]:
    """The command of a step; test files are dealt out to ``workers`` processes."""
    command = STEPS[name]
    if name != PARALLEL_STEP or workers == 1:
        return command
    return (*command, "-n", str(workers), "--dist", "loadfile")


def environment_of(name: str, *, workers: int, num_cpus: int) -> dict[str, str]:
    """What a step adds to the environment: processes that share the cores take a part each."""
    if name != PARALLEL_STEP or workers == 1:
        return {}
    quiet = "-p no:benchmark"  # a plugin that warns of parallel runs, and warnings are errors
    return {"OMP_NUM_THREADS": str(max(1, num_cpus // workers)), "PYTEST_ADDOPTS": quiet}


def run(name: str, *, limit_s: float, workers: int) -> dict[str, object]:
    """Run a step and keep its exit status, seconds, closing line, speeds and last lines."""
    print(f"=== {name}", flush=True)
    started_s = time.monotonic()
    lines: list[str] = []
    command = command_of(name, workers=workers)
    changes = environment_of(name, workers=workers, num_cpus=len(os.sched_getaffinity(0)))
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | changes,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
            if time.monotonic() - started_s > limit_s:
                process.kill()
    closing = [line for line in lines if re.search(r"\d+ (passed|failed)|All steps done", line)]
    return {
        "command": " ".join([*(f"{k}={v}" for k, v in changes.items()), "python", *command[1:]]),
        "exit_status": process.returncode,
        "seconds": round(time.monotonic() - started_s, 1),
        "closing_line": closing[-1] if closing else None,
        "speeds": [line.lstrip(".") for line in lines if "GB/s" in line and "seed" not in line],
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        "output": lines if name == "demo" else [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", nargs="*", choices=STEPS, default=list(STEPS))
    parser.add_argument("--limit-s", type=float, default=1800, help="of each step")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help=f"processes of the {PARALLEL_STEP}"
    )
    options = parser.parse_args()
    results = {
        name: run(name, limit_s=options.limit_s, workers=options.workers) for name in options.steps
    }
    options.output.write_text(json.dumps(environment() | {"steps": results}, indent=2) + "\n")
    sys.exit(any(result["exit_status"] for result in results.values()))


if __name__ == "__main__":
    main()
