"""Advice as the daemon sees it: windows go in, advice comes out, nothing is applied here."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from sparsed.controller.control import TunerState
from sparsed.controller.study_resume import latest_trials
from sparsed.core import (
    Decision,
    Knobs,
    ProfileKey,
    RolloutRecord,
    Slo,
    Snapshot,
    TunerMode,
    UnprovedProfile,
    Verdict,
)
from sparsed.db.store import Store, StoreError
from sparsed.tuner.messages import Answer, LiveContext
from sparsed.tuner.targets import Recall

NUM_WINDOWS: Final = 30  # of one question
MAX_DEATHS: Final = 3  # of the optimizer, then advice ends
MAX_LINE_BYTES: Final = 1 << 24
MAX_DECISIONS: Final = 50  # shown
FIGURES: Final = re.compile(r"[\d.,]+")

logger = logging.getLogger(__name__)


class TunerHost:
    """Collects windows and asks the optimizer process, one question at a time.

    Lives on the event loop. The process starts with the first question, which takes
    ``num_windows`` windows with work in them: an idle daemon never pays for it. ``on_decision``
    gets every answer, also one that was given before. ``judge``: what binds in some windows;
    ``read_failed``: candidates that are not to be tested again now; ``read_unproved``: the profile
    to be tested before anything else, if there is one now; ``read_pins``: knobs to leave alone.
    """

    def __init__(
        self,
        store: Store,
        key: ProfileKey,
        *,
        slo: Slo | None = None,
        max_prefill_chunk: int | None = None,
        mode: TunerMode = TunerMode.ADVISE,
        num_windows: int = NUM_WINDOWS,
        judge: Callable[[Sequence[Snapshot]], Verdict],
        read_failed: Callable[[], tuple[RolloutRecord, ...]] = tuple,
        on_decision: Callable[[Decision], None] = lambda decision: None,
        read_unproved: Callable[[], UnprovedProfile | None] = lambda: None,
        read_pins: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        self._store: Final = store
        self._key: Final = key
        self._slo: Final = slo or Slo()
        self._max_prefill_chunk: Final = max_prefill_chunk
        self._mode = mode
        self._windows: deque[Snapshot] = deque(maxlen=num_windows)
        self._knobs: Knobs | None = None  # of the newest window
        self._recall = Recall()  # under them: one question's windows may hold few samples
        self._judge: Final = judge
        self._read_failed: Final = read_failed
        self._on_decision: Final = on_decision
        self._read_unproved: Final = read_unproved
        self._read_pins: Final = read_pins
        self._num_observations = 0
        self._decisions: deque[Decision] = deque(maxlen=MAX_DECISIONS)
        self._process: Process | None = None
        self._question: asyncio.Task[None] | None = None
        self._num_deaths = 0

    def set_mode(self, mode: TunerMode) -> None:
        """Off forgets the windows; observe collects without advice."""
        self._mode = mode
        if mode is TunerMode.OFF:
            self._windows.clear()

    def state(self) -> TunerState:
        return TunerState(
            mode=self._mode,
            num_observations=self._num_observations,
            decisions=tuple(self._decisions),
        )

    def on_snapshot(self, snapshot: Snapshot) -> None:
        """Take one window; returns at once. Windows of other knobs than the newest are dropped."""
        if self._mode is TunerMode.OFF or snapshot.knobs is None:
            return
        if not snapshot.steps and not self._windows:
            return
        if self._knobs != snapshot.knobs:
            self._windows.clear()
            self._knobs, self._recall = snapshot.knobs, Recall()
        self._recall = self._recall.grown(snapshot)
        self._windows.append(snapshot)
        self._num_observations += 1
        if self._mode in (TunerMode.ADVISE, TunerMode.AUTO) and self._may_ask():
            self._question = asyncio.create_task(self._ask(tuple(self._windows)))
            self._windows.clear()

    async def close(self) -> None:
        """End the optimizer; a question under way is dropped."""
        if self._question is not None:
            self._question.cancel()
            await asyncio.wait({self._question})
        await self._end_process()

    def _may_ask(self) -> bool:
        idle = self._question is None or self._question.done()
        return idle and len(self._windows) == self._windows.maxlen and self._num_deaths < MAX_DEATHS

    async def _ask(self, windows: tuple[Snapshot, ...]) -> None:
        recall = self._recall.mean  # before any other knobs come into force
        try:
            trials = await asyncio.to_thread(latest_trials, self._store, self._key)
            question = LiveContext(
                windows=windows,
                trials=trials,
                slo=self._slo,
                unproved=self._read_unproved(),
                verdict=self._judge(windows),
                failed=self._read_failed(),
                max_prefill_chunk=self._max_prefill_chunk,
                pins=self._read_pins(),
                recall=recall,
            )
            decision = await self._exchange(question)
            if self._is_news(decision):
                self._decisions.appendleft(decision)
                logger.info("advice: %s (%s)", dict(decision.values) or "hold", decision.reason)
                await asyncio.to_thread(self._store.record_decision, self._key, decision)
            self._on_decision(decision)
        except StoreError as error:
            logger.warning("the store failed the tuner: %s", error)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            self._num_deaths += 1
            logger.warning("the optimizer is gone (%s), %d times so far", error, self._num_deaths)
            await self._end_process()

    async def _exchange(self, question: LiveContext) -> Decision:
        process = await self._running_process()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(msgspec.json.encode(question) + b"\n")
        await process.stdin.drain()
        line = await process.stdout.readline()
        return msgspec.json.decode(line, type=Answer).decision

    async def _running_process(self) -> Process:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "sparsed.tuner.optimizer",
                stdin=PIPE,
                stdout=PIPE,
                limit=MAX_LINE_BYTES,
                process_group=0,  # Ctrl-C is for the daemon, which then closes us
            )
        return self._process

    async def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        await process.wait()

    def _is_news(self, decision: Decision) -> bool:
        """Whether it says anything but the same with other figures."""
        if not self._decisions:
            return True
        last = self._decisions[0]
        return (last.values, _words(last)) != (decision.values, _words(decision))


def _words(decision: Decision) -> str:
    return FIGURES.sub("", decision.reason)
