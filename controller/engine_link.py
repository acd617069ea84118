"""The engine as the daemon sees it: one process behind the ledger, the knobs and the senses."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from sparsed.controller.knob_board import KnobBoard
from sparsed.controller.ledger import SHUTTING_DOWN, Ledger, LedgerLimits
from sparsed.controller.logs import ProgressLog
from sparsed.controller.startup import StartPlan
from sparsed.controller.supervisor import Supervisor
from sparsed.controller.telemetry import Senses
from sparsed.core import (
    ApplyKnobs,
    EngineFacts,
    EngineReady,
    EngineStats,
    InputError,
    Knobs,
    KnobsApplied,
    KnobValue,
    LoadProgress,
    Snapshot,
    TokenBatch,
)
from sparsed.engine.wire import FromEngine

APPLY_TIMEOUT_S = 60.0  # the step that is under way ends first; getting ready may take longer
STOP_TIMEOUT_S = 5.0


class EngineLink:
    """Routes the engine's messages, and keeps requests and knobs over its deaths.

    Lives on the event loop. ``on_snapshot`` gets every closed window, ``on_lost`` why an engine
    ended unasked, while ``fall_back`` can still choose what the next one begins with. ``facts`` is None until
    the engine is loaded for the first time; ``up`` is whether it runs now.
    """

    def __init__(
        self,
        plan: StartPlan,
        *,
        run_dir: Path,
        max_queued: int,
        senses: Senses,
        on_snapshot: Callable[[Snapshot], None],
        on_lost: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.facts: EngineFacts | None = None
        self.up = False
        self.board = KnobBoard(
            plan.spec.knobs, sources=plan.sources, max_prefill_chunk=plan.max_prefill_chunk
        )
        self._log_progress = ProgressLog()
        self._senses = senses
        senses.switch(plan.spec.knobs.is_profiled)
        self._on_snapshot = on_snapshot
        self._tell_lost = on_lost
        self._answers: dict[int, asyncio.Future[KnobsApplied]] = {}  # by the id of the change
        self.supervisor = Supervisor(
            plan.spec, run_dir=run_dir, on_message=self.on_message, on_lost=self._on_lost
        )
        self.ledger = Ledger(
            self._limits(plan, max_queued=max_queued),
            send=self.supervisor.send,
            arrive=senses.observe_arrival,
            observe=senses.observe_request,
            refuse=senses.observe_refusal,
            clock=time.monotonic,
            draw_seed=partial(random.Random(plan.spec.seed).getrandbits, 63),
        )

    async def apply(self, knobs: Knobs) -> None:
        """Change hot knobs and wait until they are in force, or newer ones in their place. The
        engine goes on serving with the old ones while it gets ready.

        Errors: InputError when the engine refuses a knob, is away, or neither answers nor says
        that it is getting ready.
        """
        if not self.up:
            raise InputError("the engine is not running yet; try again in a few seconds")
        change_id = self.board.ask(knobs)
        answer = asyncio.get_running_loop().create_future()
        self._answers[change_id] = answer
        self.supervisor.send(ApplyKnobs(change_id=change_id, knobs=knobs))
        try:
            while not answer.done():
                await asyncio.wait({answer}, timeout=APPLY_TIMEOUT_S)
                if not answer.done() and not self._is_applying:
                    raise InputError(
                        f"the engine did not take the knobs within {APPLY_TIMEOUT_S:.0f} s; "
                        "see: sparsed knobs list"
                    )
        finally:
            del self._answers[change_id]
        if (error := answer.result().error) is not None:
            raise InputError(error)

    async def have(self, values: Mapping[str, KnobValue]) -> None:
        """Like ``apply`` for some hot knobs; where there is no engine, the next one has them."""
        if self.up:
            await self.apply(self.board.wanted.with_values(values))
        else:
            self.fall_back(values)

    def fall_back(self, values: Mapping[str, KnobValue]) -> None:
        """The next engine begins with these hot knobs; only while there is none."""
        knobs = self.board.knobs.with_values(values)
        self.supervisor.restart_with(knobs)
        self.board.take(knobs)

    @property
    def _is_applying(self) -> bool:
        stats = self._senses.stats
        return stats is not None and stats.applying is not None

    def pids(self) -> tuple[int, ...]:
        """Of this process, and of the engine while it runs."""
        own = os.getpid()
        return (own, self.facts.pid) if self.facts and self.up else (own,)

    async def stop(self) -> None:
        """End what is unfinished with an error, then the engine."""
        self.ledger.cut_off_all(SHUTTING_DOWN)
        await self.supervisor.stop(STOP_TIMEOUT_S if self.facts else 0.0)

    def _limits(self, plan: StartPlan, *, max_queued: int) -> LedgerLimits:
        return LedgerLimits(
            max_tokens=min(plan.spec.knobs.max_model_len, plan.spec.plan.max_tokens),
            max_waiting=max_queued,
            num_active=lambda: self.board.knobs.max_num_active_seqs,
        )

    def on_message(self, message: FromEngine) -> None:
        """Route one message of the engine."""
        match message:
            case TokenBatch():
                self.ledger.on_batch(message)
            case EngineStats():
                if (snapshot := self._senses.on_stats(message)) is not None:
                    self._on_snapshot(snapshot)
            case EngineReady():
                self._on_ready(message.facts)
            case KnobsApplied():
                self._on_applied(message)
            case LoadProgress():
                self._log_progress(message.phase, message.frac)

    def _on_ready(self, facts: EngineFacts) -> None:
        self.facts, self.up = facts, True
        self._senses.on_engine_ready(weights_bytes=facts.weights_bytes)
        self.ledger.on_engine_ready()

    def _on_lost(self, reason: str) -> None:
        self.up = False
        # A fatal request counts as one death: several of them do not end the daemon, many do.
        self.supervisor.forgive(max(0, self.ledger.on_engine_lost() - 1))
        self.board.forget_asked()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(InputError(f"the engine died meanwhile: {reason}"))
        self._tell_lost(reason)

    def _on_applied(self, answer: KnobsApplied) -> None:
        self.board.answered(answer.change_id)
        if answer.error is None:
            self.board.take(answer.knobs)  # also when the caller has stopped waiting
            self._senses.switch(answer.knobs.is_profiled)
        waiting = self._answers.get(answer.change_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)
