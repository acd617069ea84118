"""The live tuner of a daemon: advice, and in mode auto what becomes of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from sparsed.controller.control import KnobSource, TunerState, TunerVerb
from sparsed.controller.recovery import verdict_on
from sparsed.controller.rollout_host import RolloutHost
from sparsed.controller.startup import StartPlan
from sparsed.controller.tuner_host import TunerHost
from sparsed.core import (
    KNOBS_BY_NAME,
    Decision,
    InputError,
    KnobClass,
    RolloutReason,
    Slo,
    Snapshot,
    TunerMode,
)
from sparsed.db.store import Store, StoreError
from sparsed.tuner.gate import TUNER
from sparsed.tuner.rollout_state import Values

logger = logging.getLogger(__name__)

SAFE_MODE = (
    "safe mode: three crashes under values of the live tuner; conservative values, tuner off, "
    "until: sparsed tuner revive, then a restart"
)
GIVEN = (KnobSource.FILE, KnobSource.ENVIRONMENT, KnobSource.FLAG)


class LiveTuner:
    """Advice and rollout together, as the daemon uses them. Lives on the event loop.

    ``apply`` and ``read_failures`` as in ``RolloutHost``.
    """

    def __init__(
        self,
        store: Store,
        plan: StartPlan,
        *,
        slo: Slo,
        apply: Callable[[Values], Awaitable[None]],
        read_failures: Callable[[], int],
        kill_file: Path,
    ) -> None:
        self._unproved = plan.unproved
        self._starts_tuned = KnobSource.TUNER in plan.sources.values()
        self._rollout = RolloutHost(
            store,
            plan.key,
            slo=slo,
            apply=apply,
            read_failures=read_failures,
            kill_file=kill_file,
            fixed=frozenset(name for name, source in plan.sources.items() if source in GIVEN),
        )
        mode = TunerMode.OFF if self._rollout.is_killed else TunerMode.ADVISE
        self._advice = TunerHost(store, plan.key, slo=slo, mode=mode, on_decision=self._on_decision)
        self._rollout.set_mode(mode)

    async def serve(self) -> None:
        """While the engine serves; until cancelled."""
        if self._starts_tuned and self._rollout.controls.safe_since is None:
            try:
                await self._rollout.begin_run()
            except StoreError as error:
                logger.warning("crashes of this run will not count: %s", error)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._rollout.work())
            tasks.create_task(self._rollout.watch())

    async def close(self) -> None:
        """After the engine has ended."""
        await self._advice.close()
        await self._rollout.close()

    def on_snapshot(self, snapshot: Snapshot) -> None:
        self._advice.on_snapshot(snapshot)
        self._rollout.on_snapshot(snapshot)
        if self._advice.state().mode is TunerMode.AUTO:
            self._prove_start()

    def on_engine_lost(self, reason: str) -> Values | None:
        """What the next engine is to begin with, where the dead one had a candidate."""
        is_memory = "out of memory" in reason.lower()
        fault = RolloutReason.OUT_OF_MEMORY if is_memory else RolloutReason.ENGINE_DIED
        return self._rollout.trip(fault)

    async def overtake(self) -> None:
        """An operator is about to set knobs."""
        await self._rollout.overtake()

    def set_mode(self, mode: TunerMode) -> None:
        """InputError for a mode that the kill switch or safe mode forbids."""
        if mode is not TunerMode.OFF and self._rollout.is_killed:
            raise InputError("the live tuner is stopped; first: sparsed tuner revive")
        self._advice.set_mode(mode)
        self._rollout.set_mode(mode)

    async def steer(self, verb: TunerVerb, *, knob: str, validate_only: bool) -> TunerState:
        """As ``Control.steer_tuner``."""
        pins = frozenset(self._rollout.controls.pins)
        if verb in (TunerVerb.PIN, TunerVerb.UNPIN):
            pins = _with_pin(pins, verb, knob)
        if validate_only:
            return self.state()
        controls = replace(self._rollout.controls, pins=tuple(sorted(pins)))
        match verb:
            case TunerVerb.KILL:
                self._advice.set_mode(TunerMode.OFF)
                self._rollout.kill()
            case TunerVerb.REVIVE:
                await self._rollout.revive()
            case TunerVerb.APPROVE:
                self._approve()
            case TunerVerb.REJECT:
                self._unproved = None  # not proposed again
                self._rollout.trip(RolloutReason.REJECTED)
            case TunerVerb.PIN | TunerVerb.UNPIN:
                await self._rollout.keep(controls)
            case TunerVerb.FREEZE | TunerVerb.UNFREEZE:
                frozen = verb is TunerVerb.FREEZE
                await self._rollout.keep(replace(controls, frozen=frozen))
        return self.state()

    def state(self) -> TunerState:
        rollout = self._rollout
        return replace(
            self._advice.state(),
            rollouts=tuple(rollout.records),
            pins=tuple(sorted(rollout.pins)),
            frozen=rollout.controls.frozen,
            killed=rollout.is_killed,
            safe_mode=rollout.controls.safe_since is not None,
            hold=rollout.why_held(),
            explored_frac=rollout.explored_frac,
        )

    def reasons(self) -> tuple[str, ...]:
        """Why the daemon is degraded."""
        if self._rollout.controls.safe_since is None:
            return ()
        return (SAFE_MODE,)

    def _on_decision(self, decision: Decision) -> None:
        if decision.values and self._advice.state().mode is TunerMode.AUTO:
            self._rollout.propose(decision.values, initiated_by=TUNER)

    def _prove_start(self) -> None:
        """What the start took unproved is the first candidate, until there is a verdict on it."""
        unproved = self._unproved
        if unproved is None or self._rollout.has_candidate:
            return
        if verdict_on(unproved.profile, self._rollout.records) is not None:
            self._unproved = None
            return
        self._rollout.propose(
            unproved.config_to, initiated_by=unproved.profile, against=unproved.config_from
        )

    def _approve(self) -> None:
        advice = self._advice.state().decisions
        if not advice or not advice[0].values:
            raise InputError("there is no advice to approve; see: sparsed tuner status")
        if not self._rollout.propose(advice[0].values, initiated_by="operator"):
            raise InputError(
                "the advice cannot be tested now: another candidate is, or what it changes is "
                "pinned, quarantined or in force already; see: sparsed tuner status"
            )


def _with_pin(pins: frozenset[str], verb: TunerVerb, knob: str) -> frozenset[str]:
    spec = KNOBS_BY_NAME.get(knob)
    if spec is None:
        raise InputError(f"unknown knob {knob!r}; see: sparsed knobs list", field="knob")
    if spec.klass is not KnobClass.HOT:
        raise InputError(
            f"{knob} waits for a restart, so the live tuner never changes it; pin a hot knob",
            field="knob",
        )
    return pins | {knob} if verb is TunerVerb.PIN else pins - {knob}
