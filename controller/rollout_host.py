"""The rollout as the daemon runs it: windows and operators in, knobs and durable rows out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from sparsed.controller.control import LoadState
from sparsed.controller.rollout_log import Batch, RolloutLog
from sparsed.core import (
    InputError,
    Knobs,
    ProfileKey,
    RolloutReason,
    RolloutRecord,
    Slo,
    Snapshot,
    TunerControls,
    TunerMode,
)
from sparsed.db.store import Store, StoreError
from sparsed.tuner.drift import in_words, version_drift
from sparsed.tuner.gate import barred, hold
from sparsed.tuner.regimes import Regimes, still_verified
from sparsed.tuner.rollout import advance
from sparsed.tuner.rollout_end import resume
from sparsed.tuner.rollout_regime import forgotten, live_values
from sparsed.tuner.rollout_state import (
    Apply,
    Controls,
    Drifted,
    Event,
    Keep,
    Phase,
    Proposed,
    Rollout,
    RolloutRule,
    Settle,
    Steered,
    Ticked,
    Tripped,
    Values,
    live_rule,
)

PERIOD_S: Final = 1.0
MAX_SHOWN: Final = 50

logger = logging.getLogger(__name__)


class RolloutHost:
    """Feeds the state machine and does what it asks for, in its order, on one task, ``work``.

    Lives on the event loop; the store's calls run in threads. ``apply`` has hot knobs in force
    when it returns, or raises InputError. ``fixed``: knobs that the start was told, which are left
    alone. ``kill_file``: while it exists nothing is tested. ``knobs``: those of the start;
    ``versions``: of what it runs on, and values that were verified on others do not count.
    """

    def __init__(
        self,
        store: Store,
        key: ProfileKey,
        *,
        slo: Slo,
        apply: Callable[[Values], Awaitable[None]],
        read_failures: Callable[[], int],
        kill_file: Path,
        fixed: frozenset[str] = frozenset(),
        rule: RolloutRule | None = None,
        knobs: Knobs | None = None,
        versions: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store: Final = store
        self._slo: Final = slo
        self._apply: Final = apply
        self._read_failures: Final = read_failures
        self._kill_file: Final = kill_file
        self._fixed: Final = fixed
        self._rule: Final = rule or live_rule(slo)
        self._clock: Final = clock
        self._batches: asyncio.Queue[Batch] = asyncio.Queue()
        self._applying: set[asyncio.Task[None]] = set()
        self._owed: list[Batch] = []  # ends that failed, to be tried again
        self._undone: Batch = ()  # the newest end whose values are in force
        self._log: Final = RolloutLog(store, key, versions=versions or {}, clock=clock)
        self._mode = TunerMode.ADVISE
        self.num_reverts = 0
        self.revert_s = 0.0  # of all of them, from the decision until it was done
        self.controls: TunerControls = store.controls()
        good, records = store.find_good(key), store.list_rollouts(key)
        self.records: deque[RolloutRecord] = deque(records[:MAX_SHOWN], maxlen=MAX_SHOWN)
        if good is not None and version_drift(good.versions, versions or {}):
            dropped = forgotten(good, at=clock())
            self._batches.put_nowait((Settle(record=dropped, good={}),))
            self.records.appendleft(dropped)
            good = None
        self._state: Rollout = replace(
            resume(good.values if good else {}, records, rule=self._rule),
            base=live_values(knobs) if knobs else {},
            versions=versions or {},
            regimes=Regimes(known=still_verified(store.list_regimes(key), versions or {})),
        )
        self._tell(Steered(at=clock(), controls=self._now_allowed()))

    # ---- what may happen -------------------------------------------------------------------

    @property
    def is_killed(self) -> bool:
        return self._state.controls.killed

    @property
    def pins(self) -> frozenset[str]:
        return self._state.controls.pins

    @property
    def is_settled(self) -> bool:
        """Nothing is in force, or marked, that is not proved."""
        return not (self._state.is_testing or self._owed or self._batches.qsize())

    @property
    def has_candidate(self) -> bool:
        return self._state.candidate is not None

    @property
    def explored_frac(self) -> float:
        return self._state.explored_s / self._state.busy_s if self._state.busy_s else 0.0

    @property
    def barred(self) -> tuple[RolloutRecord, ...]:
        """Candidates that are not to be tested now, under the load that there is."""
        return barred(self._state, at=self._clock())

    def why_held(self) -> str:
        """Why no candidate is tested now; empty while one is."""
        candidate = self._state.candidate
        if candidate is None:
            return "killed" if self.is_killed else "no candidate"
        if candidate.phase is not Phase.WAITING:
            return ""
        return hold(self._state, candidate, self._rule, at=self._clock()) or ""

    @property
    def load(self) -> LoadState:
        regimes, drift = self._state.regimes, self._state.drift
        return LoadState(
            regimes=regimes.known,
            current=regimes.current,
            is_settled=regimes.elsewhere is None,
            drift=self._state.stale or in_words(drift),
            loss_frac=drift.loss_frac,
        )

    @property
    def stale(self) -> str:
        """Why nothing that was measured on this machine holds, in words; empty: it does."""
        return self._state.stale

    def on_drift(self, reason: str, *, values: Values) -> None:
        """Forget all that is verified; ``values`` are safe ones."""
        self._tell(Drifted(at=self._clock(), reason=reason, values=values))
        self._batches.put_nowait((Keep(regimes=self._state.regimes.known),))

    def on_snapshot(self, snapshot: Snapshot) -> None:
        """Take one window; returns at once."""
        failures = self._read_failures()
        self._tell(Ticked(at=self._clock(), snapshot=snapshot, num_failed=failures))

    def propose(self, values: Values, *, initiated_by: str, profile: str = "") -> bool:
        """Whether ``values`` became the candidate: not while there is one, nor against pins.
        ``profile``: as in ``Proposed``."""
        before, at = self._state.candidate, self._clock()
        self._tell(Proposed(at=at, values=values, initiated_by=initiated_by, profile=profile))
        return before is None and self._state.candidate is not None

    def set_mode(self, mode: TunerMode) -> None:
        self._mode = mode
        self._steer()

    def trip(self, reason: RolloutReason) -> Values | None:
        """End the candidate at once; the values that were tested before it, if it was tested."""
        candidate = self._state.candidate if self._state.is_testing else None
        self._tell(Tripped(at=self._clock(), reason=reason))
        return candidate.config_from if candidate else None

    async def overtake(self) -> None:
        """An operator is about to set knobs: return once nothing unproved is in force."""
        self.trip(RolloutReason.OVERTAKEN)
        await self._batches.join()

    def kill(self) -> None:
        """Undo what is not proved, and test nothing until ``revive``. InputError if the file that
        says so to later starts cannot be written."""
        self._steer(killed=True)
        try:
            self._kill_file.touch(mode=0o600)
        except OSError as error:
            raise InputError(
                f"the live tuner is stopped, but cannot write {self._kill_file}: "
                f"{error.strerror}; it would be on again after a restart"
            ) from error

    async def revive(self) -> None:
        """Lift the kill switch and safe mode. InputError if the file is there to stay."""
        try:
            self._kill_file.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"cannot remove {self._kill_file}: {error.strerror}") from error
        await self.keep(replace(self.controls, safe_since=None), forget_runs=True)

    async def keep(self, controls: TunerControls, *, forget_runs: bool = False) -> None:
        """What operators lay down, in force at once, and on the disk on return. StoreError if it
        could not be kept there."""
        self.controls = controls
        self._steer()
        await asyncio.to_thread(self._store.keep_controls, controls, forget_runs=forget_runs)

    # ---- life ------------------------------------------------------------------------------

    async def begin_run(self) -> None:
        """As ``RolloutLog.begin_run``."""
        await self._log.begin_run()

    async def work(self) -> None:
        """Do what the state machine asks for; until cancelled."""
        while True:
            batch = await self._batches.get()
            try:
                await self._do(batch)
            except asyncio.CancelledError:
                self._owed.append(batch)  # to be written by ``close``; twice does no harm
                raise
            finally:
                self._batches.task_done()

    async def watch(self) -> None:
        """Once a second what no window brings: silence, the kill file, what is owed."""
        while True:
            await asyncio.sleep(PERIOD_S)
            self.look()
            await self._log.touch()

    def look(self) -> None:
        if self._now_allowed() != self._state.controls:
            self._steer()
        failures = self._read_failures()
        self._tell(Ticked(at=self._clock(), snapshot=None, num_failed=failures))
        owed, self._owed = self._owed, []
        for batch in owed:
            self._batches.put_nowait(batch)

    async def close(self) -> None:
        """The end of serving, the engine gone and ``work`` too: what it left is settled."""
        for task in self._applying:
            task.cancel()
        self.trip(RolloutReason.SHUT_DOWN)
        self._batches.put_nowait((Keep(regimes=self._state.regimes.known),))
        batches, self._owed = self._owed, []
        while not self._batches.empty():
            batches.append(self._batches.get_nowait())
        try:
            for batch in batches:
                await self._log.write(batch)
            await self._log.end_run()
        except StoreError as error:
            logger.warning("the next start will find a candidate that crashed: %s", error)

    # ---- inside ----------------------------------------------------------------------------

    def _steer(self, *, killed: bool = False) -> None:
        allowed = self._now_allowed()
        controls = replace(allowed, killed=killed or allowed.killed)
        self._tell(Steered(at=self._clock(), controls=controls))

    def _now_allowed(self) -> Controls:
        return Controls(
            mode=self._mode,
            pins=frozenset(self.controls.pins) | self._fixed,
            frozen=self.controls.frozen,
            killed=self._kill_file.exists() or self.controls.safe_since is not None,
        )

    def _tell(self, event: Event) -> None:
        before = self._state.regimes.current
        self._state, actions = advance(self._state, event, rule=self._rule, slo=self._slo)
        for action in actions:
            if not isinstance(action, Apply):
                record = action.record
                self.records.appendleft(record)
                change = dict(record.config_to)
                logger.info("tuner: %s %s (%s)", record.state, change, record.reason)
        if actions:
            self._batches.put_nowait(actions)
        if self._state.regimes.current != before:
            self._batches.put_nowait((Keep(regimes=self._state.regimes.known),))

    async def _do(self, batch: Batch) -> None:
        """One step of the machine. What ends a candidate is done again until it succeeds."""
        is_end = isinstance(batch[0], Apply) and any(isinstance(one, Settle) for one in batch)
        try:
            for action in batch:
                if not isinstance(action, Apply):
                    await self._log.write((action,))
                elif is_end:
                    await self._apply(action.values)
                    self._count_revert(batch)
                else:
                    self._begin_apply(action)
        except (StoreError, InputError) as error:
            logger.warning("the live tuner cannot go on: %s", error)
            if is_end:
                self._owed.append(batch)
            self._tell(Tripped(at=self._clock(), reason=RolloutReason.STORE_FAILED))

    def _count_revert(self, batch: Batch) -> None:
        """What an end asked for is in force; again, where only the store had failed it."""
        if batch is self._undone:
            return
        self._undone = batch
        record = next(one.record for one in batch if isinstance(one, Settle))
        seconds = max(0.0, self._clock() - record.at)
        self.num_reverts += 1
        self.revert_s += seconds
        logger.info("tuner: undone in %.3f s (%s)", seconds, record.reason)

    def _begin_apply(self, action: Apply) -> None:
        """Not waited for: what trips meanwhile must be able to overtake it."""
        if action.needs_marker and not self._log.is_marked:
            return
        task = asyncio.create_task(self._apply_or_trip(action.values))
        self._applying.add(task)
        task.add_done_callback(self._applying.discard)

    async def _apply_or_trip(self, values: Values) -> None:
        try:
            await self._apply(values)
        except InputError as error:
            logger.warning("the engine did not take %s: %s", dict(values), error)
            self._tell(Tripped(at=self._clock(), reason=RolloutReason.APPLY_FAILED))
