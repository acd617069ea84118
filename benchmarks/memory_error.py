"""How far the memory that is planned on a GPU is from the most that a loaded daemon takes of it.

Run from the root, on a machine that does nothing else: ``PYTHONPATH=benchmarks python
benchmarks/memory_error.py --output FILE.json``. Every point (``--points``, values of knobs and of the load
with commas between them) starts a daemon, which is sized, not told how much it may take; requests of the
worst shapes fill its chunks, its batch and its tiers, some with logprobs, some with penalties. Says by point
what was predicted, the peak that the daemon tells, the peak that the driver tells, and who has it.
``--device cpu`` does the same where there is no device memory, so that nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

import httpx
from driver_memory import both_free, driver, phases
from report import environment
from trace_replay import Daemon, running

from sparsed.controller.config import load_config
from sparsed.controller.startup import StartPlan, prepare
from sparsed.core import GIB, KNOBS_BY_NAME
from sparsed.engine.workspace import Workspace, plan_workspace
from sparsed.tuner.roofline import HbmPeak, hbm_peak

MODEL: Final = {"cuda": "dummy:llama-3.1-8b", "cpu": "dummy:tiny"}
POINTS: Final = {
    "cuda": """
        kv_hbm_gib=18,prefill_chunk=2048,max_num_seqs=64,prompt=1024,requests=64
        kv_hbm_gib=6,prefill_chunk=2048,max_num_seqs=8,prompt=32000,requests=3
        kv_hbm_gib=40,prefill_chunk=32768,max_num_seqs=8,prompt=32768,requests=3
        kv_hbm_gib=18,prefill_chunk=8192,max_num_seqs=8,page_size=32,prompt=32768,requests=4
        kv_hbm_gib=6,prefill_chunk=8192,max_num_seqs=1,page_size=16,prompt=32768,requests=1
        prefill_chunk=8192,max_num_seqs=64,prompt=4096,requests=30
    """,
    "cpu": """
        kv_hbm_gib=0.05,prefill_chunk=256,max_num_seqs=4,prompt=600,requests=4
        kv_hbm_gib=0.05,prefill_chunk=512,max_num_seqs=1,page_size=16,prompt=700,requests=2
    """,
}
DRAM_GIB: Final = {"cuda": "18", "cpu": "0.1"}  # pinning more would take most of the time
LOAD: Final = {"prompt": 512, "requests": 1, "output": 32}  # what of a point is no knob
ALL_LOGPROBS: Final = 400  # tokens of a prompt whose every position is asked for
SETTLE_S: Final = 1.5  # the engine reports every second
REQUEST_S: Final = 200.0
MAX_ERROR: Final = 0.03
MAX_UNDER: Final = 0.01


@dataclass(frozen=True, kw_only=True)
class Point:
    """A configuration and what it is loaded with: prompts and outputs in tokens."""

    knobs: dict[str, str]
    prompt: int
    requests: int
    output: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """``name=value,...``; ValueError naming what is neither a knob nor of the load."""
        pairs = dict(pair.split("=", 1) for pair in text.split(","))
        if unknown := pairs.keys() - KNOBS_BY_NAME.keys() - LOAD.keys():
            raise ValueError(f"{text}: no such knob: {', '.join(sorted(unknown))}")
        load = {name: int(pairs.pop(name, default)) for name, default in LOAD.items()}
        return cls(knobs=pairs, **load)

    def flags(self, options: argparse.Namespace) -> dict[str, str]:
        dram = DRAM_GIB[options.device.partition(":")[0]]
        named = {"model": options.model, "device": options.device, "kv_dram_gib": dram}
        return named | self.knobs


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Bytes of device memory that a daemon took as it was measured. ``phases``: of everybody, less
    what was in use before, at the end of each phase, the last of which is the load at its most;
    ``own_peak_bytes``: the driver's count for the engine alone, None where it has none."""

    told_bytes: int = 0  # the peak that the engine tells, 0 on a CPU
    weights_bytes: int = 0  # as loaded
    phases: dict[str, int] = field(default_factory=dict)
    own_peak_bytes: int | None = None
    failures: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int | None:
        return max(self.phases.values(), default=None)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One point, measured. ``context_bytes``: of a process that does nothing on the device."""

    point: Point
    predicted: HbmPeak
    workspace: Workspace  # what of it is neither weights nor KV memory
    seen: Seen
    context_bytes: int | None

    @property
    def error(self) -> float | None:
        """Predicted over measured, less one; below 0 it takes more than was planned."""
        told = self.seen.told_bytes
        return self.predicted.total_bytes / told - 1 if told else None

    def owners(self) -> dict[str, int | None]:
        """What was measured by owner; the parts of the KV memory are what they were given."""
        plan, seen = self.predicted, self.seen
        kv_bytes = plan.total_bytes - plan.workspace_bytes - plan.weights_bytes
        rest = seen.told_bytes - kv_bytes - seen.weights_bytes
        planned = {f"planned: {name[:-6]}": size for name, size in asdict(self.workspace).items()}
        return {
            "weights": seen.weights_bytes,
            "hot pages": plan.hot_pages_bytes,
            "summaries and tables": plan.summaries_bytes + plan.tables_bytes,
            "staging and prompt buffer": plan.staging_bytes + plan.prefill_buffer_bytes,
            "CUDA context": self.context_bytes,
            "the rest, context included": rest if seen.told_bytes else None,
            "the rest, as planned": plan.workspace_bytes,
            **planned,
        }

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"error_frac": self.error, "owners": self.owners()}


def start_plan(point: Point, options: argparse.Namespace) -> StartPlan:
    config = load_config(flags=dict(point.flags(options)), environment={}, file=None)
    return prepare(replace(config, no_profile=True), progress=lambda _phase, _frac: None)


def bodies(point: Point, *, model: str) -> Iterator[list[dict[str, Any]]]:
    """Requests by rounds, each sent at once: the batch full, then what the host samples."""
    plain = {"model": model, "max_tokens": point.output, "ignore_eos": True}

    def prompts(count: int, size: int) -> list[dict[str, Any]]:
        return [
            plain | {"prompt": [1 + (at * (number + 3)) % 400 for at in range(size)]}
            for number in range(count)
        ]

    yield prompts(point.requests, point.prompt)
    short = prompts(point.requests, min(point.prompt, ALL_LOGPROBS))
    yield [body | {"presence_penalty": 0.5, "logprobs": 5} for body in short]
    yield [short[0] | {"echo": True, "logprobs": 5}]


def load(daemon: Daemon, point: Point) -> list[str]:
    """Send it; what was refused or failed, in words."""
    model = httpx.get(f"{daemon.url}/v1/models").json()["data"][0]["id"]

    def send(body: dict[str, Any]) -> str | None:
        answer = httpx.post(f"{daemon.url}/v1/completions", json=body, timeout=REQUEST_S)
        return None if answer.status_code == 200 else f"{answer.status_code}: {answer.text[:200]}"

    failures = []
    with ThreadPoolExecutor(max_workers=max(1, point.requests)) as pool:
        for round_ in bodies(point, model=model):
            failures += [found for found in pool.map(send, round_) if found]
    time.sleep(SETTLE_S)
    return failures


def measure(point: Point, flags: list[str], *, index: int | None) -> Seen:
    """Start a daemon, load it, and end it; one that does not get ready is a failure."""
    with driver(index) as counts:
        before = counts.used_bytes()
        try:
            with running(flags) as daemon:
                ready_at, log = time.time(), daemon.state_dir / "daemon.log"
                used = phases(log, counts.samples, ready_at=ready_at)
                facts = daemon.status()["facts"]
                counts.pid = facts["pid"]
                failures = load(daemon, point)
                told = daemon.status()["stats"]["hbm_peak_bytes"]
                warnings = [line for line in log.read_text().splitlines() if " ERROR " in line]
        except (SystemExit, subprocess.CalledProcessError, httpx.HTTPError) as error:
            return Seen(failures=(f"no daemon: {error}",))
    loaded = [num_bytes for at, num_bytes in counts.samples if at > ready_at]
    if loaded:
        used["load"] = max(loaded)
    return Seen(
        told_bytes=told,
        weights_bytes=facts["weights_bytes"],
        phases={name: num_bytes - (before or 0) for name, num_bytes in used.items()},
        own_peak_bytes=counts.own_peak_bytes or None,
        failures=(*failures, *warnings),
    )


def gib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / GIB:.3f}"


def tell(row: Row) -> None:
    error = "not measured: no device memory" if row.error is None else f"error {row.error:+.2%}"
    print(f"\n{row.point}")
    print(
        f"GiB: predicted {gib(row.predicted.total_bytes)}, told by the engine "
        f"{gib(row.seen.told_bytes or None)}, by the driver {gib(row.seen.peak_bytes)} "
        f"(the engine alone {gib(row.seen.own_peak_bytes)}): {error}"
    )
    for owner, num_bytes in row.owners().items():
        print(f"  {owner:36}{gib(num_bytes):>9}")
    for phase, num_bytes in row.seen.phases.items():
        print(f"  in use after: {phase:22}{gib(num_bytes):>9}")
    for failure in row.seen.failures:
        print(f"  failed: {failure}")
    sys.stdout.flush()


def faults(rows: Sequence[Row]) -> list[str]:
    """Points beyond the target."""
    found = []
    for row in rows:
        found += [f"{row.point}: {failure}" for failure in row.seen.failures]
        if row.error is not None and not -MAX_UNDER <= row.error <= MAX_ERROR:
            found.append(f"{row.point}: {row.error:+.2%}")
    return found


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0", help="cuda:N or cpu")
    parser.add_argument("--model", help="default: a dummy of 8B, on a CPU a tiny one")
    parser.add_argument("--points", nargs="+", help="default: six on a GPU, two on a CPU")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    kind = options.device.partition(":")[0]
    options.model = options.model or MODEL[kind]
    options.points = [Point.parse(text) for text in options.points or POINTS[kind].split()]
    return options


def main() -> None:
    options = parse_options()
    kind, _, number = options.device.partition(":")
    index = None if kind == "cpu" else int(number or 0)
    free = both_free(index) if index is not None else {}
    print(f"free memory by both: {free}" if free else "on a CPU device memory is emulated")
    started_s, rows = time.monotonic(), []
    for point in options.points:
        plan, flags = start_plan(point, options), point.flags(options)
        words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        seen = measure(point, [*words, "--no-profile"], index=index)
        context_bytes = free.get("context_bytes")
        needed = plan_workspace(plan.spec.knobs, shape=plan.model.shape, dtype=plan.spec.dtype)
        row = Row(
            point=point,
            predicted=hbm_peak(plan.spec.plan, workspace_bytes=needed.total_bytes),
            workspace=needed,
            seen=seen,
            context_bytes=context_bytes,
        )
        tell(row)
        rows.append(row)
    result = environment() | {
        "free": free,
        "rows": [row.as_json() for row in rows],
        "seconds": time.monotonic() - started_s,
        "faults": faults(rows),
    }
    print(*faults(rows), sep="\n")
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(bool(result["faults"]))


if __name__ == "__main__":
    main()
