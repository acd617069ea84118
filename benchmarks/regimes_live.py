"""Two loads in turns on a real daemon in mode ``auto``, which has what was verified for each in force.

Run from the root, on a machine that does nothing else: ``PYTHONPATH=src:benchmarks python
benchmarks/regimes_live.py --output FILE.json -- --model dummy:llama-3.1-8b --kv-hbm-gib 32``. One daemon
serves everything. First, with the tuner off, each setting serves a part of each load (``--probe``: only
that). Then, in mode ``auto``, the phases follow each other without a break; nothing is set by hand. What
is verified is in the store before the start, as an accepted test leaves it: a regime where each load will
lie, with its incumbent.

A *share* is of the requests that came, those within both targets, seen by the client. The oracle has the
better setting in every phase from its first second on, and the best static setting is one for all phases;
both by the shares of the first part. Shares over that of the oracle are averaged over time. Where a
switch comes ``d`` seconds into a phase, about ``d / total`` of the oracle are lost: the dwell bounds what
short traces can show.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from live_load import Load, Phase, Served, parse_load, serve
from measured_windows import knob_flags
from report import environment
from trace_replay import Daemon, running_in

from sparsed.controller.client import AdminClient
from sparsed.controller.config import DaemonConfig, load_config
from sparsed.controller.control import TunerState
from sparsed.controller.startup import StartPlan, prepare
from sparsed.core import KnobValue, Regime, RolloutReason, TunerMode
from sparsed.db import open_store
from sparsed.tuner.regimes import Regimes, in_words, place_of, with_incumbent
from sparsed.tuner.rollout_regime import LIVE_KNOBS, live_values

CHATS, DOCUMENTS = "chats", "documents"
# Measured on one H100 with the shape of an 8B model. Chats: 14 a second have tokens in 40 ms, of which 8
# come. Documents: 1.3 s of prompt and 64 steps of 8 ms, one after the other, are 0.57 a second, of which
# 0.4 come, two at once: beside the second prompt the first one's tokens take 28 ms and miss their target.
# So a setting for both loses half of the documents, or all chats.
LOADS: Final = {
    CHATS: "rate=8,burst=1,shape=1,input=384:640,output=96:160,ttft_ms=1000,tpot_ms=40",
    DOCUMENTS: "rate=0.4,burst=2,shape=16,input=32768,output=64,ttft_ms=6000,tpot_ms=20",
}
SETTINGS: Final = {
    CHATS: "max_num_active_seqs=64,prefill_chunk=2048",
    DOCUMENTS: "max_num_active_seqs=1,prefill_chunk=8192",
}
OF_ORACLE_TARGET: Final = 0.95
OVER_STATIC_TARGET: Final = 1.3
MAX_SHOWN: Final = 50  # steps of candidates that the daemon tells

Values = Mapping[str, KnobValue]
Cells = Mapping[str, Mapping[str, Served]]  # by setting and load


def compare(live: Sequence[Served], cells: Cells) -> dict[str, Any]:
    """The trace against the settings that were served by hand; None where nothing was in time."""
    total_s = sum(phase.seconds for phase in live)
    oracle = {load: max(cells[name][load].share for name in cells) for load in _loads(live)}
    if not all(oracle.values()):
        return {"oracle": oracle, "of_oracle": None, "over_static": None}

    def mean(shares: Sequence[float]) -> float:
        pairs = zip(live, shares, strict=True)
        return sum(one.seconds * share / oracle[one.load] for one, share in pairs) / total_s

    static = {name: mean([cells[name][one.load].share for one in live]) for name in cells}
    best, of_oracle = max(static, key=lambda name: static[name]), mean([one.share for one in live])
    return {
        "oracle": oracle,
        "of_oracle_by_phase": [round(one.share / oracle[one.load], 4) for one in live],
        "of_oracle": round(of_oracle, 4),
        "static": {name: round(share, 4) for name, share in static.items()},
        "best_static": best,
        "over_static": round(of_oracle / static[best], 4) if static[best] else None,
        "targets": {"of_oracle": OF_ORACLE_TARGET, "over_static": OVER_STATIC_TARGET},
    }


def steps(state: TunerState, phases: Sequence[Served], *, began_at: float) -> list[dict[str, Any]]:
    """What the live tuner did in the trace, oldest first, in seconds of it and of the phase."""
    found = []
    for record in reversed(state.rollouts):
        at_s = record.at - began_at
        phase = next((one for one in reversed(phases) if one.begin_s <= at_s), None)
        if phase is None:
            continue
        found.append(
            {
                "at_s": round(at_s, 2),
                "load": phase.load,
                "in_phase_s": round(at_s - phase.begin_s, 2),
                "reason": record.reason,
                "state": record.state,
                "values": dict(record.config_to),
                "regime": record.regime_id,
            }
        )
    return found


def verified_regimes(
    loads: Sequence[Load], values: Mapping[str, Values], *, versions: Mapping[str, str], seed: int
) -> tuple[Regime, ...]:
    """What accepted tests under these loads leave: a regime each, with its incumbent."""
    state, at = Regimes(), time.time()
    for number, load in enumerate(loads, start=1):
        place = place_of(load.context(seed=seed))
        assert place is not None
        known = Regime(
            regime_id=number, centroid=place, signature=in_words(place), seen_s=60.0, seen_at=at
        )
        state = replace(state, known=(*state.known, known), current=number)
        state = with_incumbent(state, values[load.name], at=at, versions=versions)
    return state.known


def point(text: str) -> dict[str, KnobValue]:
    """``NAME=VALUE,...`` as hot knobs; ValueError for what the live tuner never changes."""
    pairs = [item.partition("=") for item in text.split(",")]
    if unknown := [name for name, _, _ in pairs if name not in LIVE_KNOBS]:
        raise ValueError(f"{unknown} are no knobs of the live tuner; give any of {LIVE_KNOBS}")
    return {name: None if value == "auto" else int(value) for name, _, value in pairs}


def parse_phase(text: str, loads: Mapping[str, Load]) -> Phase:
    name, _, seconds = text.partition(":")
    if name not in loads or not float(seconds or 0) > 0:
        raise ValueError(f"--phases {text!r}: give LOAD:SECONDS, with one of {sorted(loads)}")
    return Phase(load=loads[name], seconds=float(seconds))


class Bench:
    """One daemon, its settings by name, and the loads."""

    def __init__(self, daemon: Daemon, plan: StartPlan, *, seed: int) -> None:
        self._daemon = daemon
        self._vocab_size = plan.model.vocab_size
        self._seed = seed
        self._num_served = 0

    def client(self, *, write: bool = False) -> AdminClient:
        run_dir = self._daemon.state_dir / "run"
        return AdminClient(run_dir / ("admin.sock" if write else "sparsed.sock"))

    def serve(self, phases: Sequence[Phase]) -> tuple[float, list[Served]]:
        """As ``live_load.serve``; no prompt is sent twice."""
        self._num_served += 1
        return serve(
            self._daemon.url,
            phases,
            vocab_size=self._vocab_size,
            seed=self._seed,
            prompt_seed=self._num_served,
        )

    def have(self, values: Values) -> None:
        with self.client(write=True) as client:
            client.set_knobs(values, validate_only=False, reason="a setting of the benchmark")

    def tuner(self, mode: TunerMode | None = None) -> TunerState:
        with self.client(write=mode is not None) as client:
            return client.tuner(mode)


def by_hand(
    bench: Bench,
    loads: Sequence[Load],
    settings: Mapping[str, Values],
    seconds: Mapping[str, float],
) -> dict[str, dict[str, Served]]:
    """Each setting under each load, the tuner off; a load's own setting comes last."""
    bench.tuner(TunerMode.OFF)
    bench.serve([Phase(load=replace(load, rate=load.burst), seconds=1.0) for load in loads])
    cells: dict[str, dict[str, Served]] = {name: {} for name in settings}
    for load in loads:
        for name in sorted(settings, key=lambda name: name == load.name):
            bench.have(settings[name])
            _, (served,) = bench.serve([Phase(load=load, seconds=seconds[load.name])])
            cells[name][load.name] = served
            show(name, cells[name][load.name])
    return cells


