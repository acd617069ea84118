"""The daemon: startup, service, ordered shutdown; the only place that knows all."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import msgspec

from sparsed import __version__
from sparsed.controller import servicer
from sparsed.controller.config import DaemonConfig, write_pending
from sparsed.controller.control import (
    DaemonState,
    DaemonStatus,
    Explanation,
    KnobState,
    TunerState,
    TunerVerb,
)
from sparsed.controller.engine_link import EngineLink
from sparsed.controller.health import copy_reasons, state_of, store_reasons
from sparsed.controller.http.app import create_app
from sparsed.controller.http.context import HttpContext
from sparsed.controller.http_server import HttpServer, bind_port
from sparsed.controller.ledger import SHUTTING_DOWN
from sparsed.controller.links import keep_calibration
from sparsed.controller.live_tuner import LiveTuner
from sparsed.controller.logs import ProgressLog, log_plan, log_to_stderr
from sparsed.controller.lookups import open_or_remember
from sparsed.controller.recorder import Recorder
from sparsed.controller.recovery import recover, tuned_values
from sparsed.controller.signals import handle_signals, ignore_stops
from sparsed.controller.startup import StartPlan, check_next_start, load_tokenizer, prepare
from sparsed.controller.state_dir import StateLock
from sparsed.controller.telemetry import Senses, info_labels
from sparsed.controller.why import explain
from sparsed.core import ExitCode, KnobValue, Snapshot, StartError, TunerMode
from sparsed.db.store import ProfileStore, Store
from sparsed.db.writer import TelemetryWriter
from sparsed.profiler.export import Telemetry
from sparsed.tuner.rollout_state import RolloutRule

logger = logging.getLogger(__name__)


async def run(config: DaemonConfig, *, rule: RolloutRule | None = None) -> int:
    """The life of `sparsed start`; returns the exit code of a clean end. ``rule``: of the tuner.

    Errors: StartError and InputError, one line for the user each: what keeps it from starting,
    or an engine that cannot be kept alive.
    """
    started_s = time.monotonic()
    log_to_stderr()
    with StateLock(config.state_dir, verb="start"), bind_port(config.host, config.port) as bound:
        store, fault = open_or_remember(config.state_dir)
        try:
            await asyncio.to_thread(recover, store, at=time.time())
            plan = await asyncio.to_thread(
                prepare,
                config,
                progress=ProgressLog(),
                find_verified=store.find_verified,
                find_calibration=store.find_calibration,
                find_tuned=partial(tuned_values, store),
                find_profiles=store.list_profiles,
            )
            log_plan(plan)
            made = partial(Daemon, config, plan, store=store, started_s=started_s, rule=rule)
            await made(store_fault=fault).serve(bound)
        finally:
            ignore_stops()
            store.close()
    return ExitCode.OK


class Daemon:
    """Implements ``Control``. Lives on the event loop; one ``serve`` is its whole life."""

    def __init__(
        self,
        config: DaemonConfig,
        plan: StartPlan,
        *,
        store: Store,
        store_fault: str | None,
        started_s: float,
        rule: RolloutRule | None = None,
    ) -> None:
        self._config = config
        self._plan = plan
        self._store = store
        self._store_fault = store_fault
        self._started_s = started_s
        self._stop = asyncio.Event()
        self._hard_stop = asyncio.Event()
        self._writer = TelemetryWriter(store)
        self._tuner = LiveTuner(
            store,
            plan,
            config=config,
            apply=lambda values: self._engine.have(values),
            read_failures=lambda: self._engine.ledger.num_failed,
            read_facts=lambda: self._engine.facts,
            rule=rule,
        )
        horizon_s = config.context_horizon_s
        self._senses = Senses(
            self._telemetry, slo=config.slo, gpu_plan=plan.gpu_plan, horizon_s=horizon_s
        )
        self._engine = EngineLink(
            plan,
            run_dir=config.state_dir.run_dir,
            max_queued=config.max_queued_requests,
            senses=self._senses,
            on_snapshot=self._on_snapshot,
            on_lost=self._on_engine_lost,
        )

    # ---- life ------------------------------------------------------------------------------

    async def serve(self, bound: socket.socket) -> None:
        """Open every door, load the engine, serve until told to stop, drain, close in order.

        Errors: StartError when the engine cannot be loaded or kept alive.
        """
        handle_signals(stop=self.request_stop, log_status=self._log_status)
        async with AsyncExitStack() as stack:  # closed from the last line to the first
            stack.callback(self._writer.close)
            stack.push_async_callback(self._tuner.close)
            stack.push_async_callback(self._engine.stop)
            await self._open_admin(stack)
            http = await self._open_http(stack, bound)
            # However it ends, HTTP is still there to tell the clients.
            stack.callback(self._engine.ledger.cut_off_all, SHUTTING_DOWN)
            await self._until_stopped(http, stack)
            if self._engine.facts is not None:
                await self._drain_or_hurry()

    async def _until_stopped(self, http: asyncio.Task[None], stack: AsyncExitStack) -> None:
        """Wait for a stop; a part that ends by itself takes the daemon with it, loudly."""
        parts: set[asyncio.Task[Any]] = {
            http,
            asyncio.create_task(self._keep_engine(), name="engine"),
            asyncio.create_task(self._watch_host(), name="gauges"),
            asyncio.create_task(self._tuner.serve(), name="tuner"),
        }
        for part in parts - {http}:
            stack.push_async_callback(_cancel, part)
        stop: asyncio.Task[Any] = asyncio.create_task(self._stop.wait(), name="stop")
        stack.push_async_callback(_cancel, stop)
        done, _ = await asyncio.wait(parts | {stop}, return_when=asyncio.FIRST_COMPLETED)
        for part in done:
            part.result()
        if stop not in done:
            names = ", ".join(part.get_name() for part in done)
            raise StartError(f"{names} ended unasked", code=ExitCode.SOFTWARE)

    async def _keep_engine(self) -> None:
        facts = await self._engine.supervisor.start()
        await asyncio.to_thread(keep_calibration, self._store, facts.calibration)
        seconds = time.monotonic() - self._started_s
        name = self._model_ids[0]
        print(f"sparsed ready: model={name} {self._config.url} in {seconds:.1f} s", flush=True)
        await self._engine.supervisor.wait()

    async def _watch_host(self) -> None:
        device = self._plan.spec.device
        gpu_index = None if device == "cpu" else int(device.partition(":")[2])
        await self._senses.watch_host(self._engine.pids, gpu_index=gpu_index)

    async def _drain_or_hurry(self) -> None:
        drain = asyncio.create_task(self.drain(timeout_s=self._config.drain_timeout_s))
        hard_stop = asyncio.create_task(self._hard_stop.wait())
        _, waiting = await asyncio.wait({drain, hard_stop}, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            await _cancel(task)

    async def _open_http(self, stack: AsyncExitStack, bound: socket.socket) -> asyncio.Task[None]:
        server = HttpServer(create_app(self._http_context()), bound=bound)
        task = server.start()
        stack.push_async_callback(server.stop)
        return task

    async def _open_admin(self, stack: AsyncExitStack) -> None:
        read, admin = self._config.state_dir.read_socket, self._config.state_dir.admin_socket
        servers = await servicer.serve(self, read_socket=read, admin_socket=admin)
        stack.push_async_callback(servers.stop)

    def _log_status(self) -> None:
        logger.info("status: %s", msgspec.json.encode(self.status()).decode())

    # ---- Control ---------------------------------------------------------------------------

    @property
    def profiles(self) -> ProfileStore:
        return self._store

    @property
    def recorder(self) -> Recorder:
        return self._engine.ledger.recorder

    def status(self) -> DaemonStatus:
        spec = self._plan.spec
        return DaemonStatus(
            state=self._state(),
            reasons=self._reasons(),
            version=__version__,
            pid=os.getpid(),
            uptime_s=time.monotonic() - self._started_s,
            http_url=self._config.url,
            model=self._model_ids[0],
            device=spec.device,
            dtype=spec.dtype,
            knobs=self._engine.board.knobs,
            plan=spec.plan,
            profile=self._plan.profile,
            engine_restarts=self._engine.supervisor.restarts,
            requests_failed=self._engine.ledger.num_failed,
            store_lost_writes=self._writer.lost_writes,
            tuner_mode=self._tuner.state().mode,
            facts=self._engine.facts,
            stats=self._senses.stats,
            snapshot=self._senses.snapshot,
            slo=self._config.slo,
        )

    def list_knobs(self) -> tuple[KnobState, ...]:
        return self._engine.board.states()

    async def set_knobs(
        self, values: Mapping[str, KnobValue], *, validate_only: bool, reason: str
    ) -> tuple[KnobState, ...]:
        """Hot knobs change once the engine is ready for them, others wait for a restart."""
        board = self._engine.board
        change = board.resolve(values)
        if change.pending:
            waiting = board.for_next_start(change.pending)
            check_next_start(self._plan, {**self._config.knobs, **waiting})
        if validate_only:
            return board.states(change)
        if not change.knobs == board.wanted == board.knobs:
            await self._tuner.overtake()
            await self._engine.apply(board.resolve(values).knobs)
            change = board.resolve(values)  # others may have set what waits for a restart meanwhile
        self._keep_pending(change.pending)
        logger.info("knobs set: %s (%s)", dict(values), reason)
        board.check_in_force(values)
        return board.states()

    async def explain(self) -> Explanation:
        knobs, facts = self._engine.board.knobs, self._engine.facts
        windows, load = self._senses.windows if self._engine.up else (), self._tuner.load
        return await explain(self._store, self._plan, windows, knobs=knobs, facts=facts, load=load)

    async def drain(self, *, timeout_s: float | None) -> int:
        logger.info("draining %d requests", self._engine.ledger.num_unfinished)
        return await self._engine.ledger.drain(timeout_s=timeout_s)

    def request_stop(self) -> None:
        """Begin to stop; asked a second time, stop without draining."""
        (self._hard_stop if self._stop.is_set() else self._stop).set()

    def tuner(self, mode: TunerMode | None = None) -> TunerState:
        if mode is not None:
            self._tuner.set_mode(mode)
        return self._tuner.state()

    async def steer_tuner(
        self, verb: TunerVerb, *, knob: str, validate_only: bool, reason: str
    ) -> TunerState:
        logger.info("tuner: %s %s (%s)", verb, knob, reason)
        return await self._tuner.steer(verb, knob=knob, validate_only=validate_only)

    # ---- inside ----------------------------------------------------------------------------

    @property
    def _model_ids(self) -> tuple[str, ...]:
        """Served names; the first one is written into answers."""
        given = self._config.served_model_name
        return (given,) if given else (self._plan.model_id,)

    def _state(self) -> DaemonState:
        return state_of(self._engine, reasons=self._reasons())

    def _reasons(self) -> tuple[str, ...]:
        store = store_reasons(fault=self._store_fault, lost_writes=self._writer.lost_writes)
        copies = copy_reasons(self._senses.totals.verify_mismatches)
        faults = self._senses.faults if self._engine.up else ()
        return (*store, *copies, *self._tuner.reasons(), *faults)

    def _keep_pending(self, pending: Mapping[str, KnobValue]) -> None:
        board = self._engine.board
        write_pending(self._config.state_dir.pending_file, board.for_next_start(pending))
        board.keep(pending)

    def _on_snapshot(self, snapshot: Snapshot) -> None:
        self._writer.record_snapshot(self._plan.key, snapshot)
        self._tuner.on_snapshot(snapshot)

    def _on_engine_lost(self, reason: str) -> None:
        if (values := self._tuner.on_engine_lost(reason)) is not None:
            self._engine.fall_back(values)

    def _telemetry(self) -> Telemetry:
        facts = self._engine.facts
        return Telemetry(
            totals=self._senses.totals,
            snapshot=self._senses.snapshot,
            link=facts.link if facts else None,
            engine_restarts=self._engine.supervisor.restarts,
            requests_failed=self._engine.ledger.num_failed,
            store_lost_writes=self._writer.lost_writes,
            labels=info_labels(self._plan.spec, name=self._model_ids[0]),
            load=self._tuner.metrics,
        )

    def _http_context(self) -> HttpContext:
        plan = self._plan
        return HttpContext(
            ledger=self._engine.ledger,
            tokenizer=load_tokenizer(plan),
            model_ids=self._model_ids,
            model=plan.model,
            max_model_len=plan.spec.knobs.max_model_len,
            sparse_method=plan.spec.knobs.sparse_method,
            state=self._state,
            metrics=self._senses.metrics,
            api_key=self._config.api_key,
            version=__version__,
        )


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait({task})
