"""What operators may tell the live tuner of a daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsed.controller.control import KnobSource, TunerVerb
from sparsed.controller.live_tuner import LiveTuner
from sparsed.controller.startup import StartPlan
from sparsed.core import (
    Decision,
    InputError,
    RolloutReason,
    Slo,
    TunerControls,
    TunerMode,
    UnprovedValues,
)
from sparsed.db.memory import InMemoryProfileStore
from sparsed.tuner.rollout_state import Values

ADVICE = Decision(
    made_at=1.0,
    values={"token_budget": 1536},
    reason="test",
    predicted_score=None,
    current_score=None,
)
Play = Callable[[Callable[[LiveTuner], Awaitable[None]]], None]


@pytest.fixture
def store() -> InMemoryProfileStore:
    return InMemoryProfileStore()


@pytest.fixture
def play(
    plan_start: Callable[..., StartPlan],
    control: Any,
    store: InMemoryProfileStore,
    tmp_path: Path,
) -> Play:
    """Run a scenario with a tuner that has seen one window."""
    plan = plan_start(no_profile=True)
    plan = replace(plan, sources={**plan.sources, "prefill_chunk": KnobSource.FILE})

    async def apply(values: Values) -> None:
        raise AssertionError(f"nothing was to be applied, but {values}")

    def run(scenario: Callable[[LiveTuner], Awaitable[None]]) -> None:
        async def live() -> None:
            tuner = LiveTuner(
                store,
                plan,
                slo=Slo(),
                apply=apply,
                read_failures=lambda: 0,
                kill_file=tmp_path / "tuner.kill",
            )
            tuner.on_snapshot(control.now.snapshot)
            await scenario(tuner)
            await tuner.close()

        asyncio.run(live())

    return run


def say(tuner: LiveTuner, verb: TunerVerb, knob: str = "", *, dry: bool = False) -> Awaitable[Any]:
    return tuner.steer(verb, knob=knob, validate_only=dry)


def test_pins_are_checked_kept_and_shown(play: Play, store: InMemoryProfileStore) -> None:
    async def scenario(tuner: LiveTuner) -> None:
        assert "prefill_chunk" in tuner.state().pins, "the start was told"
        for bad, message in (("speed", "unknown knob"), ("page_size", "waits for a restart")):
            with pytest.raises(InputError, match=message) as raised:
                await say(tuner, TunerVerb.PIN, bad)
            assert raised.value.field == "knob"
        await say(tuner, TunerVerb.PIN, "token_budget", dry=True)
        assert store.controls().pins == ()
        state = await say(tuner, TunerVerb.PIN, "token_budget")
        assert "token_budget" in state.pins and store.controls().pins == ("token_budget",)
        await say(tuner, TunerVerb.UNPIN, "token_budget")
        assert store.controls().pins == ()

    play(scenario)


def test_approved_advice_waits_at_the_gate_until_it_is_rejected(play: Play) -> None:
    async def scenario(tuner: LiveTuner) -> None:
        with pytest.raises(InputError, match="no advice"):
            await say(tuner, TunerVerb.APPROVE)
        tuner._advice._decisions.appendleft(ADVICE)
        state = await say(tuner, TunerVerb.APPROVE)
        assert state.rollouts[0].initiated_by == "operator" and "traffic" in state.hold
        with pytest.raises(InputError, match="another candidate"):
            await say(tuner, TunerVerb.APPROVE)
        state = await say(tuner, TunerVerb.REJECT)
        assert state.rollouts[0].reason is RolloutReason.REJECTED

    play(scenario)


def test_advice_becomes_a_candidate_in_auto_alone(play: Play) -> None:
    async def scenario(tuner: LiveTuner) -> None:
        tuner._on_decision(ADVICE)
        assert tuner.state().rollouts == ()
        tuner.set_mode(TunerMode.AUTO)
        await say(tuner, TunerVerb.FREEZE)
        tuner._on_decision(ADVICE)
        assert tuner.state().rollouts == () and tuner.state().frozen
        await say(tuner, TunerVerb.UNFREEZE)
        tuner._on_decision(ADVICE)
        assert tuner.state().rollouts[0].reason is RolloutReason.PROPOSED
        tuner.set_mode(TunerMode.ADVISE)
        assert tuner.state().rollouts[0].reason is RolloutReason.SWITCHED_OFF

    play(scenario)


def test_killed_it_stays_off_over_a_restart(play: Play, tmp_path: Path) -> None:
    async def kill(tuner: LiveTuner) -> None:
        state = await say(tuner, TunerVerb.KILL)
        assert (state.mode, state.killed) == (TunerMode.OFF, True)
        assert (tmp_path / "tuner.kill").exists()

    async def again(tuner: LiveTuner) -> None:
        assert tuner.state().mode is TunerMode.OFF and tuner.reasons() == ()
        with pytest.raises(InputError, match="tuner revive"):
            tuner.set_mode(TunerMode.AUTO)
        assert not (await say(tuner, TunerVerb.REVIVE)).killed
        tuner.set_mode(TunerMode.AUTO)

    play(kill)
    play(again)


def test_safe_mode_is_degraded_until_it_is_lifted(play: Play, store: InMemoryProfileStore) -> None:
    store.keep_controls(TunerControls(safe_since=1.0))

    async def scenario(tuner: LiveTuner) -> None:
        assert tuner.state().safe_mode and tuner.state().mode is TunerMode.OFF
        assert "safe mode" in tuner.reasons()[0]
        await say(tuner, TunerVerb.REVIVE)
        assert tuner.reasons() == () and store.controls().safe_since is None

    play(scenario)


def test_what_the_start_took_unproved_is_the_first_candidate_of_auto(
    plan_start: Callable[..., StartPlan],
    control: Any,
    store: InMemoryProfileStore,
    tmp_path: Path,
) -> None:
    snapshot = control.now.snapshot
    taken = {"token_budget": snapshot.knobs.token_budget}
    unproved = UnprovedValues(
        profile="profile #1", config_from={"token_budget": 4096}, config_to=taken
    )
    plan = replace(plan_start(no_profile=True), unproved=unproved)

    async def apply(values: Values) -> None:
        raise AssertionError(f"nothing was to be applied, but {values}")

    async def scenario() -> None:
        tuner = LiveTuner(
            store,
            plan,
            slo=Slo(),
            apply=apply,
            read_failures=lambda: 0,
            kill_file=tmp_path / "tuner.kill",
        )
        tuner.on_snapshot(snapshot)
        assert tuner.state().rollouts == (), "in mode advise nothing is tested"
        tuner.set_mode(TunerMode.AUTO)
        tuner.on_snapshot(snapshot)
        (record,) = tuner.state().rollouts
        assert (record.initiated_by, record.config_to) == ("profile #1", taken)
        tuner._on_decision(ADVICE)
        assert len(tuner.state().rollouts) == 1, "advice waits for its turn"
        await say(tuner, TunerVerb.REJECT)
        tuner.on_snapshot(snapshot)
        assert tuner.state().rollouts[0].reason is RolloutReason.REJECTED
        await tuner.close()

    asyncio.run(scenario())