def live(bench: Bench, phases: Sequence[Phase]) -> dict[str, Any]:
    """The trace in mode ``auto``."""
    bench.tuner(TunerMode.AUTO)
    began_at, served = bench.serve(phases)
    state = bench.tuner(TunerMode.OFF)
    for one in served:
        show("live", one)
    told = steps(state, served, began_at=began_at)
    switched = [one for one in told if one["reason"] is RolloutReason.REGIME_SWITCHED]
    return {
        "phases": served,
        "steps": told,
        "num_switches": len(switched),
        "is_told_whole": len(state.rollouts) < MAX_SHOWN,
        "explored_frac": state.explored_frac,
        "regimes": state.load.regimes,
        "advice": [f"{dict(one.values) or 'hold'}: {one.reason}" for one in state.decisions],
    }


def show(name: str, served: Served) -> None:
    ttft, tpot = served.ttft, served.tpot
    print(
        f"{time.strftime('%H:%M:%S')} {name:>10} serves {served.load:<10} share {served.share:.3f} of "
        f"{served.num_requests} in {served.seconds:.0f} s, TTFT p50/p95 "
        f"{ttft.p50_ms if ttft else 0:.0f}/{ttft.p95_ms if ttft else 0:.0f} ms, TPOT "
        f"{tpot.p50_ms if tpot else 0:.1f}/{tpot.p95_ms if tpot else 0:.1f} ms, {dict(served.errors)}",
        flush=True,
    )


