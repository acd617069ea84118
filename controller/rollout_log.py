"""What a rollout leaves on the disk: steps, markers, evidence, regimes, and that it was running."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Final

from sparsed.core import AcceptanceDecision, ProfileKey
from sparsed.db.store import Store, StoreError
from sparsed.tuner.rollout_state import Action, Apply, Keep, Mark, Settle

TOUCH_PERIOD_S: Final = 10.0

Batch = tuple[Action | Keep, ...]

logger = logging.getLogger(__name__)


class RolloutLog:
    """Lives on the event loop; the store's calls run in threads. ``versions``: of what values are
    proved on. Errors: StoreError, but for ``touch``."""

    def __init__(
        self,
        store: Store,
        key: ProfileKey,
        *,
        versions: Mapping[str, str],
        clock: Callable[[], float],
    ) -> None:
        self.is_marked = False
        self._store: Final = store
        self._key: Final = key
        self._versions: Final = versions
        self._clock: Final = clock
        self._run_id: int | None = None
        self._touched_at = 0.0

    async def begin_run(self) -> None:
        """Values of the live tuner are in force: if the process dies now, that counts. StoreError
        if that could not be kept."""
        if self._run_id is None:
            self._run_id = await asyncio.to_thread(self._store.begin_run, self._clock())

    async def touch(self) -> None:
        if self._run_id is None or self._clock() - self._touched_at < TOUCH_PERIOD_S:
            return
        self._touched_at = self._clock()
        try:
            await asyncio.to_thread(self._store.touch_run, self._run_id, self._touched_at)
        except StoreError as error:
            logger.warning("the store failed the live tuner: %s", error)

    async def end_run(self) -> None:
        """It ends as it should."""
        if self._run_id is not None:
            await asyncio.to_thread(self._store.end_run, self._run_id, self._clock())

    async def write(self, batch: Batch) -> None:
        """All but the applies, in their order."""
        for action in batch:
            match action:
                case Mark():
                    await self.begin_run()
                    await asyncio.to_thread(self._store.mark_rollout, self._key, action.record)
                    self.is_marked = True
                case Settle():
                    self.is_marked = False
                    await asyncio.to_thread(self._settle, action)
                case Keep():
                    await asyncio.to_thread(self._store.keep_regimes, self._key, action.regimes)
                case Apply():
                    pass  # the host applies; there is nothing to keep of it
                case _:
                    await asyncio.to_thread(self._store.note_rollout, self._key, action.record)

    def _settle(self, settle: Settle) -> None:
        record = settle.record
        self._store.settle_rollout(
            self._key, record, good=settle.good, versions=self._versions, regime=settle.regime
        )
        if (evidence := settle.evidence) is None:
            return
        decision = AcceptanceDecision(
            key=self._key,
            config_from=record.config_from,
            config_to=record.config_to,
            rule=evidence.rule,
            verdict=evidence.verdict,
            windows=evidence.windows,
            initiated_by=record.initiated_by,
            decided_at=record.at,
        )
        try:
            self._store.save_acceptance(decision)
        except StoreError as error:
            logger.warning("the evidence of a decision could not be stored: %s", error)
