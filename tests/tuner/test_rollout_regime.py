"""From one load to the next: what is verified for a load comes into force in it, and only there
counts what is measured in it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import serving

from sparsed.core import (
    AcceptanceRule,
    HostGauges,
    KnobValue,
    RolloutReason,
    RolloutState,
    Slo,
    TunerMode,
    WorkloadContext,
)
from sparsed.tuner.gate import exploring_s, hold
from sparsed.tuner.regimes import Regimes
from sparsed.tuner.rollout import advance
from sparsed.tuner.rollout_regime import live_values
from sparsed.tuner.rollout_state import (
    Action,
    Apply,
    Controls,
    Drifted,
    Event,
    Mark,
    Phase,
    Proposed,
    Rollout,
    RolloutRule,
    Settle,
    Steered,
    Ticked,
    Tripped,
)

SNAPSHOT = replace(serving.SNAPSHOT, ended_at=0.0, step_s=0.8)
CHAT = WorkloadContext(
    span_s=60.0, num_requests=60, requests_per_s=1.0, input_tokens_p50=500.0, input_tokens_p95=900.0
)
DOCUMENTS = replace(CHAT, input_tokens_p50=16_000.0, input_tokens_p95=30_000.0)
SLO = Slo(tpot_s=0.1)
RULE = RolloutRule(
    acceptance=AcceptanceRule(metric="output_tokens_per_s", num_pairs=6),
    window_s=3.0,
    washout_s=2.0,
    probation_s=30.0,
    cooldown_s=10.0,
    quarantine_s=5000.0,
    min_busy_s=5.0,
    slo_horizon_s=600.0,
    max_explored_frac=0.5,
    dwell_s=20.0,
)
AUTO = Controls(mode=TunerMode.AUTO)
EARNED_S = int(exploring_s(RULE, num_pairs=RULE.acceptance.num_pairs) / RULE.max_explored_frac) + 50
FOR_CHAT = {"max_num_active_seqs": 6}
FOR_DOCUMENTS = {"prefill_chunk": 768}
SAFE: Mapping[str, KnobValue] = {"token_budget": 1024, "prefill_chunk": 384}


class World:
    """A daemon that does what it is told at once. In each load one knob pays off."""

    def __init__(
        self,
        controls: Controls = AUTO,
        regimes: Regimes | None = None,
        *,
        max_prefill_chunk: int | None = None,
    ) -> None:
        self.rule = replace(RULE, max_prefill_chunk=max_prefill_chunk)
        self.state = Rollout(
            controls=controls,
            base=live_values(serving.KNOBS),
            versions={"torch": "2"},
            regimes=regimes or Regimes(),
        )
        self.at = 1000.0
        self.in_force = serving.KNOBS
        self.load = CHAT
        self.draw = random.Random(0)
        self.num_failed = 0
        self.marked = False
        self.good: Mapping[str, KnobValue] = {}
        self.proved = [serving.KNOBS]
        self.settles: list[Settle] = []
        self.records: list[tuple[RolloutState, RolloutReason]] = []
        self.settled_at: dict[float, int | None] = {}  # regime by tick; None: on its way

    def tell(self, event: Event) -> tuple[Action, ...]:
        self.state, actions = advance(self.state, event, rule=self.rule, slo=SLO)
        for action in actions:
            if isinstance(action, Apply):
                self.in_force = self.in_force.with_values(action.values)
                continue
            self.records.append((action.record.state, action.record.reason))
            if isinstance(action, Mark):
                self.marked = True
            elif isinstance(action, Settle):
                self.marked = False
                self.settles.append(action)
                if action.good is not None:
                    self.good = action.good
                if action.record.reason is RolloutReason.COMMITTED:
                    self.proved.append(self.in_force.with_values(action.record.config_to))
        return actions

    def tick(self, **figures: Any) -> tuple[Action, ...]:
        self.at += 1.0
        knobs = self.in_force
        pays = knobs.max_num_active_seqs > 4 if self.load == CHAT else knobs.prefill_chunk > 512
        rate = 50.0 * (1.2 if pays else 1.0) * (1 + 0.01 * self.draw.random())
        base = replace(
            SNAPSHOT,
            ended_at=self.at,
            generated_tokens_per_s=rate,
            knobs=knobs,
            context=self.load,
        )
        snapshot = replace(base, **figures)
        actions = self.tell(Ticked(at=self.at, snapshot=snapshot, num_failed=self.num_failed))
        regimes = self.state.regimes
        self.settled_at[self.at] = None if regimes.elsewhere else regimes.current
        return actions

    def serve(self, seconds: float, load: WorkloadContext | None = None, **figures: Any) -> None:
        self.load = load or self.load
        for _ in range(int(seconds)):
            self.tick(**figures)

    def propose(self, values: Mapping[str, KnobValue]) -> None:
        self.tell(Proposed(at=self.at, values=values, initiated_by="auto"))

    def prove(self, values: Mapping[str, KnobValue], load: WorkloadContext) -> None:
        """Serve until ``values`` have passed under ``load``, probation too."""
        self.serve(EARNED_S, load)
        self.propose(values)
        self.until(RolloutReason.PROBATION_PASSED, seconds=600)
        self.serve(20)

    def until(self, reason: RolloutReason, *, seconds: int = 200) -> None:
        start = len(self.records)
        for _ in range(seconds):
            self.tick()
            if any(why is reason for _, why in self.records[start:]):
                return
        raise AssertionError(f"no {reason}: {self.records[-5:]}")

    @property
    def phase(self) -> Phase | None:
        return self.state.candidate.phase if self.state.candidate else None


@pytest.fixture(scope="module")
def tuned() -> World:
    """What is verified for each of two loads; the last one is in force."""
    world = World()
    world.prove(FOR_CHAT, CHAT)
    world.prove(FOR_DOCUMENTS, DOCUMENTS)
    return world


def copy_of(world: World) -> World:
    again = World(world.state.controls)
    vars(again).update(vars(world))
    again.records, again.settles, again.settled_at = [], [], {}
    again.draw = random.Random(1)
    return again


def test_each_load_has_what_was_verified_for_it(tuned: World) -> None:
    chat, documents = tuned.state.regimes.known
    base = live_values(serving.KNOBS)
    assert chat.incumbent == {**base, **FOR_CHAT}
    assert documents.incumbent == {**base, **FOR_CHAT, **FOR_DOCUMENTS}, "as it was tested"
    assert chat.versions == {"torch": "2"} and chat.verified_at
    assert tuned.good == {**FOR_CHAT, **FOR_DOCUMENTS}
    kept = [item.regime for item in tuned.settles if item.good]
    assert [(one.regime_id, one.incumbent) for one in kept if one] == [
        (1, chat.incumbent),
        (2, documents.incumbent),
    ]
    world = copy_of(tuned)
    for load, regime in ((CHAT, chat), (DOCUMENTS, documents), (CHAT, chat)):
        world.serve(40, load)
        assert live_values(world.in_force) == regime.incumbent
        assert not world.marked, "what is verified needs no marker"
    assert world.records == [(RolloutState.SUCCESS, RolloutReason.REGIME_SWITCHED)] * 3
    world.serve(EARNED_S)
    assert len(world.records) == 3, "and then it stays"


def test_a_load_without_an_incumbent_has_the_last_known_good(tuned: World) -> None:
    world = copy_of(tuned)
    world.serve(40, CHAT)
    assert world.in_force.prefill_chunk == 512
    world.serve(40, replace(CHAT, requests_per_s=64.0))
    assert world.state.regimes.current == 3
    assert live_values(world.in_force) == {**live_values(serving.KNOBS), **tuned.good}
    world = World()
    world.serve(40, CHAT)
    world.in_force = world.in_force.with_values({"token_budget": 1024})  # an operator
    world.serve(40, DOCUMENTS)
    assert world.in_force.token_budget == 1024 and world.records == []


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        ({"tpot_p95_s": 0.2}, RolloutReason.SLO_BREACH),
        ({"num_waiting": 99}, RolloutReason.QUEUE_GROWTH),
        (
            {"host": HostGauges(gpu_used_bytes=99, gpu_total_bytes=100)},
            RolloutReason.HBM_OVER_LIMIT,
        ),
    ],
)
def test_a_tripwire_takes_a_switch_back_and_it_is_not_tried_again(
    tuned: World, figures: dict[str, Any], reason: RolloutReason
) -> None:
    world = copy_of(tuned)
    world.load = CHAT
    while world.phase is not Phase.SWITCHED:
        world.tick()
    world.serve(2)
    assert world.in_force.prefill_chunk == 512
    while world.phase is Phase.SWITCHED:
        actions = world.tick(**figures)
    first, second = actions
    assert isinstance(first, Apply) and first.values == {"prefill_chunk": 768}
    assert isinstance(second, Settle) and second.good is None and second.regime is None
    assert world.records[-1] == (RolloutState.REVERTED, reason)
    world.serve(40, DOCUMENTS)
    world.serve(40, CHAT)
    assert world.in_force.prefill_chunk == 768, "quarantined"
    assert world.state.regimes.known[0].incumbent == tuned.state.regimes.known[0].incumbent


def test_a_dead_engine_takes_a_switch_back(tuned: World) -> None:
    world = copy_of(tuned)
    world.load = CHAT
    while world.phase is not Phase.SWITCHED:
        world.tick()
    world.tell(Tripped(at=world.at, reason=RolloutReason.ENGINE_DIED))
    assert world.in_force.prefill_chunk == 768
    assert world.records[-1] == (RolloutState.REVERTED, RolloutReason.ENGINE_DIED)


def test_targets_that_were_missed_before_a_switch_are_not_its_fault(tuned: World) -> None:
    world = copy_of(tuned)
    world.serve(60, CHAT, tpot_p95_s=0.2)
    assert world.phase is None and world.in_force.prefill_chunk == 512
    assert world.records == [(RolloutState.SUCCESS, RolloutReason.REGIME_SWITCHED)]


@pytest.mark.parametrize(
    "controls",
    [
        Controls(mode=TunerMode.ADVISE),
        replace(AUTO, frozen=True),
        replace(AUTO, killed=True),
        replace(AUTO, pins=frozenset(FOR_DOCUMENTS)),
    ],
)
def test_operators_decide_whether_and_what_is_switched(tuned: World, controls: Controls) -> None:
    world = copy_of(tuned)
    world.tell(Steered(at=world.at, controls=controls))
    world.serve(40, CHAT)
    assert world.state.regimes.current == 1 and world.in_force == tuned.in_force
    world.tell(Steered(at=world.at, controls=AUTO))
    world.serve(1)
    is_pinned = bool(controls.pins)
    assert (world.in_force.prefill_chunk == 512) is not is_pinned, "a pin holds for the stay"


def test_a_restart_has_its_regimes_and_finds_the_one_it_sees(tuned: World) -> None:
    known = tuned.state.regimes.known
    world = World(regimes=Regimes(known=known))
    world.in_force = tuned.in_force  # a start takes the last known good
    world.serve(20, CHAT)
    assert live_values(world.in_force) == known[0].incumbent


@pytest.mark.parametrize("most", [512, 767, 768, None])
def test_an_incumbent_whose_chunks_do_not_fit_this_start_stays_out(
    tuned: World, most: int | None
) -> None:
    world = World(regimes=Regimes(known=tuned.state.regimes.known), max_prefill_chunk=most)
    world.serve(20, DOCUMENTS)
    fits = most is None or most >= FOR_DOCUMENTS["prefill_chunk"]
    assert (world.in_force != serving.KNOBS) is fits
    world.serve(40, CHAT)
    assert world.in_force.max_num_active_seqs == FOR_CHAT["max_num_active_seqs"]


def under_test(load: WorkloadContext = CHAT) -> World:
    world = World()
    world.serve(EARNED_S, load)
    world.propose(FOR_CHAT)
    while world.in_force.max_num_active_seqs != 6:
        world.tick()
    world.serve(2)
    return world


def test_another_load_ends_a_test_without_a_verdict() -> None:
    world = under_test()
    world.load = DOCUMENTS
    world.until(RolloutReason.REGIME_CHANGED, seconds=10)
    assert world.records[-1] == (RolloutState.EXPIRED, RolloutReason.REGIME_CHANGED)
    assert world.in_force == serving.KNOBS and not world.marked and world.state.failed == ()
    world.serve(5)
    world.propose(FOR_CHAT)
    assert world.state.candidate is not None
    held = hold(world.state, world.state.candidate, RULE, at=world.at)
    assert held is not None and "not settled in a regime" in held
    world.until(RolloutReason.REGIME_CHANGED, seconds=30)


def test_a_short_visit_of_another_load_is_measured_again() -> None:
    world = under_test()
    assert world.state.candidate is not None
    turn = world.state.candidate.turn
    world.serve(2, DOCUMENTS)
    assert world.state.candidate.turn == turn and world.state.candidate.seen == ()
    world.load = CHAT
    world.until(RolloutReason.COMMITTED)


def test_probation_ends_with_its_load_and_takes_its_incumbent_along() -> None:
    world = under_test()
    world.until(RolloutReason.COMMITTED)
    world.serve(60, DOCUMENTS)
    assert world.records[-1] == (RolloutState.EXPIRED, RolloutReason.REGIME_CHANGED)
    assert world.state.regimes.known[0].incumbent["max_num_active_seqs"] == 6
    world = under_test()
    world.until(RolloutReason.COMMITTED)
    while world.phase is Phase.PROBATION:
        world.tick(tpot_p95_s=0.03)
    assert world.records[-1] == (RolloutState.REVERTED, RolloutReason.REGRESSED)
    settle = world.settles[-1]
    assert settle.good == {} and settle.regime is not None and settle.regime.incumbent == {}
    assert world.state.regimes.known[0].incumbent == {}


@pytest.mark.parametrize("reason", [RolloutReason.ERRORS, RolloutReason.OUT_OF_MEMORY])
def test_what_fails_under_one_load_may_be_tried_under_another(reason: RolloutReason) -> None:
    world = under_test()
    world.tell(Tripped(at=world.at, reason=reason))
    world.propose(FOR_CHAT)
    assert world.phase is None
    world.serve(40, DOCUMENTS)
    world.propose(FOR_CHAT)
    is_breakdown = reason is RolloutReason.OUT_OF_MEMORY
    assert world.phase is (None if is_breakdown else Phase.WAITING)


def test_another_platform_makes_everything_stale(tuned: World) -> None:
    for controls in (AUTO, Controls(mode=TunerMode.ADVISE)):
        world = copy_of(tuned)
        world.tell(Steered(at=world.at, controls=controls))
        world.tell(Drifted(at=world.at, reason="slow link", values=SAFE))
        assert world.good == {} and world.state.stale == "slow link"
        assert all(regime.incumbent == {} for regime in world.state.regimes.known)
        is_auto = controls is AUTO
        assert (world.in_force == tuned.in_force.with_values(SAFE)) is is_auto
        assert (world.in_force == tuned.in_force) is not is_auto
        num_records = len(world.records)
        world.serve(60, CHAT)
        world.tell(Drifted(at=world.at, reason="again", values=SAFE))
        assert len(world.records) == num_records
        world.propose({"max_num_active_seqs": 4})
        world.serve(60)
        assert world.phase in (None, Phase.WAITING)


def test_a_safe_chunk_that_memory_has_no_room_for_takes_no_other_value_along() -> None:
    world = World(max_prefill_chunk=512)
    world.serve(1)
    world.tell(Drifted(at=world.at, reason="slow link", values={**SAFE, "prefill_chunk": 768}))
    assert world.in_force == serving.KNOBS.with_values({"token_budget": SAFE["token_budget"]})


def test_a_test_under_way_is_undone_before_the_fall_back() -> None:
    world = under_test()
    actions = world.tell(Drifted(at=world.at, reason="slow link", values=SAFE))
    assert [type(action) for action in actions] == [Apply, Settle, Apply, Settle]
    assert world.in_force == serving.KNOBS.with_values(SAFE) and not world.marked


def test_whatever_comes_it_stays_on_what_is_proved_and_counts_one_load() -> None:
    draw = random.Random(7)
    world = World()
    world.serve(EARNED_S)
    for _ in range(400):
        match draw.randrange(8):
            case 0:
                world.load = draw.choice([CHAT, DOCUMENTS])
            case 1 | 2:
                values = draw.choice([FOR_CHAT, FOR_DOCUMENTS, {"max_num_active_seqs": 3}])
                world.propose(values)
            case 3 if draw.random() < 0.2:
                world.tell(Tripped(at=world.at, reason=RolloutReason.ENGINE_DIED))
                world.state = replace(world.state, failed=(), cool_at=0.0)
            case _:
                world.serve(draw.randrange(5, 60))
        if not world.state.is_testing:
            assert not world.marked
            assert any(live_values(world.in_force) == live_values(one) for one in world.proved)
    verdicts = [item for item in world.settles if item.evidence is not None]
    assert len(verdicts) >= 5 and any(item.good for item in verdicts)
    for settle in verdicts:
        for window in settle.evidence.windows:
            seconds = [at for at in world.settled_at if window.started_at < at <= window.ended_at]
            regimes = {world.settled_at[at] for at in seconds}
            assert regimes == {settle.record.regime_id}
