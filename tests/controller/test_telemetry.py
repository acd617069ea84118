"""What the daemon tells of itself: counters of its engines, and its own."""

from __future__ import annotations

import pytest

from sparsed.controller.telemetry import Senses
from sparsed.core import EngineStats, RefusalCount, RefusalReason, Slo


def test_refusals_of_the_daemon_stand_beside_those_of_its_engines() -> None:
    """Whatever engine is the present one."""
    senses = Senses(lambda: pytest.fail("no scrape"), slo=Slo())
    senses.observe_refusal(RefusalReason.QUEUE_FULL)
    senses.observe_refusal(RefusalReason.TOO_LONG)
    for steps, count in ((9, 2), (4, 1)):  # the second is a new engine
        refused = RefusalCount(reason=RefusalReason.TOO_LONG, count=count)
        senses.on_stats(EngineStats(steps=steps, refusals=(refused,)))
    senses.observe_refusal(RefusalReason.QUEUE_FULL)
    assert senses.stats is not None
    assert {one.reason: one.count for one in senses.stats.refusals} == {
        RefusalReason.TOO_LONG: 4,
        RefusalReason.QUEUE_FULL: 2,
    }
