"""The apply state machine: whatever happens in whatever order, it stays on what is proved."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from serving import KNOBS, SNAPSHOT

from sparsed.core import (
    AcceptanceRule,
    DecisionReason,
    GpuSlowdown,
    Guard,
    HostGauges,
    KnobValue,
    RolloutReason,
    RolloutRecord,
    RolloutState,
    Slo,
    TunerMode,
)
from sparsed.tuner.gate import barred, exploring_s, hold, missed_for_good
from sparsed.tuner.rollout import advance
from sparsed.tuner.rollout_end import resume
from sparsed.tuner.rollout_state import (
    Action,
    Apply,
    Controls,
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
from sparsed.tuner.targets import guard_targets
from sparsed.tuner.tripwire import reads_less

SLO = Slo(tpot_s=0.1)
RULE = RolloutRule(
    acceptance=AcceptanceRule(metric="output_tokens_per_s", num_pairs=6),
    window_s=3.0,
    washout_s=2.0,
    probation_s=30.0,
    cooldown_s=10.0,
    quarantine_s=500.0,
    expiry_s=3000.0,
    min_busy_s=5.0,
    slo_horizon_s=600.0,
)
EARNED_S = (
    int(exploring_s(RULE, num_pairs=RULE.acceptance.num_pairs) / RULE.max_explored_frac) + 100
)
BETTER = {"max_num_active_seqs": 6}
AUTO = Controls(mode=TunerMode.AUTO)
PROFILE = "profile #1 on torch 2"


class World:
    """A daemon that does what it is told at once, and remembers as the store would."""

    def __init__(self, controls: Controls = AUTO, *, slo: Slo = SLO) -> None:
        self.slo = slo
        targets = {} if slo is SLO else guard_targets(slo)
        self.rule = replace(
            RULE,
            acceptance=replace(RULE.acceptance, targets=targets),
            harmless=replace(RULE.harmless, targets=targets),
        )
        self.recall: float | None = SNAPSHOT.attention_recall  # of fewer tokens than at the start
        self.state = Rollout(controls=controls)
        self.at = 1000.0
        self.in_force = KNOBS
        self.proved = KNOBS
        self.once_proved = [KNOBS]
        self.marked = False
        self.good: Mapping[str, KnobValue] = {}
        self.explored_s = self.busy_s = 0.0
        self.num_failed = 0
        self.gain = 1.0
        self.late = SNAPSHOT.tpot_p95_s  # with more than three requests at once
        self.draw = random.Random(0)
        self.records: list[tuple[RolloutState, RolloutReason]] = []
        self.kept: list[RolloutRecord] = []

    def tell(self, event: Event) -> tuple[Action, ...]:
        self.state, actions = advance(self.state, event, rule=self.rule, slo=self.slo)
        for action in actions:
            if isinstance(action, Apply):
                self.in_force = self.in_force.with_values(action.values)
                assert self.marked or self.in_force in self.once_proved
                continue
            self.records.append((action.record.state, action.record.reason))
            self.kept.append(action.record)
            if isinstance(action, Mark):
                assert not self.marked, "two candidates at once"
                self.marked = True
            elif isinstance(action, Settle):
                self.marked = False
                self._move(action)
        return actions

    def _move(self, settle: Settle) -> None:
        if settle.good is None:
            return
        is_commit = settle.record.reason is RolloutReason.COMMITTED
        assert is_commit or settle.record.state is RolloutState.REVERTED
        self.good = dict(settle.good)
        record = settle.record
        values = record.config_to if is_commit else record.config_from
        self.set_proved(values)

    def set_proved(self, values: Mapping[str, KnobValue]) -> None:
        self.proved = self.proved.with_values(values)
        self.once_proved.append(self.proved)

    def tick(self, *, dt_s: float = 1.0, **figures: Any) -> tuple[Action, ...]:
        if self.in_force != self.proved:
            self.explored_s += dt_s
        self.at += dt_s
        active = self.in_force.max_num_active_seqs or 0
        reads_less = self.in_force.token_budget < KNOBS.token_budget
        gain = self.gain if active > 4 or reads_less else 1.0
        rate = 50.0 * gain * (1 + 0.01 * self.draw.random())
        base = replace(
            SNAPSHOT,
            ended_at=self.at,
            window_s=dt_s,
            generated_tokens_per_s=rate,
            tpot_p95_s=self.late if active > 3 else SNAPSHOT.tpot_p95_s,
            knobs=self.in_force,
            attention_recall=self.recall if reads_less else SNAPSHOT.attention_recall,
        )
        snapshot = replace(base, **figures)
        self.busy_s += dt_s if snapshot.steps else 0.0
        return self.tell(Ticked(at=self.at, snapshot=snapshot, num_failed=self.num_failed))

    def serve(self, seconds: int) -> None:
        for _ in range(seconds):
            self.tick()

    def propose(
        self, values: Mapping[str, KnobValue] = BETTER, by: str = "auto", *, profile: str = ""
    ) -> None:
        self.tell(Proposed(at=self.at, values=values, initiated_by=by, profile=profile))

    @property
    def phase(self) -> Phase | None:
        return self.state.candidate.phase if self.state.candidate else None

    def until_candidate_runs(self) -> None:
        for _ in range(50):
            self.tick()
            candidate = self.state.candidate
            if self.in_force != self.proved and candidate and candidate.turn_s is not None:
                return
        raise AssertionError("the candidate never came into force")


def canary(gain: float = 1.2) -> World:
    world = World()
    world.gain = gain
    world.serve(EARNED_S)
    world.propose()
    world.tick()
    assert world.phase is Phase.CANARY and world.marked
    return world


def test_a_better_candidate_is_committed_and_passes_probation() -> None:
    world = canary()
    world.serve(80)
    assert world.phase is Phase.PROBATION and not world.marked
    assert world.good == BETTER and world.in_force.max_num_active_seqs == 6
    world.serve(40)
    assert world.records == [
        (RolloutState.ACTIVE, RolloutReason.PROPOSED),
        (RolloutState.VERIFYING, RolloutReason.CANARY),
        (RolloutState.VERIFYING, RolloutReason.COMMITTED),
        (RolloutState.SUCCESS, RolloutReason.PROBATION_PASSED),
    ]
    assert world.explored_s <= RULE.max_explored_frac * world.busy_s


def test_a_candidate_that_is_no_better_goes_and_stays_away() -> None:
    world = canary(gain=1.0)
    world.serve(80)
    assert world.records[-1] == (RolloutState.REVERTED, RolloutReason.NOT_BETTER)
    assert world.in_force == KNOBS and not world.marked and world.good == {}
    world.propose()
    assert world.phase is None, "its region is quarantined"
    world.propose({"max_num_active_seqs": 3})
    assert world.phase is Phase.WAITING, "the other way is not"


@pytest.mark.parametrize(
    ("figures", "num_ticks", "reason"),
    [
        ({"tpot_p95_s": 0.2}, 2, RolloutReason.SLO_BREACH),
        ({"num_waiting": 99}, 1, RolloutReason.QUEUE_GROWTH),
        (
            {"host": HostGauges(gpu_used_bytes=99, gpu_total_bytes=100)},
            1,
            RolloutReason.HBM_OVER_LIMIT,
        ),
    ],
)
def test_a_tripwire_reverts_in_its_own_tick(
    figures: dict[str, Any], num_ticks: int, reason: RolloutReason
) -> None:
    world = canary()
    world.until_candidate_runs()
    for _ in range(num_ticks - 1):
        assert world.tick(**figures) == ()
    first, second = world.tick(**figures)
    assert isinstance(first, Apply) and first.values == {"max_num_active_seqs": 4}
    assert isinstance(second, Settle) and second.good is None
    assert world.records[-1] == (RolloutState.REVERTED, reason)


def test_a_failed_request_and_a_dead_engine_revert() -> None:
    for external in (False, True):
        world = canary()
        world.until_candidate_runs()
        if external:
            world.tell(Tripped(at=world.at, reason=RolloutReason.OUT_OF_MEMORY))
        else:
            world.num_failed += 1
            world.tick()
        assert world.records[-1][0] is RolloutState.REVERTED
        assert world.in_force == KNOBS and not world.marked


def test_what_trips_under_the_former_values_is_no_fault_of_the_candidate() -> None:
    world = canary()
    world.tick(num_waiting=0)
    world.tick(num_waiting=99)
    assert world.records[-1] == (RolloutState.EXPIRED, RolloutReason.QUEUE_GROWTH)
    assert world.state.failed == ()


def test_a_regression_on_probation_moves_the_good_back_and_doubles_the_wait() -> None:
    world = canary()
    world.serve(80)
    assert world.phase is Phase.PROBATION
    while world.phase is Phase.PROBATION:
        world.tick(tpot_p95_s=0.03)
    assert world.records[-1] == (RolloutState.REVERTED, RolloutReason.REGRESSED)
    assert world.good == {} and world.in_force == KNOBS and world.state.beaten == ()
    again = resume(world.good, tuple(reversed(world.kept)), rule=RULE)
    assert barred(again, at=world.at) == barred(world.state, at=world.at)
    waits = [world.state.cool_at - world.at]
    for _ in range(2):
        world.state = replace(world.state, failed=())
        world.serve(2 * EARNED_S)
        world.propose()
        world.tick()
        world.until_candidate_runs()
        world.tell(Tripped(at=world.at, reason=RolloutReason.ENGINE_DIED))
        waits.append(world.state.cool_at - world.at)
    assert [round(wait) for wait in waits] == [10, 20, 40]


def test_what_regressed_on_probation_had_won_its_test_and_may_win_it_again() -> None:
    world = canary()
    for _ in range(2):
        while world.phase is Phase.CANARY:
            world.tick()
        assert world.phase is Phase.PROBATION
        while world.phase is Phase.PROBATION:
            world.tick(tpot_p95_s=0.03)
        assert world.records[-1] == (RolloutState.REVERTED, RolloutReason.REGRESSED)
        assert world.state.failed == () and world.good == {}
        world.serve(2 * EARNED_S)
        world.propose()
        world.tick()
        world.until_candidate_runs()
    assert resume(world.good, tuple(reversed(world.kept)), rule=RULE).failed == ()


def test_stale_and_idle_windows_end_a_test_without_a_verdict() -> None:
    world = canary()
    world.until_candidate_runs()
    world.at += RULE.max_gap_s + 1
    world.tell(Ticked(at=world.at, snapshot=None))
    assert world.records[-1] == (RolloutState.EXPIRED, RolloutReason.STALE_DATA)
    world = canary()
    for _ in range(5):
        world.tick(steps=0)
    assert world.records[-1] == (RolloutState.EXPIRED, RolloutReason.NO_TRAFFIC)
    assert world.in_force == KNOBS and world.state.failed == ()


def held(world: World) -> str:
    assert world.state.candidate is not None
    return hold(world.state, world.state.candidate, RULE, at=world.at) or ""


def test_the_gate_says_what_it_waits_for() -> None:
    world = World()
    world.tick()
    world.propose()
    assert "traffic" in held(world)
    world.serve(20)
    assert "to explore is not earned" in held(world)
    world.serve(EARNED_S - 80)
    assert world.marked
    world = World()
    world.serve(EARNED_S)
    for _ in range(20):
        world.tick(tpot_p95_s=0.2)
    world.propose()
    world.tick()
    assert world.phase is Phase.WAITING and "error budget" in held(world)


def test_no_test_begins_on_a_gpu_whose_clocks_are_cut() -> None:
    world = World()
    world.serve(EARNED_S)
    world.tick(host=replace(SNAPSHOT.host, gpu_slowdown=GpuSlowdown.THERMAL))
    world.propose()
    assert world.phase is Phase.WAITING and "clocks are cut: thermal" in held(world)
    world.serve(3)
    assert world.phase is Phase.CANARY


def test_targets_that_are_missed_for_good_may_be_repaired() -> None:
    world = World()
    world.late = 0.2
    world.serve(EARNED_S)
    world.propose({"max_num_active_seqs": 3})
    for _ in range(200):
        world.tick()
        if world.phase is Phase.PROBATION:
            break
    assert world.in_force.max_num_active_seqs == 3
    assert world.records[-1] == (RolloutState.VERIFYING, RolloutReason.COMMITTED)


def test_there_is_no_way_back_from_what_was_proved() -> None:
    world = canary()
    while world.phase is Phase.CANARY:
        world.tick()
    world.serve(100)
    assert world.records[-1][1] is RolloutReason.PROBATION_PASSED
    for values in ({"max_num_active_seqs": 4}, {"max_num_active_seqs": 3}):
        world.propose(values)
        assert world.state.candidate is None
    again = resume(world.good, tuple(reversed(world.kept)), rule=RULE)
    assert barred(again, at=world.at) == barred(world.state, at=world.at) != ()
    assert barred(again, at=world.at + RULE.quarantine_s) == ()
    world.propose({"prefill_chunk": 256})
    assert world.phase is Phase.WAITING


def test_a_repair_disarms_the_tripwires_of_its_target_alone() -> None:
    world = World(slo=Slo(tpot_s=0.1, ttft_s=1.0))
    world.late = 0.2
    world.serve(EARNED_S)
    world.propose({"max_num_active_seqs": 3})
    world.tick()
    assert world.state.candidate is not None
    assert world.state.candidate.repairs == {Guard.TPOT}
    world.until_candidate_runs()
    world.tick(tpot_p95_s=0.2)
    world.tick(tpot_p95_s=0.2)
    assert world.phase is Phase.CANARY, "it may take more than one step"
    world.tick(ttft_p95_s=2.0)
    world.tick(ttft_p95_s=2.0)
    assert world.records[-1] == (RolloutState.REVERTED, RolloutReason.SLO_BREACH)


FLOOR = Slo(tpot_s=0.1, min_recall=0.8)
LESS = {"token_budget": 1536}


def reading_less(recall: float | None, *, slo: Slo = FLOOR) -> World:
    """Advice to read fewer tokens, which would be faster, after enough traffic to test it."""
    world = World(slo=slo)
    world.gain, world.recall = 1.2, recall
    world.serve(EARNED_S)
    world.propose(LESS)
    return world


def test_fewer_tokens_are_read_where_recall_stays_over_its_floor() -> None:
    world = reading_less(0.82)
    world.serve(80)
    assert world.phase is Phase.PROBATION and world.good == LESS


def test_recall_under_its_floor_trips() -> None:
    world = reading_less(0.78)
    world.serve(80)
    assert world.records[-1] == (RolloutState.REVERTED, RolloutReason.SLO_BREACH)
    assert world.in_force == KNOBS and world.state.failed


def test_recall_that_is_not_measured_accepts_nothing() -> None:
    for selected in (SNAPSHOT.hot_hit_frac, None):
        world = reading_less(None)
        while world.state.candidate is not None:
            reads_less = world.in_force.token_budget < KNOBS.token_budget
            world.tick(hot_hit_frac=selected if reads_less else SNAPSHOT.hot_hit_frac)
        assert world.records[-1] == (RolloutState.EXPIRED, RolloutReason.UNDECIDED)
        assert world.good == {} and world.in_force == KNOBS


def test_no_candidate_asks_for_chunks_that_memory_has_no_room_for() -> None:
    for profile in ("", PROFILE):
        for most in (512, 768):
            world = World()
            world.rule = replace(world.rule, max_prefill_chunk=most)
            world.tick()
            world.propose({"prefill_chunk": 768}, profile=profile)
            assert (world.state.candidate is not None) is (most == 768)
            world.propose({"prefill_chunk": 384}, profile=profile)
            assert world.state.candidate is not None


def test_what_reads_as_ever_needs_no_samples_of_recall() -> None:
    """A GPU samples every few hundredth step: a window of long prompts may hold none."""
    world = canary()
    while world.phase is Phase.CANARY:
        world.tick(attention_recall=None, recall_samples=0, hot_hit_frac=0.9)
    assert world.records[-1] == (RolloutState.VERIFYING, RolloutReason.COMMITTED)


def test_without_a_floor_of_recall_the_token_budget_stays() -> None:
    assert reading_less(0.9, slo=SLO).state.candidate is None


def test_too_little_recall_for_good_is_repaired() -> None:
    world = World(slo=Slo(tpot_s=0.1, min_recall=0.95))
    world.serve(EARNED_S)
    assert missed_for_good(world.state) == {Guard.QUALITY}
    world.propose({"token_budget": 3072})
    while world.phase in (Phase.WAITING, Phase.CANARY):
        more = world.in_force.token_budget > KNOBS.token_budget
        world.tick(attention_recall=0.94 if more else 0.9)
    assert world.records[-1] == (RolloutState.VERIFYING, RolloutReason.COMMITTED)
    assert world.good == {"token_budget": 3072}, "still under the floor, and nearer to it"


def test_few_windows_that_miss_a_target_disarm_no_tripwire() -> None:
    world = World()
    world.serve(EARNED_S)
    told_s = 0.5 * RULE.slo_budget_frac * world.state.recent_s
    world.propose({"max_num_active_seqs": 3})
    world.state = replace(
        world.state,
        recent_s=10.0 * world.state.recent_s,
        recent_busy_s=10.0 * world.state.recent_s,
        recent_broken_s=10.0 * told_s,
        recent_told_s={Guard.TPOT: 10.0 * told_s},
        recent_missed_s={Guard.TPOT: 10.0 * told_s},
    )
    assert missed_for_good(world.state)
    while world.phase is Phase.WAITING:
        world.tick()
    assert missed_for_good(world.state), "in most of the few that tell"
    assert world.state.candidate is not None
    assert not world.state.candidate.repairs


def test_a_repair_that_repairs_nothing_is_taken_back() -> None:
    world = World()
    world.late = 0.2
    world.serve(EARNED_S)
    world.propose({"max_num_active_seqs": 6})
    for _ in range(200):
        world.tick()
        if world.state.candidate is None:
            break
    assert world.records[-1] == (RolloutState.REVERTED, RolloutReason.NOT_BETTER)
    assert world.in_force == KNOBS


def test_one_test_after_the_other_never_takes_more_than_its_share() -> None:
    world = World()
    world.serve(EARNED_S)
    for number in range(200):
        world.state = replace(world.state, failed=(), cool_at=0.0)
        world.propose({"max_num_active_seqs": 3 if number % 2 else 6})
        world.serve(20)
        share = world.explored_s / world.busy_s
        assert share <= RULE.max_explored_frac
    assert share > 0.5 * RULE.max_explored_frac, "it did explore"


@pytest.mark.parametrize(
    ("controls", "reason"),
    [
        (replace(AUTO, frozen=True), RolloutReason.FROZEN),
        (replace(AUTO, killed=True), RolloutReason.KILLED),
        (replace(AUTO, pins=frozenset(BETTER)), RolloutReason.PINNED),
        (replace(AUTO, mode=TunerMode.ADVISE), RolloutReason.SWITCHED_OFF),
    ],
)
def test_operators_end_a_test_at_once(controls: Controls, reason: RolloutReason) -> None:
    world = canary()
    world.until_candidate_runs()
    world.tell(Steered(at=world.at, controls=controls))
    assert world.records[-1] == (RolloutState.EXPIRED, reason)
    assert world.in_force == KNOBS and not world.marked
    world.propose()
    assert world.phase is None


def test_what_an_operator_approved_is_tested_in_advise() -> None:
    world = World(Controls(mode=TunerMode.ADVISE))
    world.serve(EARNED_S)
    world.propose()
    assert world.phase is None
    world.propose(by="operator")
    world.tick()
    assert world.phase is Phase.CANARY


def test_a_proposal_is_cut_to_one_step_of_hot_knobs() -> None:
    world = World()
    world.serve(5)
    world.propose({"max_num_active_seqs": 16, "page_size": 64})
    assert world.state.candidate is not None
    assert world.state.candidate.config_to == BETTER


def profiled(gain: float, values: Mapping[str, KnobValue] = BETTER) -> tuple[World, list[Settle]]:
    """A test of a profile from its first tick to its verdict, and how it was settled."""
    world = World()
    world.gain = gain
    world.serve(2 * EARNED_S)
    world.propose(values, profile=PROFILE)
    actions = [action for _ in range(90) for action in world.tick()]
    return world, [action for action in actions if isinstance(action, Settle)]


@pytest.mark.parametrize("gain", [1.0, 1.2])
def test_values_of_a_compatible_profile_need_no_gain(gain: float) -> None:
    world, (settled,) = profiled(gain)
    assert world.records[2] == (RolloutState.VERIFYING, RolloutReason.COMMITTED)
    assert world.good == BETTER and settled.record.profile == PROFILE
    assert settled.evidence is not None
    assert replace(settled.evidence.rule, guards=RULE.harmless.guards) == RULE.harmless
    assert settled.evidence.verdict.num_pairs == 8


def test_values_of_a_compatible_profile_must_do_no_harm() -> None:
    world, (settled,) = profiled(0.95)
    assert world.records[-1] == (RolloutState.REVERTED, RolloutReason.NOT_BETTER)
    assert world.in_force == KNOBS and world.good == {} and not world.marked
    assert settled.evidence is not None and settled.record.profile == PROFILE
    assert settled.evidence.verdict.reason is DecisionReason.METRIC_WORSE


def test_a_profile_is_tested_whole_or_not_at_all() -> None:
    whole = {"max_num_active_seqs": 12, "prefill_chunk": 128, "token_budget": KNOBS.token_budget}
    world = World(replace(AUTO, pins=frozenset({"token_budget"})))
    world.serve(5)
    world.propose(whole, profile=PROFILE)
    assert world.state.candidate is not None, "what is in force anyway is no part of it"
    assert world.state.candidate.config_to == {"max_num_active_seqs": 12, "prefill_chunk": 128}
    world = World()
    world.serve(5)
    world.propose({**whole, "max_num_active_seqs": KNOBS.max_num_seqs + 1}, profile=PROFILE)
    assert world.state.candidate is None


def test_a_profile_waits_for_the_time_to_explore_like_everything_else() -> None:
    world = World()
    world.serve(20)
    world.propose(profile=PROFILE)
    assert "to explore is not earned" in held(world)
    needed_s = exploring_s(RULE, num_pairs=RULE.harmless.num_pairs) / RULE.max_explored_frac
    world.serve(int(needed_s) - 25)
    assert world.phase is Phase.WAITING
    world.serve(10)
    assert world.marked


def test_a_start_remembers_what_failed() -> None:
    world = canary(gain=1.0)
    settled = [action for _ in range(80) for action in world.tick() if isinstance(action, Settle)]
    state = resume({}, tuple(action.record for action in settled), rule=RULE)
    assert state.cool_at == world.state.cool_at and state.failed == world.state.failed


class AnyOrder(RuleBasedStateMachine):
    """Load, faults and operators in any order, at any moment."""

    @initialize(gain=st.sampled_from([0.8, 1.0, 1.3]))
    def begin(self, gain: float) -> None:
        self.world = World()
        self.world.gain = gain
        self.world.serve(EARNED_S)

    @rule(seconds=st.integers(1, 120))
    def serve(self, seconds: int) -> None:
        self.world.serve(seconds)

    @rule(dt_s=st.floats(0.2, 3.0))
    def slow_tick(self, dt_s: float) -> None:
        self.world.tick(dt_s=dt_s)

    @rule()
    def earn(self) -> None:
        self.world.serve(EARNED_S)

    @rule(active=st.sampled_from([3, 6]))
    def test_and_forget(self, active: int) -> None:
        self.world.state = replace(self.world.state, failed=(), cool_at=0.0)
        self.world.propose({"max_num_active_seqs": active})
        self.world.serve(100)

    @rule(
        active=st.sampled_from([2, 3, 5, 6, 8]),
        by=st.sampled_from(["auto", "operator"]),
        profile=st.sampled_from(["", PROFILE]),
    )
    def propose(self, active: int, by: str, profile: str) -> None:
        self.world.propose({"max_num_active_seqs": active}, by, profile=profile)

    @rule(active=st.sampled_from([3, 6]))
    def prove_a_profile(self, active: int) -> None:
        values = {"max_num_active_seqs": active, "prefill_chunk": 256}
        self.world.state = replace(self.world.state, failed=(), cool_at=0.0)
        self.world.propose(values, profile=PROFILE)
        self.world.serve(150)

    @rule()
    def breach(self) -> None:
        self.world.tick(tpot_p95_s=0.2)
        self.world.tick(tpot_p95_s=0.2)
        self.must_be_proved()

    def must_be_proved(self) -> None:
        """After two breaches nothing unproved may run, unless it was committed before."""
        if self.world.phase is not Phase.PROBATION:
            candidate = self.world.state.candidate
            is_young = candidate is not None and candidate.turn_s is None
            assert self.world.in_force == self.world.proved or is_young

    @rule(busy=st.booleans())
    def idle(self, busy: bool) -> None:
        for _ in range(5):
            self.world.tick(steps=10 if busy else 0)

    @rule()
    def fail_a_request(self) -> None:
        self.world.num_failed += 1
        self.world.tick()

    @rule(reason=st.sampled_from([RolloutReason.ENGINE_DIED, RolloutReason.STORE_FAILED]))
    def trip(self, reason: RolloutReason) -> None:
        self.world.tell(Tripped(at=self.world.at, reason=reason))
        assert self.world.in_force == self.world.proved and not self.world.marked

    @rule(chunk=st.sampled_from([256, 512, 1024]))
    def operator_sets(self, chunk: int) -> None:
        self.world.tell(Tripped(at=self.world.at, reason=RolloutReason.OVERTAKEN))
        values = {"prefill_chunk": chunk}
        self.world.in_force = self.world.in_force.with_values(values)
        self.world.set_proved(values)

    @rule(mode=st.sampled_from(TunerMode), frozen=st.booleans(), killed=st.booleans())
    def steer(self, mode: TunerMode, frozen: bool, killed: bool) -> None:
        controls = Controls(mode=mode, frozen=frozen, killed=killed)
        self.world.tell(Steered(at=self.world.at, controls=controls))

    @precondition(lambda self: self.world.state.controls != AUTO)
    @rule()
    def let_it_work(self) -> None:
        self.world.tell(Steered(at=self.world.at, controls=AUTO))

    @invariant()
    def the_marker_stands_while_something_is_unproved(self) -> None:
        if not hasattr(self, "world"):
            return
        assert self.world.marked == self.world.state.is_testing
        assert self.world.marked or self.world.in_force == self.world.proved

    @invariant()
    def the_good_is_what_is_stored(self) -> None:
        if hasattr(self, "world"):
            assert self.world.state.good == self.world.good

    @invariant()
    def exploring_stays_within_its_share(self) -> None:
        if hasattr(self, "world"):
            assert self.world.explored_s <= RULE.max_explored_frac * self.world.busy_s + 1e-6


AnyOrder.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
test_any_order = AnyOrder.TestCase


@pytest.mark.parametrize(
    ("values", "before", "is_less"),
    [
        ({"token_budget": 1024}, {"token_budget": 2048}, True),
        ({"token_budget": 4096}, {"token_budget": 2048}, False),
        ({"retrieval_stride": 2}, {"retrieval_stride": 1}, True),
        ({"retrieval_stride": 2}, {"retrieval_stride": 4}, False),
        ({"token_budget": 4096, "retrieval_stride": 2}, {"token_budget": 2048, "retrieval_stride": 1}, True),
        ({"hbm_budget": None}, {"hbm_budget": 2048, "token_budget": 2048}, False),
    ],
)  # fmt: skip
def test_fewer_tokens_or_an_older_choice_of_them_is_less(
    values: Mapping[str, KnobValue], before: Mapping[str, KnobValue], is_less: bool
) -> None:
    assert reads_less(values, before=before) == is_less
