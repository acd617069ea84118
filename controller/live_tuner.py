"""The live tuner of a daemon: advice, and in mode auto what becomes of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from sparsed.controller.config import DaemonConfig
from sparsed.controller.control import KnobSource, LoadState, TunerState, TunerVerb
from sparsed.controller.recovery import SAFE_VALUES, verdict_on
from sparsed.controller.rollout_host import PERIOD_S, RolloutHost
from sparsed.controller.startup import StartPlan
from sparsed.controller.telemetry import load_metrics
from sparsed.controller.tuner_host import TunerHost
from sparsed.controller.why import platform_of, verdict_of
from sparsed.core import (
    KNOBS_BY_NAME,
    RECALL_KNOBS,
    Decision,
    EngineFacts,
    InputError,
    KnobClass,
    RolloutReason,
    RolloutRecord,
    RolloutState,
    Slo,
    Snapshot,
    TunerMode,
    UnprovedProfile,
    Verdict,
)
from sparsed.db.store import Store, StoreError
from sparsed.profiler.export import LoadMetrics
from sparsed.tuner.drift import LinkWatch, link_drift, watch_link
from sparsed.tuner.gate import OPERATOR, TUNER
from sparsed.tuner.rollout_state import RolloutRule, Values, live_rule

logger = logging.getLogger(__name__)

SAFE_MODE = (
    "safe mode: three crashes under values of the live tuner; conservative values, tuner off, "
    "until: sparsed tuner revive, then a restart"
)
GIVEN = (KnobSource.FILE, KnobSource.ENVIRONMENT, KnobSource.FLAG)


class LiveTuner:
    """Advice and rollout together, as the daemon uses them. Lives on the event loop.

    ``apply`` and ``read_failures`` as in ``RolloutHost``; ``read_facts``: of the engine, None
    before it is loaded; ``rule``: another than follows from ``config``.
    """

    def __init__(
        self,
        store: Store,
        plan: StartPlan,
        *,
        config: DaemonConfig,
        apply: Callable[[Values], Awaitable[None]],
        read_failures: Callable[[], int],
        read_facts: Callable[[], EngineFacts | None],
        rule: RolloutRule | None = None,
    ) -> None:
        slo = config.slo
        self._store = store
        self._plan = plan
        self._read_facts = read_facts
        self._link = LinkWatch()
        self._verdict: RolloutRecord | None = None  # on ``plan.unproved``; records go after a while
        self._starts_tuned = KnobSource.TUNER in plan.sources.values()
        self._rollout = RolloutHost(
            store,
            plan.key,
            slo=slo,
            apply=apply,
            read_failures=read_failures,
            kill_file=config.state_dir.tuner_kill_file,
            fixed=_fixed(plan, slo=slo),
            rule=rule
            or live_rule(
                slo,
                dwell_s=config.regime_dwell_s,
                max_prefill_chunk=plan.max_prefill_chunk,
            ),
            knobs=plan.spec.knobs,
            versions=plan.versions,
        )
        mode = TunerMode.OFF if self._rollout.is_killed else TunerMode.ADVISE
        self._advice = TunerHost(
            store,
            plan.key,
            slo=slo,
            max_prefill_chunk=plan.max_prefill_chunk,
            mode=mode,
            judge=self._judge,
            read_failed=lambda: self._rollout.barred,
            read_unproved=self._read_unproved,
            read_pins=lambda: self._rollout.pins,
            on_decision=self._on_decision,
        )
        self._rollout.set_mode(mode)

    async def serve(self) -> None:
        """While the engine serves; until cancelled."""
        await self._mark_stale(self._plan.stale_profile_id)
        if self._starts_tuned and self._rollout.controls.safe_since is None:
            try:
                await self._rollout.begin_run()
            except StoreError as error:
                logger.warning("crashes of this run will not count: %s", error)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._rollout.work())
            tasks.create_task(self._rollout.watch())
            tasks.create_task(self._await_drift())

    async def close(self) -> None:
        """After the engine has ended."""
        await self._advice.close()
        await self._rollout.close()

    def on_snapshot(self, snapshot: Snapshot) -> None:
        self._advice.on_snapshot(snapshot)
        self._rollout.on_snapshot(snapshot)
        self._note_verdict()
        if (facts := self._read_facts()) is not None and not self._rollout.stale:
            platform = platform_of(self._plan, facts)
            self._link = watch_link(self._link, snapshot, platform=platform)
            if reason := link_drift(self._link, snapshot, platform=platform):
                self._rollout.on_drift(reason, values=SAFE_VALUES)

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
                self._reject()
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
            load=rollout.load,
        )

    @property
    def load(self) -> LoadState:
        """Regimes, and whether what was measured here still holds."""
        return self._rollout.load

    @property
    def metrics(self) -> LoadMetrics:
        """What a scrape shows of it."""
        rollout = self._rollout
        return load_metrics(self.load, num_reverts=rollout.num_reverts, revert_s=rollout.revert_s)

    def reasons(self) -> tuple[str, ...]:
        """Why the daemon is degraded."""
        stale = self._rollout.stale
        found = (
            SAFE_MODE if self._rollout.controls.safe_since is not None else "",
            "" if self._is_proved else self._plan.stale,
            f"{stale}; what was tuned here holds no more, run: sparsed tune" if stale else "",
            "" if stale else self.load.drift,
        )
        return tuple(reason for reason in found if reason)

    @property
    def _is_proved(self) -> bool:
        """Whether the profile that the start left out has passed its test on these versions."""
        self._note_verdict()
        last = self._verdict
        return last is not None and (
            last.state is RolloutState.SUCCESS or last.reason is RolloutReason.COMMITTED
        )

    def _note_verdict(self) -> None:
        if (profile := self._plan.unproved) is not None:
            self._verdict = verdict_on(profile.name, self._rollout.records) or self._verdict

    async def _await_drift(self) -> None:
        while not self._rollout.stale:
            await asyncio.sleep(PERIOD_S)
        await self._mark_stale(self._plan.profile_id)

    async def _mark_stale(self, profile_id: int | None) -> None:
        if profile_id is None:
            return
        try:
            await asyncio.to_thread(self._store.mark_stale, profile_id)
        except StoreError as error:
            logger.warning("profile #%d is not marked as stale: %s", profile_id, error)

    def _judge(self, windows: Sequence[Snapshot]) -> Verdict:
        return verdict_of(self._plan, windows, facts=self._read_facts())

    def _on_decision(self, decision: Decision) -> None:
        if decision.values and self._advice.state().mode is TunerMode.AUTO:
            self._propose(decision.values, initiated_by=TUNER)

    def _read_unproved(self) -> UnprovedProfile | None:
        """What is left of the compatible profile, until there is a verdict on it."""
        self._note_verdict()
        if (profile := self._plan.unproved) is None or self._verdict is not None:
            return None
        pins = self._rollout.pins
        return replace(profile, values={n: v for n, v in profile.values.items() if n not in pins})

    def _profile_of(self, values: Values) -> str:
        """Name of the compatible profile that all of ``values`` come from; empty: of none."""
        profile = self._read_unproved()
        is_whole = profile is not None and values.items() <= profile.values.items()
        return profile.name if profile is not None and is_whole else ""

    def _propose(self, values: Values, *, initiated_by: str) -> bool:
        name = self._profile_of(values)
        return self._rollout.propose(values, initiated_by=initiated_by, profile=name)

    def _reject(self) -> None:
        """The candidate; without one advice to prove a profile, which is not to come again."""
        advice = self._advice.state().decisions
        values = advice[0].values if advice else {}
        if values and not self._rollout.has_candidate and self._profile_of(values):
            self._propose(values, initiated_by=OPERATOR)
        self._rollout.trip(RolloutReason.REJECTED)

    def _approve(self) -> None:
        if self._rollout.is_killed:
            is_safe = self._rollout.controls.safe_since is not None
            why = "in safe mode" if is_safe else "stopped by its kill switch"
            raise InputError(f"the live tuner is {why}; first: sparsed tuner revive")
        advice = self._advice.state().decisions
        if not advice or not advice[0].values:
            raise InputError("there is no advice to approve; see: sparsed tuner status")
        if not self._propose(advice[0].values, initiated_by=OPERATOR):
            raise InputError(
                "the advice cannot be tested now: another candidate is, or what it changes is "
                "pinned, quarantined or in force already; see: sparsed tuner status"
            )


def _fixed(plan: StartPlan, *, slo: Slo) -> frozenset[str]:
    """Knobs to leave alone in all of this life: what the start was told, and without a floor of
    recall those by which texts differ."""
    given = frozenset(name for name, source in plan.sources.items() if source in GIVEN)
    return given if slo.min_recall is not None else given | RECALL_KNOBS


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
