"""The tests and the demo on this machine, recorded: what passed, how long it took, what was said.

For machines that the continuous checks never see, above all those with a GPU.
"""

from __future__ import annotations

import argparse
import json
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


def run(name: str, limit_s: float) -> dict[str, object]:
    """Run a step and keep its exit status, seconds, closing line, speeds and last lines."""
    print(f"=== {name}", flush=True)
    started_s = time.monotonic()
    lines: list[str] = []
    with subprocess.Popen(
        STEPS[name], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
            if time.monotonic() - started_s > limit_s:
                process.kill()
    closing = [line for line in lines if re.search(r"\d+ (passed|failed)|All steps done", line)]
    return {
        "command": " ".join(["python", *STEPS[name][1:]]),
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
    options = parser.parse_args()
    results = {name: run(name, options.limit_s) for name in options.steps}
    options.output.write_text(json.dumps(environment() | {"steps": results}, indent=2) + "\n")
    sys.exit(any(result["exit_status"] for result in results.values()))


if __name__ == "__main__":
    main()
