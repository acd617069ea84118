"""How long a hot knob that went wrong stays in force: from the tripwire's decision to the engine's answer.

Run from the root, on a machine that does nothing else: ``PYTHONPATH=src:benchmarks python
benchmarks/revert_time.py --output FILE.json -- --model dummy:llama-3.1-8b --kv-hbm-gib 32 --max-num-seqs 16``.
A real daemon in mode ``auto`` has long prompts in progress all the time. An operator approves the same
candidate again and again; the moment it is in force more requests are sent than the queue may grow by, a
tripwire ends it, and the values before come back. The tuner's rule tests at once and lets what failed be
tried again, and contexts are left out of windows, so that no flood is another regime, which would end the
test before its tripwire does. Tripwires, windows and the way of the values are those of every daemon.

The seconds are the daemon's own (its log, and ``sparsed_tuner_revert_seconds_total``). What takes them is
the step that is under way: ``prefill_chunk`` says how long that may be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Final

from live_load import prepare_requests
from measured_windows import knob_flags
from regimes_live import daemon_config, point
from report import environment
from trace_replay import Daemon, running_as

from sparsed.controller.bench.client import LoadOptions, PreparedRequest, run_load
from sparsed.controller.bench.connection import parse_server
from sparsed.controller.bench.endpoint import Endpoint
from sparsed.controller.bench.preflight import find_model, reach
from sparsed.controller.bench.prompts import PromptMaker, TokenIds
from sparsed.controller.client import AdminClient
from sparsed.controller.config import DaemonConfig, load_config
from sparsed.controller.daemon import Daemon as ServingDaemon
from sparsed.controller.http_server import bind_port
from sparsed.controller.logs import ProgressLog, log_to_stderr
from sparsed.controller.lookups import open_or_remember
from sparsed.controller.startup import prepare
from sparsed.controller.state_dir import StateLock
from sparsed.core import RolloutReason, Snapshot, TunerMode, WorkloadRequest
from sparsed.tuner.rollout_state import RolloutRule, Values, live_rule

TARGET_S: Final = 1.0
UNDONE: Final = re.compile(r"tuner: undone in ([\d.]+) s \((\w+)\)")
APPROVE_PERIOD_S: Final = 0.2
LOOK_PERIOD_S: Final = 0.05
TIMEOUT_S: Final = 600.0


def hasty_rule(rule: RolloutRule) -> RolloutRule:
    """A candidate is tested at once and as often as it is approved; what trips it is unchanged."""
    return replace(
        rule,
        window_s=1.0,
        washout_s=0.1,
        cooldown_s=0.01,
        max_cooldown_s=0.01,
        quarantine_s=0.01,
        min_busy_s=1.0,
        min_busy_frac=0.01,
        max_explored_frac=1e6,
        slo_budget_frac=1.0,
    )


class ApprovedDaemon(ServingDaemon):
    """With an operator who approves ``values`` whenever nothing else is tested."""

    def _on_snapshot(self, snapshot: Snapshot) -> None:
        super()._on_snapshot(replace(snapshot, context=None))

    def approve(self, values: Values) -> None:
        self._tuner.set_mode(TunerMode.AUTO)
        self._approving = asyncio.create_task(self._approve(values))

    async def _approve(self, values: Values) -> None:
        while True:
            await asyncio.sleep(APPROVE_PERIOD_S)
            self._tuner._rollout.propose(values, initiated_by="operator")


async def serve(config: DaemonConfig, values: Values) -> None:
    """The life of ``sparsed start``, with the operator in it."""
    started_s = time.monotonic()
    log_to_stderr()
    with StateLock(config.state_dir, verb="start"), bind_port(config.host, config.port) as bound:
        store, fault = open_or_remember(config.state_dir)
        plan = await asyncio.to_thread(prepare, config, progress=ProgressLog())
        daemon = ApprovedDaemon(
            config,
            plan,
            store=store,
            store_fault=fault,
            started_s=started_s,
            rule=hasty_rule(live_rule(config.slo)),
        )
        daemon.approve(values)
        await daemon.serve(bound)
        store.close()


class Clients:
    """Long prompts without end, and a flood at the right moments."""

    def __init__(self, daemon: Daemon, options: argparse.Namespace, *, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._client = AdminClient(daemon.state_dir / "run" / "sparsed.sock")
        self._url = daemon.url
        self._options = options
        self.step_p99_s: list[float] = []  # of windows, while a candidate was in force
        self.hold = ""  # what the last candidate waits for

    async def run(self) -> int:
        """How many floods were sent."""
        options = self._options
        server = await reach(parse_server(self._url))
        model = (await find_model(server, wanted=None)).name
        path = Endpoint.COMPLETIONS.path
        load = LoadOptions(server=server, path=path, timeout_s=TIMEOUT_S)
        steady = replace(load, max_concurrency=options.steady)
        documents = self._requests(options.num_documents, options.input_len, model=model)
        flood = self._requests(options.flood, options.flood_len, model=model)
        under_way = asyncio.create_task(run_load(documents, options=steady))
        num_floods, until_s = 0, time.monotonic() + options.seconds
        while time.monotonic() < until_s and num_floods < options.reverts:
            if await self._is_in_force():
                sent = asyncio.create_task(run_load(flood, options=load))
                while await self._is_in_force() and time.monotonic() < until_s:
                    await asyncio.sleep(LOOK_PERIOD_S)
                sent.cancel()
                await sent
                num_floods += 1
            await asyncio.sleep(LOOK_PERIOD_S)
        under_way.cancel()
        await under_way
        self.hold = (await asyncio.to_thread(self._client.tuner)).hold
        self._client.close()
        return num_floods

    async def _is_in_force(self) -> bool:
        """A window has ended in which the candidate was, and it still is."""
        status = await asyncio.to_thread(self._client.status)
        if status.snapshot is None or status.snapshot.knobs is None:
            return False
        values = point(self._options.candidate)
        knobs = (status.knobs, status.snapshot.knobs)
        is_there = all(getattr(one, name) == values[name] for one in knobs for name in values)
        if is_there and status.snapshot.step_p99_s is not None:
            self.step_p99_s.append(status.snapshot.step_p99_s)
        return is_there

    def _requests(self, count: int, input_tokens: int, *, model: str) -> list[PreparedRequest]:
        one = WorkloadRequest(
            arrival_s=0.0, input_tokens=input_tokens, output_tokens=self._options.output_len
        )
        prompts = PromptMaker(ids=TokenIds.below(self._vocab_size), seed=input_tokens)
        return prepare_requests([one] * count, model=model, prompts=prompts, label="revert")


def reverts(log: str) -> list[dict[str, Any]]:
    """Those that the daemon tells, in their order."""
    return [{"seconds": float(one[1]), "reason": one[2]} for one in UNDONE.finditer(log)]


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of what a tripwire ended; None of nothing."""
    seconds = sorted(one["seconds"] for one in found)
    return {
        "num_reverts": len(seconds),
        "median_s": median(seconds) if seconds else None,
        "max_s": seconds[-1] if seconds else None,
        "target_s": TARGET_S,
        "is_met": bool(seconds) and seconds[-1] < TARGET_S,
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        state_dir = Path(directory)
        config = daemon_config(options.flags, state_dir=state_dir)
        vocab_size = prepare(config, progress=lambda phase, frac: None).model.vocab_size
        command = (sys.executable, __file__, "--serve", "--candidate", options.candidate, "--")
        log = state_dir / "daemon.log"
        try:
            with running_as(command, state_dir, options.flags) as daemon:
                clients = Clients(daemon, options, vocab_size=vocab_size)
                num_floods = asyncio.run(clients.run())
                status = daemon.status()
        finally:
            if options.log:
                shutil.copyfile(log, options.log)
        found = reverts(log.read_text())
    tripped = [one for one in found if one["reason"] == RolloutReason.QUEUE_GROWTH]
    steps = clients.step_p99_s
    return summary(tripped) | {
        "seconds": [one["seconds"] for one in tripped],
        "others": [one for one in found if one not in tripped],
        "num_floods": num_floods,
        "hold": clients.hold,
        "step_p99_s": {"median": median(steps), "max": max(steps)} if steps else None,
        "knobs": status["knobs"],
        "restarts": status["engine_restarts"],
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--candidate",
        default="max_num_active_seqs=12",
        metavar="KNOB=VALUE,...",
        help="one rung from what the daemon starts with",
    )
    parser.add_argument("--seconds", type=float, default=90.0, help="after the daemon is ready")
    parser.add_argument("--reverts", type=int, default=20, help="at most")
    parser.add_argument("--steady", type=int, default=2, help="long prompts under way")
    parser.add_argument("--input-len", type=int, default=32768)
    parser.add_argument("--output-len", type=int, default=4)
    parser.add_argument("--num-documents", type=int, default=200, help="long ones, at most")
    parser.add_argument("--flood", type=int, default=48, help="requests at once")
    parser.add_argument("--flood-len", type=int, default=4096)
    parser.add_argument("--log", type=Path, help="where the daemon's log is left")
    parser.add_argument("--output", type=Path)
    parser.add_argument("flags", nargs="*", help="of sparsed start, after --: --name value")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if options.serve:
        flags = knob_flags(options.flags)
        config = load_config(flags=flags, environment={}, file=None)
        asyncio.run(serve(config, point(options.candidate)))
        return
    result = run(options)
    text = json.dumps(environment() | result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
