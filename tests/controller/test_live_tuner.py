"""What operators may tell the live tuner of a daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from sparsed.controller.config import DaemonConfig
from sparsed.controller.control import KnobSource, TunerVerb
from sparsed.controller.live_tuner import LiveTuner
from sparsed.controller.recovery import verdict_on
from sparsed.controller.startup import StartPlan
from sparsed.core import (
    Decision,
    InputError,
    RolloutReason,
    RolloutRecord,
    RolloutState,
    TunerControls,
    TunerMode,
    UnprovedProfile,
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
UNPROVED = UnprovedProfile(
    name="profile #1 on torch 2",
    values={"token_budget": 512, "max_num_active_seqs": 2},
    why="torch 1 -> 2",
)
Play = Callable[..., None]


@pytest.fixture
def store() -> InMemoryProfileStore:
    return InMemoryProfileStore()


@pytest.fixture
def play(
    plan_start: Callable[..., StartPlan],
    configure: Callable[..., DaemonConfig],
    control: Any,
    store: InMemoryProfileStore,
) -> Play:
    """Run a scenario with a tuner that has seen one window."""
    plan = plan_start(no_profile=True)
    configure().state_dir.root.mkdir()
    plan = replace(plan, sources={**plan.sources, "prefill_chunk": KnobSource.FILE})

    async def apply(values: Values) -> None:
        raise AssertionError(f"nothing was to be applied, but {values}")

    def run(
        scenario: Callable[[LiveTuner], Awaitable[None]],
        *,
        unproved: UnprovedProfile | None = None,
        floor: float | None = 0.5,
    ) -> None:
        async def live() -> None:
            tuner = LiveTuner(
                store,
                replace(plan, unproved=unproved),
                config=configure(regime_dwell=20, min_recall=floor),
                apply=apply,
                read_failures=lambda: 0,
                read_facts=lambda: None,
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


def test_killed_it_stays_off_over_a_restart(
    play: Play, configure: Callable[..., DaemonConfig]
) -> None:
    async def kill(tuner: LiveTuner) -> None:
        state = await say(tuner, TunerVerb.KILL)
        assert (state.mode, state.killed) == (TunerMode.OFF, True)
        assert configure().state_dir.tuner_kill_file.exists()

    async def again(tuner: LiveTuner) -> None:
        tuner._advice._decisions.appendleft(ADVICE)
        with pytest.raises(InputError, match=r"kill switch; first: sparsed tuner revive"):
            await say(tuner, TunerVerb.APPROVE)
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
        with pytest.raises(InputError, match="safe mode; first: sparsed tuner revive"):
            await say(tuner, TunerVerb.APPROVE)
        await say(tuner, TunerVerb.REVIVE)
        assert tuner.reasons() == () and store.controls().safe_since is None

    play(scenario)


def advised(tuner: LiveTuner) -> Decision:
    """As the optimizer answers: what is left of the compatible profile, or the usual."""
    left = tuner._read_unproved()
    decision = replace(ADVICE, values=left.values) if left and left.values else ADVICE
    tuner._advice._decisions.appendleft(decision)
    return decision


def test_a_compatible_profile_is_the_first_candidate_of_auto_until_it_has_a_verdict(
    play: Play,
) -> None:
    async def scenario(tuner: LiveTuner) -> None:
        tuner._on_decision(advised(tuner))
        assert tuner.state().rollouts == (), "in mode advise nothing is tested"
        tuner.set_mode(TunerMode.AUTO)
        tuner._on_decision(advised(tuner))
        (record,) = tuner.state().rollouts
        assert (record.initiated_by, record.profile) == ("auto", UNPROVED.name)
        assert record.config_to == UNPROVED.values, "all of it at once"
        tuner.set_mode(TunerMode.ADVISE)
        assert tuner.state().rollouts[0].reason is RolloutReason.SWITCHED_OFF
        tuner.set_mode(TunerMode.AUTO)
        tuner._on_decision(advised(tuner))
        assert tuner.state().rollouts[0].reason is RolloutReason.PROPOSED, "there was no verdict"
        await say(tuner, TunerVerb.REJECT)
        assert tuner.state().rollouts[0].reason is RolloutReason.REJECTED
        assert advised(tuner) == ADVICE
        tuner._on_decision(ADVICE)
        assert tuner.state().rollouts[0].profile == ""

    play(scenario, unproved=UNPROVED)


def test_in_advise_an_operator_proves_a_compatible_profile_or_rejects_it_for_good(
    play: Play, store: InMemoryProfileStore, plan_start: Callable[..., StartPlan]
) -> None:
    async def reject(tuner: LiveTuner) -> None:
        await say(tuner, TunerVerb.REJECT)
        assert tuner.state().rollouts == (), "nothing was advised yet"
        advised(tuner)
        await say(tuner, TunerVerb.APPROVE)
        record = tuner.state().rollouts[0]
        assert (record.initiated_by, record.profile) == ("operator", UNPROVED.name)
        tuner._rollout.trip(RolloutReason.OVERTAKEN)
        await say(tuner, TunerVerb.REJECT)
        record = tuner.state().rollouts[0]
        assert (record.reason, record.profile) == (RolloutReason.REJECTED, UNPROVED.name)

    play(reject, unproved=UNPROVED)
    key = plan_start(no_profile=True).key
    assert verdict_on(UNPROVED.name, store.list_rollouts(key)) is not None
    assert verdict_on("profile #1 on torch 3", store.list_rollouts(key)) is None


@pytest.mark.parametrize(
    ("reasons", "is_degraded"),
    [
        ((), True),
        ((RolloutReason.PROPOSED, RolloutReason.CANARY), True),
        ((RolloutReason.COMMITTED,), False),
        ((RolloutReason.COMMITTED, RolloutReason.PROBATION_PASSED), False),
        ((RolloutReason.COMMITTED, RolloutReason.REGRESSED), True),
        ((RolloutReason.NOT_BETTER,), True),
    ],
)
def test_a_profile_of_another_platform_degrades_until_it_has_passed(
    play: Play, reasons: tuple[RolloutReason, ...], is_degraded: bool
) -> None:
    reverted = (RolloutReason.REGRESSED, RolloutReason.NOT_BETTER)

    async def scenario(tuner: LiveTuner) -> None:
        tuner._plan = replace(tuner._plan, stale="profile #1 (torch 1 -> 2)")
        for reason in reasons:
            passed = reason is RolloutReason.PROBATION_PASSED
            state = RolloutState.SUCCESS if passed else RolloutState.VERIFYING
            record = RolloutRecord(
                state=RolloutState.REVERTED if reason in reverted else state,
                reason=reason,
                config_from={},
                config_to=UNPROVED.values,
                initiated_by="auto",
                at=1.0,
                profile=UNPROVED.name,
            )
            tuner._rollout.records.appendleft(record)
        assert bool(tuner.reasons()) is is_degraded
        while UNPROVED.name in {item.profile for item in tuner._rollout.records}:
            tuner._rollout.records.appendleft(replace(tuner._rollout.records[0], profile=""))
        assert bool(tuner.reasons()) is is_degraded, "also when its records are no longer kept"

    play(scenario, unproved=UNPROVED)


def test_pinned_knobs_are_no_part_of_a_compatible_profile(play: Play) -> None:
    async def scenario(tuner: LiveTuner) -> None:
        await say(tuner, TunerVerb.PIN, "max_num_active_seqs")
        left = tuner._read_unproved()
        assert left is not None and left.values == {"token_budget": 512}

    play(scenario, unproved=UNPROVED)


def test_without_a_floor_of_recall_the_token_budget_is_left_alone(play: Play) -> None:
    async def scenario(tuner: LiveTuner) -> None:
        assert "token_budget" in tuner.state().pins
        left = tuner._read_unproved()
        assert left is not None and left.values == {"max_num_active_seqs": 2}
        tuner.set_mode(TunerMode.AUTO)
        tuner._on_decision(ADVICE)
        assert tuner.state().rollouts == ()

    async def with_a_floor(tuner: LiveTuner) -> None:
        assert "token_budget" not in tuner.state().pins

    play(scenario, unproved=UNPROVED, floor=None)
    play(with_a_floor)
