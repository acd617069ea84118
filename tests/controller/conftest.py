"""The smallest start plan, and a scripted daemon behind real sockets."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sparsed.controller.client import AdminClient
from sparsed.controller.config import DaemonConfig, load_config
from sparsed.controller.control import (
    DaemonState,
    DaemonStatus,
    Explanation,
    KnobSource,
    KnobState,
    LoadState,
    TriedChange,
    TunerState,
    TunerVerb,
)
from sparsed.controller.lookups import FindVerified
from sparsed.controller.recorder import Recorder
from sparsed.controller.servicer import AdminServers, serve
from sparsed.controller.startup import StartPlan, prepare
from sparsed.controller.state_dir import StateDir
from sparsed.core import (
    KNOB_SPECS,
    KNOBS_BY_NAME,
    Bound,
    Decision,
    DecisionState,
    EngineFacts,
    EngineStats,
    Evidence,
    InputError,
    KnobClass,
    Knobs,
    KnobValue,
    LinkProbe,
    MemoryPlan,
    Objective,
    Profile,
    ProfileKey,
    ProfileStatus,
    Remedy,
    RolloutReason,
    RolloutRecord,
    RolloutState,
    Snapshot,
    TunerMode,
    Verdict,
    WaitReason,
)
from sparsed.db.memory import InMemoryProfileStore

SMALL = {"model": "dummy:tiny", "device": "cpu", "kv_hbm_gib": 0.02, "kv_dram_gib": 0.05}
KNOBS = Knobs(
    token_budget=2048,
    hbm_budget=None,
    max_num_active_seqs=8,
    prefill_chunk=2048,
    page_size=32,
    sparse_method="cuboid-mean",
    dense_layers=0,
    max_num_seqs=8,
    kv_hbm_gib=0.5,
    kv_dram_gib=4.0,
    max_model_len=8192,
)
PLAN = MemoryPlan(
    weights_bytes=1,
    hot_pages_bytes=2,
    summaries_bytes=3,
    tables_bytes=4,
    staging_bytes=5,
    prefill_buffer_bytes=6,
    dram_pool_bytes=7,
    num_blocks=8,
    num_frames=9,
)
SNAPSHOT = Snapshot(
    ended_at=1.7e9,
    window_s=1.0,
    steps=20,
    step_p50_s=0.03,
    step_p95_s=0.04,
    step_p99_s=None,
    prompt_tokens_per_s=0.0,
    generated_tokens_per_s=33.3,
    hot_hit_frac=0.97,
    misses_per_step=16.0,
    miss_bytes_per_step=4096.0,
    h2d_bytes=1 << 40,
    d2h_bytes=0,
    h2d_gb_per_s=6.5,
    d2h_gb_per_s=None,
    attention_recall=0.99,
    num_running=1,
    num_waiting=0,
    hot_used_frac=0.5,
    dram_used_frac=0.25,
    working_set_pages=640,
    working_set_bytes=640 << 12,
    metadata_bytes=4096,
    requests_finished=3,
    knobs=KNOBS,
)
STATUS = DaemonStatus(
    state=DaemonState.SERVING,
    reasons=(),
    version="0.1.0",
    pid=4321,
    uptime_s=12.5,
    http_url="http://127.0.0.1:8000",
    model="dummy:tiny",
    device="cpu",
    dtype="float32",
    knobs=KNOBS,
    plan=PLAN,
    profile="none: no verified profile",
    engine_restarts=0,
    requests_failed=0,
    store_lost_writes=0,
    tuner_mode=TunerMode.OFF,
    facts=EngineFacts(
        pid=4322,
        device_name="cpu",
        weights_bytes=1,
        load_s=0.5,
        link=LinkProbe(h2d_bytes_per_s=1e10, d2h_bytes_per_s=1e10),
        versions={"torch": "2.13.0"},
    ),
    stats=EngineStats(steps=20, hot_used_bytes=1 << 29, recent_step_s=(0.03, 0.04), knobs=KNOBS),
    snapshot=SNAPSHOT,
)
EXPLANATION = Explanation(
    verdict=Verdict(
        bound=Bound.CAPACITY,
        reason="3 requests wait: whole requests do not fit the DRAM tier",
        share=0.9,
        limit=WaitReason.DRAM_TIER,
        evidence=(
            Evidence(name="mean step", value=0.0125, unit="s"),
            Evidence(name="link in use", value=0.25, unit="share"),
            Evidence(name="loaded over the link", value=12.5, unit="GB/s"),
        ),
        age_s=0.5,
        num_windows=3,
        left_out=("utilisation of the GPU",),
    ),
    remedies=(
        Remedy(knob="kv_dram_gib", up=True, why="more whole requests have frames"),
        Remedy(knob="token_budget", up=False, why="working sets shrink"),
        Remedy(knob=None, up=None, why="more memory"),
    ),
    advised=(
        Decision(
            made_at=1.7e9,
            values={},
            reason="no better point is known",
            predicted_score=None,
            current_score=None,
        ),
    ),
    tried=(
        TriedChange(
            decision_id=7,
            decided_at=1.7e9,
            state=DecisionState.REJECTED,
            values={"token_budget": 1024, "hbm_budget": None},
            words="rejected: no gain",
        ),
    ),
    rollouts=(
        RolloutRecord(
            state=RolloutState.REVERTED,
            reason=RolloutReason.SLO_BREACH,
            config_from={"prefill_chunk": 2048},
            config_to={"prefill_chunk": 4096},
            initiated_by="tuner",
            at=1.7e9,
        ),
    ),
)
PROFILE = Profile(
    key=ProfileKey(hardware="cpu:x:2:24GiB", model="dummy:tiny", dtype="float32"),
    values={"token_budget": 1024, "sparse_method": "quest", "hbm_budget": None, "kv_hbm_gib": 0.5},
    status=ProfileStatus.VERIFIED,
    workload="chat",
    objective=Objective.THROUGHPUT,
    default_scores=(10.0, 11.0, 12.0),
    winner_scores=(13.0, 14.0, 15.0),
    versions={"sparsed": "0.1.0"},
    created_at=1.7e9,
)


ROLLOUT = RolloutRecord(
    state=RolloutState.REVERTED,
    reason=RolloutReason.SLO_BREACH,
    config_from={"hbm_budget": None, "token_budget": 2048},
    config_to={"hbm_budget": 4096, "token_budget": 1536},
    initiated_by="auto",
    at=1.7e9,
)


class ScriptedControl:
    """A daemon without engine: knobs and modes are kept, drains wait for ``may_drain``."""

    def __init__(self) -> None:
        self.profiles = InMemoryProfileStore()
        self.profiles.save_profile(PROFILE)
        self.recorder = Recorder(clock=time.monotonic)
        self.now = STATUS
        self.pending: dict[str, KnobValue] = {}
        self.live: set[str] = set()
        self.changes: list[tuple[dict[str, KnobValue], str]] = []
        self.may_drain = threading.Event()
        self.may_drain.set()
        self.stops = 0
        self.step_s = 0.01
        self.is_engine_away = False
        self.explanation = EXPLANATION
        self.load = LoadState()
        self.pins: set[str] = set()
        self.verbs: list[TunerVerb] = []

    def status(self) -> DaemonStatus:
        return self.now

    async def explain(self) -> Explanation:
        return self.explanation

    def list_knobs(self) -> tuple[KnobState, ...]:
        return tuple(
            KnobState(
                spec=spec,
                value=getattr(self.now.knobs, spec.name),
                source=KnobSource.LIVE if spec.name in self.live else KnobSource.DEFAULT,
                pending=self.pending.get(spec.name),
            )
            for spec in KNOB_SPECS
        )

    async def set_knobs(
        self, values: Mapping[str, KnobValue], *, validate_only: bool, reason: str
    ) -> tuple[KnobState, ...]:
        self.now.knobs.with_values(values)
        if self.is_engine_away:
            raise InputError("the engine is not running; try again")
        if not validate_only:
            await asyncio.sleep(self.step_s)  # the next step boundary
            hot = {name for name in values if KNOBS_BY_NAME[name].klass is KnobClass.HOT}
            knobs = self.now.knobs.with_values({name: values[name] for name in hot})
            self.now = replace(self.now, knobs=knobs)
            self.live |= hot
            self.pending |= {name: values[name] for name in values if name not in hot}
            self.changes.append((dict(values), reason))
        return self.list_knobs()

    async def drain(self, *, timeout_s: float | None) -> int:
        self.now = replace(self.now, state=DaemonState.DRAINING)
        in_time = await asyncio.to_thread(self.may_drain.wait, timeout_s)
        return 0 if in_time else 2

    def request_stop(self) -> None:
        self.stops += 1

    def tuner(self, mode: TunerMode | None = None) -> TunerState:
        self.now = replace(self.now, tuner_mode=mode or self.now.tuner_mode)
        advice = Decision(
            made_at=1.7e9,
            values={"token_budget": 1024},
            reason="recall has room",
            predicted_score=12.0,
            current_score=None,
        )
        return TunerState(
            mode=self.now.tuner_mode,
            num_observations=7,
            decisions=(advice,),
            rollouts=(ROLLOUT,),
            pins=tuple(sorted(self.pins)),
            killed=self.verbs[-1:] == [TunerVerb.KILL],
            hold="too little traffic",
            explored_frac=0.025,
            load=self.load,
        )

    async def steer_tuner(
        self, verb: TunerVerb, *, knob: str, validate_only: bool, reason: str
    ) -> TunerState:
        if knob and knob not in KNOBS_BY_NAME:
            raise InputError(f"unknown knob {knob!r}; see: sparsed knobs list", field="knob")
        if not validate_only:
            self.verbs.append(verb)
            if verb is TunerVerb.PIN:
                self.pins.add(knob)
            elif verb is TunerVerb.UNPIN:
                self.pins.discard(knob)
        return self.tuner()


@dataclass(frozen=True, slots=True)
class Daemon:
    """A scripted control, served from an event loop in a thread of its own."""

    control: ScriptedControl
    place: StateDir
    run: Callable[[Any], Any]  # a coroutine, on the loop of the servers


@pytest.fixture
def control() -> ScriptedControl:
    return ScriptedControl()


@pytest.fixture
def place(tmp_path: Path) -> StateDir:
    (tmp_path / "run").mkdir()
    return StateDir(root=tmp_path, run_dir=tmp_path / "run")


@pytest.fixture
def daemon(control: ScriptedControl, place: StateDir) -> Iterator[Daemon]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(timeout=30)

    async def begin() -> AdminServers:
        return await serve(control, read_socket=place.read_socket, admin_socket=place.admin_socket)

    servers = run(begin())
    yield Daemon(control, place, run)
    control.may_drain.set()
    run(servers.stop())
    run(loop.shutdown_default_executor())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def client(daemon: Daemon) -> Iterator[AdminClient]:
    with AdminClient(daemon.place.admin_socket) as client:
        yield client


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., DaemonConfig]:
    """``configure(**flags)``: a configuration for the tiny model in a directory of its own."""

    def make(**flags: object) -> DaemonConfig:
        state_dir = tmp_path / "s"
        flags = SMALL | {"state_dir": str(state_dir)} | flags
        return load_config(flags=flags, environment={"HOME": str(tmp_path)})

    return make


@pytest.fixture
def plan_start(configure: Callable[..., DaemonConfig]) -> Callable[..., StartPlan]:
    """``plan_start(find_verified=..., **flags)``: what such a start comes to."""

    def make(*, find_verified: FindVerified | None = None, **flags: object) -> StartPlan:
        return prepare(
            configure(**flags), progress=lambda phase, frac: None, find_verified=find_verified
        )

    return make
