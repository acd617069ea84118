"""The ledger and the supervisor together, over a real engine that certain requests kill."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from sparsed.controller.engine_link import EngineLink
from sparsed.controller.request_stream import RequestStream
from sparsed.controller.startup import StartPlan
from sparsed.controller.telemetry import Senses
from sparsed.core import AddRequest, FinishReason, SamplingParams, Slo, TokenOutput
from sparsed.engine.wire import FromEngine

NUM_TOKENS = 120
FATAL_TOKEN = 20


class PoisonedLink(EngineLink):
    """Kills every engine in which the request "poison" runs and has come to its fatal token."""

    armed = False

    def on_message(self, message: FromEngine) -> None:
        super().on_message(message)
        entry = self.ledger._sent.get("poison")
        if self.armed and entry is not None and len(entry.generated) >= FATAL_TOKEN:
            assert self.facts is not None
            with suppress(ProcessLookupError):  # its last words may come after its end
                os.kill(self.facts.pid, signal.SIGKILL)


def submit(link: EngineLink, name: str) -> RequestStream:
    return link.ledger.submit(
        AddRequest(
            request_id=name,
            prompt_tokens=tuple(len(name) * number % 500 for number in range(300)),
            sampling=SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0),
        )
    )


async def read(stream: RequestStream) -> list[TokenOutput]:
    return [output async for output in stream]


def tokens_of(outputs: list[TokenOutput]) -> list[int | None]:
    return [output.token_id for output in outputs]


@pytest.mark.slow
def test_neighbours_of_a_fatal_request_go_on_with_the_same_text(
    plan_start: Callable[..., StartPlan], tmp_path: Path
) -> None:
    plan = plan_start(find_verified=lambda key: None, token_budget=256)
    names = ("before", "poison", "after it")

    async def live() -> None:
        senses = Senses(lambda: pytest.fail("no scrape"), slo=Slo())
        link = PoisonedLink(
            plan, run_dir=tmp_path, max_queued=9, senses=senses, on_snapshot=lambda _: None
        )
        await link.supervisor.start()
        undisturbed = [await read(submit(link, name)) for name in names]
        link.armed = True
        before, poison, after = await asyncio.gather(*(read(submit(link, name)) for name in names))
        await link.stop()
        assert tokens_of(before) == tokens_of(undisturbed[0])
        assert tokens_of(after) == tokens_of(undisturbed[2])
        assert poison[-1].finish_reason is FinishReason.ERROR
        assert "died 4 times" in str(poison[-1].error)  # among all, twice; beside one; alone
        assert link.supervisor.restarts == 4
        assert len(link.supervisor._deaths_s) == 1, "the four are explained, and count as one"
        assert link.ledger.num_failed == 1

    asyncio.run(live())