def settings_of(
    incumbents: Mapping[str, Values], base: Values, *, also: Sequence[str]
) -> dict[str, Values]:
    """All that are served by hand, by name; what is the same as another only once."""
    found = dict(incumbents)
    for name, values in {
        "default": base,
        **{text: {**base, **point(text)} for text in also},
    }.items():
        if values not in found.values():
            found[name] = values
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    loads = [parse_load(name, LOADS[name], getattr(options, name)) for name in (DOCUMENTS, CHATS)]
    phases = [parse_phase(text, {load.name: load for load in loads}) for text in options.phases]
    flags = ["--regime-dwell", f"{options.dwell_s:g}", *options.flags]
    with tempfile.TemporaryDirectory() as directory:
        config = daemon_config(flags, state_dir=Path(directory))
        plan = prepare(config, progress=lambda phase, frac: None)
        base = live_values(plan.spec.knobs)
        asked = {load.name: getattr(options, f"{load.name}_setting") for load in loads}
        incumbents = {name: base | point(text) for name, text in asked.items()}
        settings = settings_of(incumbents, base, also=options.also)
        remember(
            config,
            plan,
            verified_regimes(loads, incumbents, versions=plan.versions, seed=options.seed),
        )
        started_s = time.monotonic()
        try:
            with running_in(Path(directory), flags) as daemon:
                result: dict[str, Any] = {"start_s": time.monotonic() - started_s}
                result |= measure(
                    Bench(daemon, plan, seed=options.seed), loads, settings, phases, options
                )
                result["restarts"] = daemon.status()["engine_restarts"]
        finally:
            if options.log:
                shutil.copyfile(Path(directory) / "daemon.log", options.log)
    told = {"dwell_s": options.dwell_s, "loads": loads, "settings": settings}
    return result | told | {"seconds": time.monotonic() - started_s}


def measure(
    bench: Bench,
    loads: Sequence[Load],
    settings: Mapping[str, Values],
    phases: Sequence[Phase],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """By hand, then, unless that was all that was asked for, live."""
    seconds = {CHATS: options.chats_s, DOCUMENTS: options.documents_s}
    cells = by_hand(bench, loads, settings, seconds)
    if options.probe:
        return {"cells": cells}
    found = live(bench, phases)
    return {"cells": cells} | found | compare(found["phases"], cells)


def daemon_config(flags: list[str], *, state_dir: Path) -> DaemonConfig:
    asked = {"state_dir": str(state_dir)} | knob_flags(flags)
    return load_config(flags=asked, environment={}, file=None)


def remember(config: DaemonConfig, plan: StartPlan, regimes: Sequence[Regime]) -> None:
    """Before the daemon starts: a start reads what is verified, and nothing else does."""
    store = open_store(config.state_dir.database)
    store.keep_regimes(plan.key, regimes)
    store.close()


def plain(value: Any) -> Any:
    """For ``json``: values of ours as mappings."""
    return asdict(value)


def _loads(live: Sequence[Served]) -> set[str]:
    return {one.load for one in live}


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in (CHATS, DOCUMENTS):
        parser.add_argument(
            f"--{name}", default="", metavar="KEY=VALUE,...", help=f"over {LOADS[name]}"
        )
        parser.add_argument(
            f"--{name}-setting", default=SETTINGS[name], metavar="KNOB=VALUE,...",
            help=f"its incumbent (default: {SETTINGS[name]})",
        )  # fmt: skip
    parser.add_argument("--chats-s", type=float, default=12.0, help="by hand, each setting")
    parser.add_argument("--documents-s", type=float, default=25.0, help="by hand, each setting")
    parser.add_argument(
        "--also", nargs="*", default=[], metavar="KNOB=VALUE,...", help="more static settings"
    )
    parser.add_argument("--phases", nargs="+", default=["chats:150", "documents:240"])
    parser.add_argument("--dwell-s", type=float, default=20.0)
    parser.add_argument("--probe", action="store_true", help="only the settings by hand")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="where the daemon's log is left")
    parser.add_argument("--output", type=Path)
    parser.add_argument("flags", nargs="*", help="of sparsed start, after --: --name value")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_options()
    result = run(options)
    text = json.dumps(environment() | result, indent=1, default=plain)
    if options.output:
        options.output.write_text(text + "\n")
    shown = {name: value for name, value in result.items() if name not in ("phases", "cells")}
    print(json.dumps(shown, indent=1, default=plain))


if __name__ == "__main__":
    main()
