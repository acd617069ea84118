"""The live tuner's host, with the real optimizer process and scripted windows."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from dataclasses import replace

import pytest
from serving import KNOBS, SNAPSHOT

from sparsed.controller.tuner_host import TunerHost
from sparsed.core import (
    Bound,
    Objective,
    ProfileKey,
    Slo,
    Snapshot,
    TrialResult,
    TrialStatus,
    TunerMode,
    Verdict,
    Workload,
)
from sparsed.db.memory import InMemoryProfileStore

KEY = ProfileKey(hardware="cpu:x:2:4GiB", model="tiny", dtype="float32")


def judge(windows: Sequence[Snapshot]) -> Verdict:
    return Verdict(bound=Bound.IDLE, reason=f"{len(windows)} windows")


def store_with_trials() -> InMemoryProfileStore:
    """An old study that says the opposite, and a new one in which more sequences win."""
    store = InMemoryProfileStore()
    for sign in (-1, 1):
        study = store.start_study(
            KEY,
            workload=Workload(name="chat", requests=()),
            objective=Objective.THROUGHPUT,
            slo=Slo(),
            seed=0,
            space={"token_budget": [512, 1024]},
            versions={},
            started_at=0.0,
        )
        for number, active in enumerate((1, 2, 3, 4, 6, 8, 12)):
            trial = TrialResult(
                number=number,
                arm="bayes",
                values={"max_num_active_seqs": active},
                status=TrialStatus.OK,
                score=10.0 * active**sign,
                spread_frac=None,
                metrics={},
            )
            store.record_trial(study, trial)
    return store


def feed(host: TunerHost, num_windows: int, window: Snapshot = SNAPSHOT) -> None:
    for second in range(num_windows):
        host.on_snapshot(replace(window, ended_at=window.ended_at + second))


async def settled(host: TunerHost) -> None:
    assert host._question is not None
    await host._question


@pytest.mark.slow
def test_windows_become_advice_that_is_kept_once() -> None:
    async def scenario() -> None:
        store = store_with_trials()
        host = TunerHost(store, KEY, judge=judge, num_windows=3)
        for _ in range(2):
            feed(host, 3)
            await settled(host)
        (decision,) = host.state().decisions
        assert decision.values["max_num_active_seqs"] == 6
        assert store.list_decisions(KEY) == (decision,)
        assert host.state().num_observations == 6
        await host.close()

    asyncio.run(scenario())


@pytest.mark.slow
def test_the_same_advice_with_other_figures_is_no_news() -> None:
    async def scenario() -> None:
        store = InMemoryProfileStore()
        host = TunerHost(store, KEY, judge=judge, num_windows=3, slo=Slo(tpot_s=0.01, ttft_s=0.1))
        for tpot_s in (0.02, 0.03, 0.004):
            feed(host, 3, replace(SNAPSHOT, tpot_p95_s=tpot_s))
            await settled(host)
        assert [decision.reason for decision in store.list_decisions(KEY)] == [
            "time to first token 0.500 s is above 0.100 s: prompts take too many steps",
            "time per token 0.020 s is above 0.010 s: run fewer at once",
        ]
        await host.close()

    asyncio.run(scenario())


@pytest.mark.slow
def test_samples_of_recall_add_up_over_questions_under_the_same_knobs() -> None:
    async def scenario() -> None:
        store = InMemoryProfileStore()
        host = TunerHost(store, KEY, judge=judge, num_windows=3, slo=Slo(min_recall=0.95))
        for num_advised in (0, 0, 1):  # eight samples are in the third question
            feed(host, 3)
            await settled(host)
            advised = [item for item in host.state().decisions if item.values]
            assert len(advised) == num_advised
        assert "attention recall 0.900 is below 0.950" in host.state().decisions[0].reason
        assert SNAPSHOT.knobs is not None
        more = replace(SNAPSHOT.knobs, token_budget=3072)
        feed(host, 3, replace(SNAPSHOT, knobs=more, attention_recall=0.99))
        await settled(host)
        assert "recall" not in host.state().decisions[0].reason
        await host.close()

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_dead_optimizer_is_replaced_three_times_at_most() -> None:
    async def scenario() -> None:
        host = TunerHost(store_with_trials(), KEY, judge=judge, num_windows=1)
        for deaths in range(1, 4):
            process = await host._running_process()
            os.kill(process.pid, signal.SIGKILL)
            feed(host, 1)
            await settled(host)
            assert (host._num_deaths, host.state().decisions) == (deaths, ())
        feed(host, 5)
        assert host._question is not None and host._question.done()
        await host.close()

    asyncio.run(scenario())


def test_modes_decide_what_is_collected() -> None:
    async def scenario() -> None:
        host = TunerHost(
            InMemoryProfileStore(), KEY, judge=judge, num_windows=3, mode=TunerMode.OBSERVE
        )
        feed(host, 5)
        assert (host.state().num_observations, host._question) == (5, None)
        host.set_mode(TunerMode.OFF)
        feed(host, 5)
        assert host.state().num_observations == 5
        host.set_mode(TunerMode.ADVISE)
        feed(host, 2)
        assert host._question is None
        await host.close()

    asyncio.run(scenario())


def test_windows_of_other_knobs_and_idle_ones_do_not_count_together() -> None:
    async def scenario() -> None:
        host = TunerHost(InMemoryProfileStore(), KEY, judge=judge, num_windows=3)
        feed(host, 5, replace(SNAPSHOT, steps=0))
        assert host.state().num_observations == 0
        feed(host, 2)
        feed(host, 2, replace(SNAPSHOT, knobs=replace(KNOBS, token_budget=1024)))
        assert host._question is None
        await host.close()

    asyncio.run(scenario())
